"""The task of `zaya1-tiny`: chains of arithmetic modulo 100, told as short word problems.

A problem is a start value and a few steps. Its reasoning has one labelled line a step, in fields of
fixed width, so that a line of one candidate can be found again in another:

    Mia has 47 coins. Mia finds 8 more. ...         A:47+8=55
                                                    B:55*3=65

A trace may hold *slips*: steps with a wrong result, carried on as if it were right. Real models err
like that at temperature 1; here the rate is a setting. The operation ``#`` ("rule") has a result
that is random per problem, known only to who has seen a candidate's tail. Nothing but reading tails
predicts it, so it teaches reading; it appears in aggregation examples only.

Every problem belongs to exactly one split, decided by a hash of its canonical form (the bare chain,
whatever its wording), so the splits are disjoint by construction.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zaya_convert.rsa.prompts import message_for

MODULUS = 100
MIN_STEPS = 3
MAX_STEPS = 6
LABELS = "ABCDEF"
TAIL_TOKENS = 40
# Of single traces at the end of training, and of the candidates in aggregation prompts, a step.
SLIP_RATE = 0.09
ERROR_RATE = 0.10
FOREIGN_SHARE = 0.3  # of aggregation prompts: all tails belong to another problem

# Parts of a thousand of all problems; the order fixes which hashes belong to which split.
SPLITS: dict[str, int] = {"train": 940, "calibration": 20, "validation": 20, "problems": 20}

_OPERATIONS = "++--**"
_SMALL_SLIPS = (1, -1, 2, -2, 10, -10, 20, -20)


@dataclass(frozen=True)
class Step:
    """One operation (``+ - *``, or ``#`` for a hidden rule) and its operand."""

    operation: str
    operand: int


@dataclass(frozen=True)
class Problem:
    """A start value and the steps taken from it; `salt` decides what the hidden rules give."""

    start: int
    steps: tuple[Step, ...]
    salt: int = 0

    @property
    def canonical(self) -> str:
        """The bare chain, the same for every wording."""
        return str(self.start) + "".join(f"{s.operation}{s.operand}" for s in self.steps)

    def result(self, index: int, value: int) -> int:
        """What step `index` makes of `value`."""
        step = self.steps[index]
        if step.operation == "+":
            return (value + step.operand) % MODULUS
        if step.operation == "-":
            return (value - step.operand) % MODULUS
        if step.operation == "*":
            return (value * step.operand) % MODULUS
        return _stable_hash(f"{self.salt}:{index}:{value}") % MODULUS

    def values(self, slips: Mapping[int, int] | None = None) -> tuple[int, ...]:
        """The start and the result of every step, with the offset of every step that slips."""
        values = [self.start]
        for index in range(len(self.steps)):
            offset = slips.get(index, 0) if slips else 0
            values.append((self.result(index, values[-1]) + offset) % MODULUS)
        return tuple(values)

    @property
    def answer(self) -> str:
        """The last value, as the two digits every trace writes."""
        return f"{self.values()[-1]:02d}"


@dataclass(frozen=True)
class Example:
    """A training text without `<bos>`: context up to `response_at`, `mute` spans not learned."""

    text: str
    response_at: int
    mute: tuple[tuple[int, int], ...] = field(default=())


@dataclass(frozen=True)
class Story:
    """A wording: `{v}` start, `{k}` operand, `{name}` and `{item}` drawn once a problem."""

    opening: str
    phrases: Mapping[str, str]
    closing: str


_MODULO = "Count modulo 100 and give two digits."
_NAMES = ("Mia", "Tom", "Ana", "Ben", "Lea", "Max")
_ITEMS = ("coins", "points", "shells", "stamps")

STORIES: tuple[Story, ...] = (
    Story(
        "Start with {v}.",
        {
            "+": "Add {k}.",
            "-": "Subtract {k}.",
            "*": "Multiply by {k}.",
            "#": "Apply the rule {k}.",
        },
        f"What is the result? {_MODULO}",
    ),
    Story(
        "{name} has {v} {item}.",
        {
            "+": "{name} finds {k} more.",
            "-": "{name} gives away {k}.",
            "*": "Then there are {k} times as many.",
            "#": "{name} uses the rule {k}.",
        },
        f"How many {{item}} are there? {_MODULO}",
    ),
    Story(
        "A dial shows {v}.",
        {
            "+": "Turn it up by {k}.",
            "-": "Turn it down by {k}.",
            "*": "Multiply it by {k}.",
            "#": "Apply the rule {k}.",
        },
        f"What does it show? {_MODULO}",
    ),
)


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(canonical: str) -> str:
    """The split of a canonical problem, or of a line of prose: a function of its text alone."""
    slot = _stable_hash(canonical) % sum(SPLITS.values())
    for name, size in SPLITS.items():
        if slot < size:
            return name
        slot -= size
    raise AssertionError("the slots cover the whole range")


def draw_problem(rng: random.Random, split: str, hidden: int = 0) -> Problem:
    """A problem of `split`, with `hidden` of its steps replaced by hidden rules."""
    while True:
        steps: list[Step] = []
        for _ in range(rng.randint(MIN_STEPS, MAX_STEPS)):
            operation = rng.choice(_OPERATIONS)
            operand = rng.randint(2, 4 if operation == "*" else 9)
            steps.append(Step(operation, operand))
        for index in rng.sample(range(len(steps)), min(hidden, len(steps))):
            steps[index] = Step("#", rng.randint(2, 9))
        problem = Problem(rng.randint(10, 99), tuple(steps), rng.getrandbits(48))
        if split_of(problem.canonical) == split:
            return problem


def tell(problem: Problem, rng: random.Random) -> str:
    """The problem in words."""
    story = rng.choice(STORIES)
    words = {"name": rng.choice(_NAMES), "item": rng.choice(_ITEMS)}
    parts = [story.opening.format(v=problem.start, **words)]
    parts += [story.phrases[s.operation].format(k=s.operand, **words) for s in problem.steps]
    parts.append(story.closing.format(**words))
    return " ".join(parts)


def write_trace(problem: Problem, values: Sequence[int]) -> str:
    """The reasoning: one labelled line a step."""
    return "".join(
        f"{LABELS[i]}:{values[i]:02d}{step.operation}{step.operand}={values[i + 1]:02d}\n"
        for i, step in enumerate(problem.steps)
    )


def draw_slips(problem: Problem, rng: random.Random, rate: float) -> dict[int, int]:
    """Slips for one trace: each step slips with probability `rate`, mostly by a digit."""
    return {i: _slip_offset(rng) for i in range(len(problem.steps)) if rng.random() < rate}


def _slip_offset(rng: random.Random) -> int:
    if rng.random() < 0.6:
        return rng.choice(_SMALL_SLIPS)
    return rng.randint(1, MODULUS - 1)


def chat_text(message: str, trace: str, answer: str) -> str:
    """One finished exchange as the chat template renders it, without the leading `<bos>`."""
    return prompt_text(message) + f"{trace}</think>\n\\boxed{{{answer}}}<|im_end|>"


def prompt_text(message: str) -> str:
    """The rendered prompt, without the leading `<bos>`."""
    return f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n<think>\n"


def single_example(rng: random.Random, split: str, slip_rate: float) -> Example:
    """A problem and one trace, with slips at `slip_rate` a step."""
    problem = draw_problem(rng, split)
    values = problem.values(draw_slips(problem, rng, slip_rate))
    message = message_for(tell(problem, rng))
    text = chat_text(message, write_trace(problem, values), f"{values[-1]:02d}")
    return Example(text, len(prompt_text(message)))


def draw_candidates(
    problem: Problem, rng: random.Random, split: str, error_rate: float
) -> list[str]:
    """Tails of sampled-looking candidates: right, slipped, cut short, or of another problem."""
    count = rng.choice((1, 2, 3, 4, 4, 4, 4, 4))
    tau = rng.choice((32, TAIL_TOKENS, TAIL_TOKENS, TAIL_TOKENS, 48, 56))
    shared = draw_slips(problem, rng, error_rate)  # candidates of one model err alike at times
    tails: list[str] = []
    for _ in range(count):
        source, slips = problem, draw_slips(problem, rng, error_rate)
        chance = rng.random()
        if chance < 0.03:
            source, slips = draw_problem(rng, split), {}
        elif chance < 0.18:
            slips = shared
        trace = write_trace(source, source.values(slips))
        if rng.random() < 0.05:
            trace = trace[: rng.randrange(len(trace) // 2, len(trace))]
        tails.append(trace[-tau:])  # every character of a trace is one token
    return tails


def aggregation_example(
    rng: random.Random,
    split: str,
    slip_rate: float,
    error_rate: float,
    hidden: int = 0,
    foreign_share: float = 0.0,
) -> Example:
    """A problem, candidate tails, and an improved trace.

    The improved trace slips only where no candidate shows the right result: reading earns the
    improvement, the prompt alone does not. For the same reason some prompts hold tails of another
    problem, which help nothing. A hidden result that no candidate shows is not learned.
    """
    problem = draw_problem(rng, split, hidden)
    told = problem
    if foreign_share and not hidden and rng.random() < foreign_share:
        told = draw_problem(rng, split)
    tails = draw_candidates(told, rng, split, error_rate)
    truth = problem.values()
    shown = "\n".join(tails)
    slips: dict[int, int] = {}
    muted: list[int] = []
    for index, step in enumerate(problem.steps):
        if supported(problem, truth, index, shown):
            continue
        if step.operation == "#":
            muted.append(index)
        elif not hidden and rng.random() < slip_rate:
            slips[index] = _slip_offset(rng)
    values = problem.values(slips)
    message = message_for(tell(problem, rng), tails)
    trace = write_trace(problem, values)
    at = len(prompt_text(message))
    mute = tuple(_result_span(trace, index, at) for index in muted)
    return Example(chat_text(message, trace, f"{values[-1]:02d}"), at, mute)


def supported(problem: Problem, truth: Sequence[int], index: int, shown: str) -> bool:
    """Whether `shown` holds the right result of step `index`, in its line or in the next."""
    line = write_trace(problem, truth).splitlines()[index]
    if line in shown:
        return True
    following = f"{LABELS[index + 1]}:{truth[index + 1]:02d}" if index + 1 < len(truth) - 1 else ""
    return bool(following) and following in shown


def _result_span(trace: str, index: int, at: int) -> tuple[int, int]:
    """The characters of the result of line `index` of a trace that starts at `at`."""
    lines = trace.splitlines(keepends=True)
    end = at + sum(len(line) for line in lines[: index + 1]) - 1
    return end - 2, end
