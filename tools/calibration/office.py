"""Exchanges without a trace: tables, lists, JSON, configuration, summaries, letters.

Models are also asked for things they answer at once. Whatever is computed here (totals, sorted
rows, counts) is computed from the drawn data, as in the reasoning part.
"""

from __future__ import annotations

import json
import random
from datetime import date, timedelta

from tools.calibration.voice import NAMES, Exchange, listing

_CITIES = ("Oslo", "Lyon", "Porto", "Gdansk", "Turin", "Leeds", "Ghent", "Split", "Bergen", "Cadiz")
_PARTS = (
    "hinge", "bracket", "washer", "spindle", "gasket", "pulley", "valve", "coupling", "bearing",
    "filter", "clamp", "sprocket", "flange", "hose", "relay",
)  # fmt: skip
_MATERIALS = ("steel", "brass", "nylon", "rubber", "aluminium")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stock_table(rng: random.Random) -> Exchange:
    """CSV to a sorted Markdown table with a total."""
    rows = [
        (part, rng.choice(_MATERIALS), rng.randint(3, 90), rng.randint(15, 900))
        for part in rng.sample(_PARTS, rng.randint(6, 10))
    ]
    text = "\n".join(f"{p},{m},{n},{c / 100:.2f}" for p, m, n, c in rows)
    ordered = sorted(rows, key=lambda r: -r[2] * r[3])
    total = sum(n * c for _, _, n, c in rows)
    table = _table(
        ["Part", "Material", "Count", "Price", "Value"],
        [[p, m, str(n), f"{c / 100:.2f}", f"{n * c / 100:.2f}"] for p, m, n, c in ordered],
    )
    materials = sorted({m for _, m, _, _ in rows})
    by = [f"- {m}: {listing([p for p, k, _, _ in ordered if k == m])}" for m in materials]
    question = (
        "Turn this CSV into a Markdown table, add a column with the value (count times price), "
        "sort "
        f"it by value from high to low, and give the total.\n\n```csv\npart,material,count,price\n"
        f"{text}\n```"
    )
    reply = f"{table}\n\n**Total value:** {total / 100:.2f}\n\nBy material:\n\n" + "\n".join(by)
    facts = {"rows": [[n, c] for _, _, n, c in rows]}
    return Exchange("stock_table", question, "", reply, f"{total / 100:.2f}", facts)


def to_json(rng: random.Random) -> Exchange:
    """Facts in prose become JSON."""
    people = rng.sample(NAMES, 4)
    records, told = [], []
    for who in people:
        city, days = rng.choice(_CITIES), rng.randint(2, 14)
        day = date(2024, 1, 1) + timedelta(days=rng.randint(0, 700))
        diet = rng.choice((None, "vegetarian", "nut-free"))
        items = rng.sample(("tent", "stove", "map", "first-aid kit", "torch", "rope"), 2)
        records.append(
            {"name": who, "city": city, "arrival": day.isoformat(), "days": days, "diet": diet,
             "brings": items}
        )  # fmt: skip
        food = "has no wishes about food" if diet is None else f"asks for {diet} food"
        told.append(
            rng.choice(
                (
                    f"{who} from {city} arrives on {day.day} {day:%B %Y}, stays {days} days, "
                    f"{food} "
                    f"and brings a {items[0]} and a {items[1]}.",
                    f"On {day.day} {day:%B %Y} we expect {who} ({city}) for {days} days, who "
                    f"{food}; "
                    f"a {items[0]} and a {items[1]} come along.",
                )
            )
        )
    text = " ".join(told)
    question = (
        "Extract the guests from the text as a JSON array of objects with the keys name, city, "
        f"arrival (ISO date), days, diet (or null) and brings. Only JSON, please.\n\n{text}"
    )
    answer = json.dumps(records, indent=2)
    return Exchange("to_json", question, "", f"```json\n{answer}\n```", answer, {"text": text})


_DISHES = (
    ("pancakes", (("flour", 50, "g"), ("milk", 90, "ml"), ("eggs", 1, ""), ("sugar", 5, "g"),
                  ("butter", 8, "g")),
     ("Whisk the eggs with the milk and the sugar.", "Add the flour little by little and stir "
      "until "
      "the batter is smooth.", "Let it rest for twenty minutes.", "Melt some butter in a pan and "
      "bake thin pancakes, about two minutes on each side.")),
    ("lentil soup", (("red lentils", 70, "g"), ("carrots", 1, ""), ("onions", 1, ""),
                     ("vegetable stock", 300, "ml"), ("cumin", 1, "g")),
     ("Chop the onions and the carrots finely.", "Fry both with the cumin until the onions turn "
      "soft.", "Add the rinsed lentils and the stock.", "Simmer for twenty-five minutes with the "
      "lid "
      "on.", "Blend half of it, stir, and season to taste.")),
    ("flatbread", (("flour", 120, "g"), ("water", 70, "ml"), ("yeast", 2, "g"), ("salt", 2, "g"),
                   ("olive oil", 6, "ml")),
     ("Dissolve the yeast in lukewarm water.", "Knead all ingredients for ten minutes into a soft "
      "dough.", "Cover it and let it rise for an hour.", "Divide, roll out thinly, and bake in a "
      "hot "
      "dry pan until brown spots appear.")),
    ("rice salad", (("rice", 60, "g"), ("peas", 40, "g"), ("tomatoes", 1, ""), ("feta", 35, "g"),
                    ("lemon juice", 10, "ml")),
     ("Cook the rice, rinse it with cold water and let it drain.", "Dice the tomatoes and crumble "
      "the "
      "feta.", "Mix everything with the peas and the lemon juice.", "Chill for half an hour before "
      "serving.")),
)  # fmt: skip


def recipe(rng: random.Random) -> Exchange:
    """A recipe for a number of people."""
    dish, parts, method = rng.choice(_DISHES)
    people = rng.randint(2, 18)
    when = rng.choice(
        ("a birthday", "a club evening", "a picnic", "a school fair", "a family lunch")
    )
    listed = "\n".join(f"- {n * people}{' ' + u if u else ''} {what}" for what, n, u in parts)
    done = "\n".join(f"{n}. {line}" for n, line in enumerate(method, 1))
    minutes = 10 + 3 * people
    reply = (
        f"## {dish.capitalize()} for {people}\n\n### Ingredients\n\n{listed}\n\n### "
        f"Method\n\n{done}\n\n"
        f"Plan about {minutes} minutes at the stove, since the amounts for {when} need several "
        f"rounds. What is left keeps for a day in the refrigerator."
    )
    question = f"I need {dish} for {people} people at {when}. Give me the amounts and the method."
    facts = {"people": people, "dish": dish}
    return Exchange("recipe", question, "", reply, str(people), facts)


_LEVELS = ("INFO", "INFO", "INFO", "WARN", "ERROR", "DEBUG")
_EVENTS = {
    "INFO": ("request served in {n} ms", "session opened for user {n}", "cache holds {n} entries"),
    "WARN": ("queue length is {n}", "retry {n} of the upload", "clock differs by {n} ms"),
    "ERROR": ("timeout after {n} s", "checksum of block {n} is wrong", "worker {n} stopped"),
    "DEBUG": ("poll number {n}", "buffer grew to {n} bytes", "parsed {n} headers"),
}


def log_summary(rng: random.Random) -> Exchange:
    """A log and what it says."""
    second, lines, levels = rng.randint(0, 80000), [], []
    unit = rng.choice(("gateway", "indexer", "scheduler", "mailer", "archive"))
    for _ in range(rng.randint(11, 18)):
        second += rng.randint(1, 90)
        level = rng.choice(_LEVELS)
        levels.append(level)
        event = rng.choice(_EVENTS[level]).format(n=rng.randint(2, 900))
        stamp = f"{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        lines.append(f"{stamp} {level:<5} {unit}: {event}")
    counts = {level: levels.count(level) for level in dict.fromkeys(_LEVELS)}
    bad = [line for line, level in zip(lines, levels, strict=True) if level == "ERROR"]
    body = "\n".join(lines)
    question = f"Summarize this log: counts per level, and all errors.\n\n```\n{body}\n```"
    table = _table(["Level", "Lines"], [[k, str(n)] for k, n in counts.items()])
    errors = "\n".join(f"- `{line}`" for line in bad) if bad else "There are no errors."
    reply = (
        f"The log of the {unit} covers {lines[0][:8]} to {lines[-1][:8]} with {len(lines)} "
        f"lines.\n\n"
        f"{table}\n\n**Errors**\n\n{errors}"
    )
    answer = str(counts["ERROR"])
    return Exchange("log_summary", question, "", reply, answer, {"lines": lines})


def settings_file(rng: random.Random) -> Exchange:
    """Wishes become a TOML file, with a line on each."""
    port, workers, timeout = rng.randint(1024, 9999), rng.randint(2, 32), rng.randint(5, 120)
    name = rng.choice(("beacon", "granary", "lookout", "ferry", "mill")) + f"-{rng.randint(2, 40)}"
    level, size = rng.choice(("debug", "info", "warning")), rng.choice((16, 64, 128, 256, 512))
    kept, hour = rng.randint(3, 60), rng.randint(0, 5)
    flags = {k: rng.random() < 0.5 for k in ("compress", "read_only", "metrics")}
    on = [k for k, value in flags.items() if value]
    off = [k for k, value in flags.items() if not value]
    question = (
        f"Write a TOML configuration for a service named {name}: it listens on port {port} with "
        f"{workers} workers and gives up after {timeout} seconds. The log level is {level}. The "
        f"cache has {size} MiB. Backups run daily at {hour}:30 and are kept for {kept} days. "
        f"Switch on: {', '.join(on) or 'nothing'}. Switch off: {', '.join(off) or 'nothing'}. "
        "Explain each section briefly."
    )
    toml = (
        f'[service]\nname = "{name}"\nport = {port}\nworkers = {workers}\n'
        f'timeout_seconds = {timeout}\n\n[log]\nlevel = "{level}"\n\n[cache]\nsize_mib = {size}\n\n'
        f'[backup]\nat = "{hour:02d}:30"\nkeep_days = {kept}\n\n[features]\n'
    ) + "\n".join(f"{k} = {str(value).lower()}" for k, value in flags.items())
    reply = (
        f"```toml\n{toml}\n```\n\n- **service**: name, port and limits; {workers} workers share "
        f"the "
        f"port, and a request ends after {timeout} s at the latest.\n- **log**: only messages of "
        f"level {level} and above are written.\n- **cache**: at most {size} MiB are kept in "
        f"memory.\n- **backup**: one backup a day at {hour:02d}:30; those older than {kept} days "
        f"are "
        f"removed.\n- **features**: {len(on)} of {len(flags)} switches are on."
    )
    return Exchange("settings_file", question, "", reply, toml, {"port": port, "workers": workers})


_TOPICS = (
    (
        "the new bicycle racks",
        "twelve racks beside the main entrance",
        "the ground has to be levelled",
    ),
    (
        "opening hours in winter",
        "close an hour earlier from November on",
        "heating costs have risen",
    ),
    ("the summer festival", "hold it on the meadow behind the school", "the hall is too small"),
    ("the broken projector", "repair it instead of buying one", "the lamp alone is defective"),
    ("a second reading group", "start it in March with ten places", "the waiting list is long"),
    ("the water pipe in the garden", "replace the old section", "it has leaked three times"),
    ("the membership fee", "leave it as it is for a year", "the reserve is sufficient"),
    ("training for first aid", "book a course for all helpers", "most certificates have expired"),
)
_SAID = (
    "{who} reported on {topic}: {reason}. After a discussion it was agreed to {plan}. {other} "
    "takes "
    "care of it until {day}.",
    "Concerning {topic}, {who} explained that {reason}. The meeting decided to {plan}, with "
    "{votes} "
    "votes in favour. {other} will see to that by {day}.",
    "Next came {topic}. {who} proposed to {plan}, because {reason}. Nobody objected, and {other} "
    "promised to have it done by {day}.",
)


def minutes(rng: random.Random) -> Exchange:
    """Minutes of a meeting and their summary."""
    told, bullets = [], []
    day = date(2023, 1, 1) + timedelta(days=rng.randint(0, 900))
    people = rng.sample(NAMES, 6)
    for topic, plan, reason in rng.sample(_TOPICS, 4):
        who, other = rng.sample(people, 2)
        due = day + timedelta(days=rng.randint(5, 40))
        when = f"{due.day} {due:%B}"
        told.append(
            rng.choice(_SAID).format(
                who=who, topic=topic, reason=reason, plan=plan, other=other, day=when,
                votes=rng.randint(4, 6),
            )
        )  # fmt: skip
        bullets.append(f"- **{topic[0].upper()}{topic[1:]}**: {plan} ({other}, by {when}).")
    body = "\n\n".join(told)
    question = (
        f"Summarize these minutes as a list of decisions with who is responsible.\n\nMeeting of "
        f"{day.day} {day:%B %Y}. Present: {listing(people)}.\n\n{body}"
    )
    reply = f"Decisions of {day.day} {day:%B %Y}:\n\n" + "\n".join(bullets)
    return Exchange("minutes", question, "", reply, "4", {"people": people})


_LETTERS = (
    ("complain about a late delivery", "your delivery of {n} {part}s, promised for {day}, has "
     "still "
     "not reached us", "Please let us know within a week when it will arrive, or cancel the "
     "order."),
    ("ask for a quotation", "we intend to order {n} {part}s in {material} and would like to "
     "receive "
     "them by {day}", "Please send us a quotation with prices for this and for twice the amount."),
    ("thank a supplier", "the {n} {part}s in {material} arrived complete and in good order on "
     "{day}",
     "We are pleased with the quality and will gladly order again."),
    ("move an appointment", "we had agreed to inspect the {n} {part}s on {day}, and a colleague "
     "has "
     "fallen ill", "Could we meet one week later, at the same time and place?"),
)  # fmt: skip


def letter(rng: random.Random) -> Exchange:
    """A short formal letter, and the same in one sentence."""
    aim, fact, wish = rng.choice(_LETTERS)
    sender, receiver = rng.sample(NAMES, 2)
    day = date(2024, 1, 1) + timedelta(days=rng.randint(0, 600))
    filled = fact.format(
        n=rng.randint(20, 900), part=rng.choice(_PARTS), material=rng.choice(_MATERIALS),
        day=f"{day.day} {day:%B}",
    )  # fmt: skip
    city = rng.choice(_CITIES)
    opening = rng.choice(("I am writing to you because", "I would like to inform you that"))
    closing = rng.choice(("Thank you for your help.", "I look forward to your answer."))
    reply = (
        f"{city}, {day + timedelta(days=9):%d %B %Y}\n\nDear {receiver},\n\n{opening} {filled}.\n\n"
        f"{wish} {closing}\n\nKind regards,\n{sender}\n\n---\n\nIn one sentence: {sender} writes "
        f"to "
        f"{receiver} that {filled}."
    )
    question = (
        f"Write a short, polite letter from {sender} in {city} to {receiver} to {aim}. The point "
        f"is: "
        f"{filled}. Then say the same in a single sentence."
    )
    return Exchange("letter", question, "", reply, sender, {"aim": aim})


GENERATORS = (stock_table, to_json, recipe, log_summary, settings_file, minutes, letter)
