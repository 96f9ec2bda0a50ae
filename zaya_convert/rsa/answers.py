"""What is read out of a generated text: the reasoning that is carried on, and the boxed answer.

Answers are compared after ``normalise``, which knows numbers and the usual ways to write them in
LaTeX, and nothing of algebra: ``x + 1`` and ``1 + x`` are two answers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

_BOXED = "\\boxed{"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

# What LaTeX writes for looks only.
_LOOKS = re.compile(
    r"\\(?:left|right|displaystyle|limits)(?![a-zA-Z])|\\[,;:! ]|\\q?quad(?![a-zA-Z])|[$~]|\s+"
)
_WORDS = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}")
_FRACTION = re.compile(r"([+-]?)\\frac(?:\{([+-]?\d+)\}\{([+-]?\d+)\}|(\d)(\d))")
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\})\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_RATIO = re.compile(r"([+-]?\d+)/(\d+)")
_MOST_DIGITS = 400  # of a number that is compared as one


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, outer spaces dropped, or None.

    Braces inside may nest (``\boxed{\frac{1}{2}}``); an escaped brace (``\{``) counts as text. A
    box that is never closed is passed over, so that a text cut off by its budget keeps the last
    answer it did finish. Of nested boxes the outer one is read.
    """
    closing = _closing_braces(text)
    found: str | None = None
    position = text.find(_BOXED)
    while position >= 0:
        start = position + len(_BOXED)
        end = closing.get(start)
        if end is not None:
            found = text[start:end].strip()
        position = text.find(_BOXED, end or start)
    return found


def normalise(answer: str) -> str:
    r"""One way to write an answer, so that equal answers become equal texts.

    Spaces, ``$``, ``\left``, ``\text{...}`` and other looks are dropped, and a full stop at the end
    too; ``\dfrac`` is ``\frac``. Integers, decimals, ``a/b``, ``\frac{a}{b}`` and ``1,234`` become
    fractions in lowest terms (``07`` is ``7``, ``0.50`` is ``1/2``). Anything else stays a text.
    """
    text = answer.replace("\u2212", "-")
    text = _WORDS.sub(r"\1", text)
    text = _LOOKS.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = text.rstrip(".") or text
    closing = _closing_braces(text)
    layers = 0
    while closing.get(layers + 1) == len(text) - 1 - layers:
        layers += 1
    text = text[layers : len(text) - layers]
    number = _number(text)
    return text if number is None else str(number)


def same(answer: str | None, other: str | None) -> bool:
    """Whether two answers agree; a missing one agrees with nothing, not even with its like."""
    return answer is not None and other is not None and normalise(answer) == normalise(other)


def vote(answers: Sequence[str | None]) -> int | None:
    """The index of the majority's earliest answer; of equal majorities the earliest wins.

    None when there is no answer at all.
    """
    known = [None if answer is None else normalise(answer) for answer in answers]
    counts = Counter(answer for answer in known if answer is not None)
    if not counts:
        return None
    most = max(counts.values())
    return next(
        i for i, answer in enumerate(known) if answer is not None and counts[answer] == most
    )


def _number(text: str) -> Fraction | None:
    """A number in one of the forms that ``normalise`` names."""
    if len(text) > _MOST_DIGITS:
        return None
    if _GROUPED.fullmatch(text):
        text = text.replace("{,}", "").replace(",", "")
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    if found := _FRACTION.fullmatch(text):
        sign, top, bottom, *digits = found.groups()
        if top is None:
            top, bottom = digits
        value = Fraction(int(top), int(bottom)) if int(bottom) else None
        return -value if value is not None and sign == "-" else value
    if (found := _RATIO.fullmatch(text)) and int(found[2]):
        return Fraction(int(found[1]), int(found[2]))
    return None


def reasoning_of(text: str) -> str:
    """The reasoning: what stands before the first ``</think>``, or all of an unfinished text.

    An opening ``<think>`` is dropped where the text carries one (most chat templates put it into
    the prompt), with the line break after it.
    """
    reasoning = text.split(THINK_CLOSE, 1)[0]
    head, opened, rest = reasoning.partition(THINK_OPEN)
    if opened and not head.strip():
        return rest.removeprefix("\n")
    return reasoning


def _closing_braces(text: str) -> dict[int, int]:
    """Of every brace that is opened and closed: where its content begins, and where that ends."""
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACES.finditer(text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif brace[0] == "}" and opened:
            pairs[opened.pop()] = brace.start()
    return pairs
