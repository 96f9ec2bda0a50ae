"""The bundled calibration text: well-formed, mixed as described, reproducible, and right.

Answers of the generators are worked out again from the drawn facts by other means: brute force,
enumeration, the standard library, or running the code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import random
import re
import statistics
from collections import deque
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from tools.calibration import build, everyday, numbers, office, procedures, puzzles, quantities
from tools.calibration.voice import Exchange

README = build.OUTPUT.parent / "README.md"
GENERATORS = [
    *numbers.GENERATORS,
    *quantities.GENERATORS,
    *puzzles.GENERATORS,
    *procedures.GENERATORS,
    *everyday.GENERATORS,
]
SHARES = {"reasoning": 0.45, "prose": 0.25, "code": 0.20, "other": 0.10}


@pytest.fixture(scope="module")
def raw() -> bytes:
    return build.OUTPUT.read_bytes()


@pytest.fixture(scope="module")
def documents(raw: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in raw.decode("utf-8").split("\n")[:-1]]


def shares_of(documents: list[dict[str, Any]]) -> dict[str, float]:
    total = dict.fromkeys(SHARES, 0)
    for document in documents:
        total[build.PART_OF[document["source"]]] += build.size_of(document)
    return {part: size / sum(total.values()) for part, size in total.items()}


# The file


def test_every_line_is_one_document(raw: bytes, documents: list[dict[str, Any]]) -> None:
    assert raw.endswith(b"\n")
    for document in documents:
        assert set(document) in ({"text", "source"}, {"messages", "source"})
        assert 1000 <= len(build.text_of(document).encode()) <= 8000
        roles = [message["role"] for message in document.get("messages", [])]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)


def test_size_and_mix(raw: bytes, documents: list[dict[str, Any]]) -> None:
    assert 600_000 <= len(raw) <= 700_000
    assert shares_of(documents) == pytest.approx(SHARES, abs=0.02)


@pytest.mark.parametrize("count", [30, 60, 120])
def test_every_prefix_has_the_mix(documents: list[dict[str, Any]], count: int) -> None:
    assert shares_of(documents[:count]) == pytest.approx(SHARES, abs=0.05)


def test_the_readme_states_what_the_file_holds(raw: bytes, documents: list[dict[str, Any]]) -> None:
    text = README.read_text(encoding="utf-8")
    assert hashlib.sha256(raw).hexdigest() in text
    assert f"{len(raw):,} bytes" in text
    for source, part in build.PART_OF.items():
        sizes = [build.size_of(d) for d in documents if d["source"] == source]
        assert f"| {part} | `{source}` | {len(sizes)} | {sum(sizes):,} |" in text


def test_no_document_repeats_another(documents: list[dict[str, Any]]) -> None:
    assert len({build.text_of(d) for d in documents}) == len(documents)
    distinct = build.Distinct()
    assert all(distinct.accept(document) for document in documents)


def test_nothing_private_is_in_it(raw: bytes) -> None:
    found = re.search(r"https?://|\w@\w+\.\w|/(home|root|Users|tmp)/", raw.decode("utf-8"))
    assert found is None


def test_reasoning_is_closed(documents: list[dict[str, Any]]) -> None:
    for document in documents:
        if document["source"] == "generated-reasoning":
            answers = [m["content"] for m in document["messages"] if m["role"] == "assistant"]
            assert all(
                a.startswith("<think>\n") and a.count("\n</think>\n\n") == 1 for a in answers
            )


def test_a_rebuild_gives_the_same_bytes(raw: bytes) -> None:
    assert "".join(map(build.line_of, build.build())).encode() == raw


def test_another_seed_gives_other_documents() -> None:
    assert build.generated_parts(1) != build.generated_parts(2)


_NUMBER = r"(?:\(-?\d+\)|-?\d+(?:\.\d+)?(?:/\d+)?)(?![\w^(]|\.\d)"
_SUM = rf"{_NUMBER}(?: [-+*/] {_NUMBER})*"
# Not in the middle of a formula, whose beginning may hold letters.
_EQUATION = re.compile(rf"(?<![\w.^(,-])(?<![\w)] [-+*/] )({_SUM}) = ({_SUM})(?! [-+*/=^]|\w)")


def value_of(expression: str) -> Fraction:
    return eval(re.sub(r"\d+(?:\.\d+)?(?:/\d+)?", r"Fraction('\g<0>')", expression))


def equations(text: str) -> list[tuple[str, str]]:
    plain = text.replace("$", "").replace("\\times", "*").replace("×", "*")
    return [(a, b) for a, b in _EQUATION.findall(plain) if " " in a + b]


def test_every_equation_in_the_generated_text_holds(documents: list[dict[str, Any]]) -> None:
    found = [
        equation
        for document in documents
        if document["source"] in build.GENERATED
        for equation in equations(build.text_of(document))
    ]
    assert len(found) > 1000
    assert [e for e in found if value_of(e[0]) != value_of(e[1])] == []


# The generators, worked out by other means


def _money(amount: Decimal | Fraction) -> str:
    return f"${float(amount):.2f}"


def shopping(f: Any) -> str:
    bill = sum(n * Fraction(cents, 100) for n, cents in f["lines"])
    return _money(Fraction(f["paid"], 100) - bill * (1 - Fraction(f["percent"], 100)))


def search(ok: Callable[[int], bool], low: int = -300, high: int = 10_000) -> int:
    (found,) = [n for n in range(low, high) if ok(n)]
    return found


def two_unknowns(f: Any) -> str:
    return str(search(lambda n: n * f["p"] + (f["total"] - n) * f["q"] == f["income"], 0))


def quadratic(f: Any) -> str:
    roots = [x for x in range(-200, 201) if x * x + f["b"] * x + f["c"] == 0]
    return " and ".join(map(str, roots))


def speeds(f: Any) -> str:
    return str(int(Fraction(f["km"]) / Fraction(f["kmh"]) * 60))


def meeting(f: Any) -> str:
    hour = f["start"]
    one, two = 0, f["distance"]
    while one < two:
        one += f["a"]
        two -= f["b"] if hour >= f["start"] + f["head"] else 0
        hour += 1
    assert one == two
    return f"{hour}:00"


def bells(f: Any) -> str:
    return str(next(n for n in itertools.count(f["a"], f["a"]) if n % f["b"] == 0))


def committee(f: Any) -> str:
    club = ["w"] * f["women"] + ["m"] * f["men"]
    return str(sum("w" in group for group in itertools.combinations(club, f["size"])))


def marbles(f: Any) -> str:
    bag = "a" * f["a"] + "b" * f["b"]
    draws = list(itertools.permutations(bag, 2))
    return str(Fraction(sum(x == y for x, y in draws), len(draws)))


def averages(f: Any) -> str:
    missing = search(lambda n: statistics.mean([*f["known"], n]) == f["mean"], 0, 300)
    return str(statistics.median([*f["known"], missing]))


def garden_path(f: Any) -> str:
    width, length, path = f["width"], f["length"], f["path"]
    field = itertools.product(range(-path, length + path), range(-path, width + path))
    tiles = sum(not (0 <= x < length and 0 <= y < width) for x, y in field)
    return str(tiles * f["price"])


def number_bases(f: Any) -> str:
    return f"{bin(f['number'])[2:]} (binary), {hex(f['number'])[2:].upper()} (hexadecimal)"


def ages(f: Any) -> str:
    young = search(lambda n: n + f["gap"] + f["later"] == f["k"] * (n + f["later"]), 0, 200)
    return f"{f['young']} is {young} and {f['old']} is {young + f['gap']}"


def mixture(f: Any) -> str:
    salt = Decimal(f["a"] * f["weak"] + f["b"] * f["strong"])
    return f"{round(float(salt / (f['a'] + f['b'])), 1)}%"


def race(f: Any) -> str:
    def fits(place: dict[str, int]) -> bool:
        for relation, a, b in f["clues"]:
            if relation == "not" and place[a] == int(b):
                return False
            if relation == "before" and not place[a] < place[b]:
                return False
            if relation == "just before" and place[a] + 1 != place[b]:
                return False
            if relation == "apart" and abs(place[a] - place[b]) == 1:
                return False
        return True

    orders = itertools.permutations(f["who"])
    (only,) = [o for o in orders if fits({name: n for n, name in enumerate(o, 1)})]
    return ", ".join(only)


def knights(f: Any) -> str:
    found = []
    for case in itertools.product("TF", repeat=3):
        for speaker, other, kind, both in f["said"]:
            claimed = (case[speaker] == case[other]) if both else (case[other] == "T")
            if (claimed is kind) != (case[speaker] == "T"):
                break
        else:
            found.append(case)
    (case,) = found
    told = [
        f"{n} is a {'knight' if c == 'T' else 'knave'}" for n, c in zip(f["who"], case, strict=True)
    ]
    return f"{told[0]}, {told[1]} and {told[2]}"


def day_count(f: Any) -> str:
    end = date.fromisoformat(f["end"])
    days, day = 0, date.fromisoformat(f["start"])
    while day != end:
        day += timedelta(days=1)
        days += 1
    weekday = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"][
        end.weekday()
    ]
    return f"{days} days, {weekday}"


def timetable(f: Any) -> str:
    at = datetime(2000, 1, 1) + timedelta(minutes=f["start"])
    at += timedelta(minutes=sum(f["minutes"]))
    return f"{at.hour}:{at.minute:02d}"


def caesar(f: Any) -> str:
    return "".join(chr((ord(c) - 97 + f["shift"]) % 26 + 97) for c in f["word"])


def word_surgery(f: Any) -> str:
    return ", ".join(sorted("".join(reversed(w)) for w in f["words"] if f["letter"] in w))


def sorting(f: Any) -> str:
    return str(sum(a > b for a, b in itertools.combinations(f["numbers"], 2)))


def code_trace(f: Any) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(f["code"], {})
    return printed.getvalue().strip()


def project_plan(f: Any) -> str:
    def end(task: int) -> int:
        return f["days"][task] + max(map(end, f["needs"][task]), default=0)

    return str(max(map(end, range(len(f["days"])))))


def cups(f: Any) -> str:
    at = f["boxes"][f["things"].index(f["asked"])]
    for pair in f["moves"]:
        if at in pair:
            (at,) = [box for box in pair if box != at]
    return at


def lattice(f: Any) -> str:
    def ways(x: int, y: int) -> int:
        if x >= f["width"] or y >= f["height"] or [x, y] in f["blocked"]:
            return 0
        if (x, y) == (f["width"] - 1, f["height"] - 1):
            return 1
        return ways(x + 1, y) + ways(x, y + 1)

    return str(ways(0, 0))


def jugs(f: Any) -> str:
    size = (f["big"], f["small"])
    best, queue = {(0, 0): 0}, deque([(0, 0)])
    while queue:
        a, b = queue.popleft()
        right, left = min(a, size[1] - b), min(b, size[0] - a)
        for state in (
            (size[0], b), (a, size[1]), (0, b), (a, 0),
            (a - right, b + right), (a + left, b - left),
        ):  # fmt: skip
            if state not in best:
                best[state] = best[a, b] + 1
                queue.append(state)
    assert min(n for s, n in best.items() if f["goal"] in s) <= f["moves"]
    return f"{f['goal']} litres"


def syllogism(f: Any) -> str:
    known = set(f["chain"][f["at"] :])
    return f"{'yes' if f['chain'][f['asked']] in known else 'no'}, and yes"


SOLVERS: dict[str, Callable[[Any], str]] = {
    "shopping": shopping,
    "long_product": lambda f: str(sum([f["a"]] * f["b"])),
    "linear_equation": lambda f: str(
        search(lambda x: f["a"] * x + f["b"] == f["c"] * x + f["d"], -99, 99)
    ),
    "two_unknowns": two_unknowns,
    "quadratic": quadratic,
    "speeds": speeds,
    "meeting": meeting,
    "shared_work": lambda f: str(1 / (Fraction(1, f["a"]) + Fraction(1, f["b"]))),
    "percent_chain": lambda f: str(
        f["start"] * (1 + Fraction(f["up"], 100)) * (1 - Fraction(f["down"], 100))
    ),
    "fraction_sum": lambda f: str(sum(Fraction(n, d) for n, d in f["parts"])),
    "bells": bells,
    "last_digit": lambda f: str(f["base"] ** f["power"])[-1],
    "committee": committee,
    "marbles": marbles,
    "averages": averages,
    "garden_path": garden_path,
    "number_bases": number_bases,
    "ages": ages,
    "mixture": mixture,
    "race": race,
    "knights": knights,
    "day_count": day_count,
    "timetable": timetable,
    "caesar": caesar,
    "word_surgery": word_surgery,
    "sorting": sorting,
    "code_trace": code_trace,
    "project_plan": project_plan,
    "cups": cups,
    "lattice": lattice,
    "jugs": jugs,
    "syllogism": syllogism,
    "other_tongue": lambda f: str(Fraction(f["a"] + f["b"] - f["c"], 2)),
}

# Their questions say the facts in another form: as a clock time, next to a letter, as a bound.
RESTATED = {
    "timetable", "jugs", "shopping", "syllogism", "linear_equation", "quadratic", "meeting",
    "lattice",
}  # fmt: skip


def test_every_generator_has_a_solver() -> None:
    assert {make.__name__ for make in GENERATORS} == set(SOLVERS)


@pytest.mark.parametrize("make", GENERATORS, ids=lambda make: make.__name__)
def test_answers_agree_with_an_independent_solution(make: Callable[..., Exchange]) -> None:
    for seed in range(40):
        made = make(random.Random(seed))
        assert SOLVERS[made.kind](made.facts) == made.answer
        assert made.answer in made.reply
        if made.kind not in RESTATED:
            plain = [n for n in made.facts.values() if type(n) is int]
            assert all(re.search(rf"\b{abs(n)}\b", made.question) for n in plain)
        for left, right in equations(made.thinking):
            assert value_of(left) == value_of(right), (left, right)


def test_jug_traces_follow_the_rules() -> None:
    for seed in range(40):
        made = procedures.jugs(random.Random(seed))
        big, small, at = made.facts["big"], made.facts["small"], (0, 0)
        states = [(int(a), int(b)) for a, b in re.findall(r"\((\d+), (\d+)\)", made.thinking)]
        assert len(states) == made.facts["moves"]
        for a, b in states:
            fills = {(big, at[1]), (at[0], small), (0, at[1]), (at[0], 0)}
            pours = a + b == sum(at) and (a in (0, big) or b in (0, small))
            assert (a, b) in fills or pours
            at = (a, b)
        assert made.facts["goal"] in at


def test_tables_logs_and_records_say_what_they_were_made_from() -> None:
    for seed in range(20):
        stock = office.stock_table(random.Random(seed))
        assert stock.answer == f"{sum(n * c for n, c in stock.facts['rows']) / 100:.2f}"
        values = [float(v) for v in re.findall(r"\| ([\d.]+) \|$", stock.reply, re.MULTILINE)]
        assert values == sorted(values, reverse=True)
        log = office.log_summary(random.Random(seed))
        assert log.answer == str(sum(" ERROR " in line for line in log.facts["lines"]))
        records = office.to_json(random.Random(seed))
        for record in json.loads(records.answer):
            day = date.fromisoformat(record["arrival"])
            for word in (
                record["name"],
                record["city"],
                f"{day.day} {day:%B %Y}",
                *record["brings"],
            ):
                assert word in records.question


def test_hand_written_problems_are_told_whole() -> None:
    for number in range(everyday.COMMON_SENSE):
        made = everyday.common_sense(random.Random(number), number)
        assert made.answer in made.reply
        assert not re.search(r"(?<!boxed)\{", made.question + made.thinking)
