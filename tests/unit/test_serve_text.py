"""Stop strings and reasoning marks, however the tokens cut them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zaya_convert.serve.text import Splitter, Until, thinks


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({cut % (len(text) + 1) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


CUTS = st.lists(st.integers(0, 1000), max_size=12)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1), max_size=3), CUTS)
def test_text_goes_out_up_to_the_first_mark(text: str, marks: list[str], cuts: list[int]) -> None:
    until, out, rest = Until(marks), "", ""
    for piece in pieces(text, cuts):
        if until.found:
            rest += piece
            continue
        passed, behind = until.push(piece)
        out, rest = out + passed, rest + behind
    ends = [text.find(mark) + len(mark) for mark in marks if mark in text]
    if not ends:
        assert not until.found
        assert out + until.flush() == text
        return
    assert until.found
    found = [mark for mark in marks if text.startswith(out + mark)]
    assert found, "stopped where no mark is"
    assert any(out + mark + rest == text for mark in found)
    assert not any(mark in out for mark in marks)


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "rest", "still"),
    [
        ("why\n</think>\n42", True, "why\n", "\n42", False),
        ("why, and no end </thi", True, "why, and no end </thi", "", True),
        ("</think>", True, "", "", False),
        ("a</think>b</think>c", True, "a", "b</think>c", False),
        ("<think>why</think>42", False, "why", "42", False),
        ("\n <think>\nwhy</think>42", False, "\nwhy", "42", False),
        ("plain <think> text</think>", False, "", "plain <think> text</think>", False),
        ("<thi", False, "", "<thi", False),
        ("", True, "", "", True),
        ("", False, "", "", False),
    ],
)
@given(cuts=CUTS)
def test_reasoning_is_told_apart(
    text: str, thinking: bool, reasoning: str, rest: str, still: bool, cuts: list[int]
) -> None:
    splitter = Splitter(thinking)
    parts = [splitter.push(piece) for piece in pieces(text, cuts)] + [splitter.flush()]
    assert "".join(part[0] for part in parts) == reasoning
    assert "".join(part[1] for part in parts) == rest
    assert splitter.thinking == still


def test_nothing_is_held_back_without_need() -> None:
    until = Until(["END"])
    push: Callable[[str], str] = lambda text: until.push(text)[0]  # noqa: E731
    assert [push(text) for text in ("some", " EN", "x", "E", "E", "ND")] == [
        "some", " ", "ENx", "", "E", "",
    ]  # fmt: skip
    assert until.found


def test_a_prompt_that_opens_reasoning() -> None:
    assert thinks("<|im_start|>assistant\n<think>\n")
    assert not thinks("<think>\n</think>\n")
    assert not thinks("hello")
