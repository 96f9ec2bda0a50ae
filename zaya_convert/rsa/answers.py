"""What is read out of a generated text: the reasoning that is carried on, and the boxed answer."""

from __future__ import annotations

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

_BOXED = "\\boxed{"


def extract_boxed(text: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, outer spaces dropped, or None.

    Braces inside may nest (``\boxed{\frac{1}{2}}``); an escaped brace (``\{``) counts as text. A
    box that is never closed is passed over, so that a text cut off by its budget keeps the last
    answer it did finish. Of nested boxes the outer one is read.
    """
    found: str | None = None
    position = text.find(_BOXED)
    while position >= 0:
        start = position + len(_BOXED)
        end = _closing_brace(text, start)
        if end is None:
            position = text.find(_BOXED, start)
            continue
        found = text[start:end].strip()
        position = text.find(_BOXED, end)
    return found


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


def _closing_brace(text: str, start: int) -> int | None:
    """The index of the brace that closes the one opened just before `start`."""
    depth = 1
    index = start
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 2
            continue
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    return None
