"""Reasoning without much arithmetic: logic, dates, text, lists, code, plans, routes.

As in `quantities`, the drawn facts go with every exchange, so that answers can be checked by brute
force, by `datetime`, or by running the code.
"""

from __future__ import annotations

import calendar
import random
from datetime import date, timedelta
from itertools import permutations, product

from tools.calibration.voice import Exchange, Voice, listing

Clue = tuple[str, str, str]  # relation, first and second name (or a place, as text)


def holds(clue: Clue, order: tuple[str, ...]) -> bool:
    """Whether an order of finish satisfies a clue."""
    relation, a, b = clue
    if relation == "not":
        return order.index(a) != int(b) - 1
    gap = order.index(b) - order.index(a)
    return {"before": gap > 0, "just before": gap == 1, "apart": abs(gap) > 1}[relation]


def _say(clue: Clue) -> str:
    relation, a, b = clue
    return {
        "not": f"{a} does not come in at place {b}",
        "before": f"{a} finishes somewhere ahead of {b}",
        "just before": f"{a} finishes directly ahead of {b}",
        "apart": f"{a} and {b} are not next to each other",
    }[relation]


def race(rng: random.Random) -> Exchange:
    """An order from clues, found by elimination."""
    v = Voice(rng)
    who = v.names(4)
    truth = tuple(rng.sample(who, 4))
    clues: list[Clue] = []
    left = list(permutations(who))
    steps = [f"Four runners can finish in 4! = {len(left)} orders. I go through the clues."]
    while len(left) > 1:
        a, b = rng.sample(who, 2)
        relation = rng.choice(("not", "before", "just before", "apart"))
        clue: Clue = (relation, a, str(rng.randint(1, 4)) if relation == "not" else b)
        rest = [order for order in left if holds(clue, order)]
        if not holds(clue, truth) or len(rest) == len(left):
            continue
        clues.append(clue)
        left = rest
        shown = ""
        if 1 < len(left) <= 5:
            shown = ": " + "; ".join(" - ".join(order) for order in left)
        count = f"{len(left)} orders remain" if len(left) > 1 else "only one order remains"
        steps.append(f"Clue {len(clues)} says that {_say(clue)}. With it {count}{shown}.")
    steps.append(f"What is left is {' - '.join(truth)}, so {truth[0]} wins.")
    check = [
        f"{_say(c)}: yes, {c[1]} is at place {truth.index(c[1]) + 1}"
        + ("." if c[0] == "not" else f" and {c[2]} at place {truth.index(c[2]) + 1}.")
        for c in clues
    ]
    question = (
        f"{listing(who)} run a race without ties. These statements are true:\n"
        + "\n".join(f"{n}. {_say(c)}." for n, c in enumerate(clues, 1))
        + "\nIn which order do they finish?"
    )
    facts = {"who": who, "clues": [list(c) for c in clues]}
    answer = ", ".join(truth)
    return v.tell("race", question, steps, check, answer, "From first to last: {}.", facts)


def knights(rng: random.Random) -> Exchange:
    """Knights tell the truth, knaves lie; all cases are tried."""
    v = Voice(rng)
    while True:
        who = v.names(3)
        said = []
        for n in range(3):
            other = rng.choice([m for m in range(3) if m != n])
            said.append((n, other, rng.choice((True, False)), rng.random() < 0.4))
        good = [case for case in product((True, False), repeat=3) if _consistent(said, case)]
        if len(good) == 1:
            break
    label = {True: "a knight", False: "a knave"}
    words = [
        f"{who[n]} says: "
        + (
            f'"{who[m]} and I are of {"the same kind" if kind else "different kinds"}."'
            if both
            else f'"{who[m]} is {label[kind]}."'
        )
        for n, m, kind, both in said
    ]
    steps = ["Each of the three is a knight or a knave, so there are 2^3 = 8 cases to test."]
    for case in product((True, False), repeat=3):
        named = listing([f"{w} {label[c][2:]}" for w, c in zip(who, case, strict=True)])
        wrong = next((s[0] for s in said if _claim(s, case) != case[s[0]]), None)
        if wrong is None:
            steps.append(f"Case {named}: every statement fits its speaker. This case is possible.")
        else:
            truth = "true" if _claim(said[wrong], case) else "false"
            steps.append(
                f"Case {named}: then {who[wrong]}'s statement would be {truth}, which "
                f"{label[case[wrong]]} cannot say. Contradiction."
            )
    (case,) = good
    answer = listing([f"{w} is {label[c]}" for w, c in zip(who, case, strict=True)])
    steps.append(f"Exactly one case survives: {answer}.")
    check = [
        f"{who[s[0]]}, {label[case[s[0]]]}, says something "
        f"{'true' if _claim(s, case) else 'false'}."
        for s in said
    ]
    question = (
        "On an island knights always tell the truth and knaves always lie. You meet "
        f"{listing(who)}. " + " ".join(words) + " Who is what?"
    )
    facts = {"who": who, "said": [list(s) for s in said]}
    return v.tell("knights", question, steps, check, answer, "{}.", facts)


def _claim(said: tuple[int, int, bool, bool], case: tuple[bool, ...]) -> bool:
    speaker, other, kind, both = said
    return (case[speaker] == case[other]) == kind if both else case[other] == kind


def _consistent(said: list[tuple[int, int, bool, bool]], case: tuple[bool, ...]) -> bool:
    return all(_claim(s, case) == case[s[0]] for s in said)


def day_count(rng: random.Random) -> Exchange:
    """Days between two dates, month by month, and a weekday."""
    v = Voice(rng)
    start = date(rng.randint(1985, 2035), rng.randint(1, 8), rng.randint(1, 28))
    end = start + timedelta(days=rng.randint(60, 150))
    total = (end - start).days
    month = calendar.month_name
    rest = calendar.monthrange(start.year, start.month)[1] - start.day
    parts, at = [rest], date(start.year, start.month, 28) + timedelta(days=4)
    leap = "a leap year" if calendar.isleap(start.year) else "not a leap year"
    steps = [
        f"{start.year} is {leap}, which matters only if February is crossed.",
        f"From {start.day} {month[start.month]} to the end of that month there are {rest} days.",
    ]
    while (at.year, at.month) != (end.year, end.month):
        days = calendar.monthrange(at.year, at.month)[1]
        parts.append(days)
        steps.append(f"{month[at.month]} {at.year} has {days} days.")
        at = at.replace(day=28) + timedelta(days=4)
    parts.append(end.day)
    steps += [
        f"In {month[end.month]} itself {end.day} days count.",
        f"Together: {' + '.join(map(str, parts))} = {total}.",
        f"{total} days are {total // 7} weeks and {total % 7} days. Counting {total % 7} days on "
        f"from {start:%A} gives {end:%A}.",
    ]
    check = [
        f"7 {v.x} {total // 7} + {total % 7} = {total}.",
        f"The weekdays {total % 7} days on: "
        + ", ".join(f"{start + timedelta(days=n):%A}" for n in range(total % 7 + 1))
        + ".",
    ]
    say = "{0.day} {1} {0.year}".format
    first, last = say(start, month[start.month]), say(end, month[end.month])
    question = (
        f"{first} is a {start:%A}. How many days later is {last}, and which weekday is it then?"
    )
    facts = {"start": start.isoformat(), "end": end.isoformat()}
    answer = f"{total} days, {end:%A}"
    return v.tell("day_count", question, steps, check, answer, "The answer: {}.", facts)


def timetable(rng: random.Random) -> Exchange:
    """Clock arithmetic over a day with several stages."""
    v = Voice(rng)
    stages = rng.sample(
        ("bus ride", "walk", "museum visit", "lunch", "boat trip", "concert", "train ride", "talk"),
        4,
    )
    minutes = [rng.randint(3, 30) * 5 + rng.randint(0, 4) for _ in stages]
    start = rng.randint(7 * 60, 10 * 60)
    (who,) = v.names(1)
    clock = lambda m: f"{m // 60}:{m % 60:02d}"  # noqa: E731
    at, steps = start, [f"The day starts at {clock(start)}."]
    for stage, length in zip(stages, minutes, strict=True):
        hours, over = divmod(at % 60 + length, 60)
        steps.append(
            f"The {stage} takes {length} minutes: {at % 60} + {length} = {at % 60 + length} "
            f"minutes "
            f"past {at // 60}:00, that is {hours} h and {over} min, so it ends at "
            f"{clock(at + length)}."
        )
        at += length
    total = sum(minutes)
    check = [
        f"In one go: {' + '.join(map(str, minutes))} = {total} minutes, which are {total // 60} h "
        f"{total % 60} min. From {clock(start)} that leads to {clock(at)}."
    ]
    listed = ", then ".join(f"a {s} of {m} minutes" for s, m in zip(stages, minutes, strict=True))
    question = (
        f"{who} sets out at {clock(start)}. The plan is {listed}, without breaks. When is it over?"
    )
    facts = {"start": start, "minutes": minutes}
    return v.tell("timetable", question, steps, check, clock(at), "It is over at {}.", facts)


def project_plan(rng: random.Random) -> Exchange:
    """The earliest end of tasks that wait for each other."""
    v = Voice(rng)
    pool = (
        ("survey the site", "order the parts", "pour the base", "set up the frame", "lay the "
         "cables",
         "paint the walls", "install the pumps", "test everything"),
        ("draft the text", "collect the photos", "check the facts", "design the pages",
         "translate it", "prepare the website", "print a proof", "ship the copies"),
    )  # fmt: skip
    names = list(rng.choice(pool))[:7]
    days = [rng.randint(1, 9) for _ in names]
    needs = [sorted(rng.sample(range(i), min(i, rng.randint(1, 2)))) for i in range(len(names))]
    tags = "ABCDEFG"
    end: list[int] = []
    steps = ["A task can start when the last of its prerequisites is done. I go in order."]
    for i, need in enumerate(needs):
        begin = max((end[n] for n in need), default=0)
        end.append(begin + days[i])
        why = "needs nothing" if not need else "waits for " + listing([tags[n] for n in need])
        known = f" (ends {', '.join(str(end[n]) for n in need)})" if need else ""
        steps.append(
            f"{tags[i]} {why}{known}, so it starts on day {begin} and ends at {begin} + {days[i]} "
            f"= "
            f"{end[i]}."
        )
    last = max(end)
    path, at = [], end.index(last)
    while True:
        path.append(at)
        if not needs[at]:
            break
        at = max(needs[at], key=lambda n: end[n])
    path.reverse()
    steps.append(f"The latest end is {last}, so the whole project takes {last} days.")
    check = [
        f"The longest chain is {' -> '.join(tags[n] for n in path)} with "
        f"{' + '.join(str(days[n]) for n in path)} = {last} days; nothing can be faster than that."
    ]
    listed = "\n".join(
        f"- {tags[i]}: {name} ({days[i]} days)"
        + (f", after {listing([tags[n] for n in needs[i]])}" if needs[i] else "")
        for i, name in enumerate(names)
    )
    question = (
        f"A project has these tasks:\n{listed}\nTasks may run in parallel. What is the shortest "
        "possible duration of the project in days?"
    )
    facts = {"days": days, "needs": needs}
    return v.tell("project_plan", question, steps, check, str(last), "It takes {} days.", facts)


GENERATORS = (race, knights, day_count, timetable, project_plan)
