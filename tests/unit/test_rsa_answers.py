"""Answers: what counts as the same, and how a vote is decided."""

import time

import pytest

from zaya_convert.rsa.answers import extract_boxed, normalise, same, vote


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 07", "7"),
        ("1,234", "1234"),
        ("1{,}000", "1000"),
        ("12,34", "12,34"),
        ("0.50", "1/2"),
        ("3/6", "1/2"),
        ("\\frac{1}{2}", "1/2"),
        ("\\dfrac12", "1/2"),
        ("$-\\tfrac{3}{6}$", "-1/2"),
        ("\u22125", "-5"),
        ("\\left( 1,\\, 2 \\right)", "(1,2)"),
        ("\\text{ yes}", "yes"),
        ("{5}.", "5"),
        ("1/0", "1/0"),
        ("\\frac{1}{0}", "\\frac{1}{0}"),
        ("x + 1", "x+1"),
        ("\\leftarrow", "\\leftarrow"),
        (".", "."),
        ("", ""),
    ],
)
def test_one_way_to_write_an_answer(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_a_number_too_long_to_be_one_stays_a_text() -> None:
    digits = "1" * 5000
    assert normalise("0" + digits) == "0" + digits


def test_the_last_whole_box_counts() -> None:
    assert extract_boxed("\\boxed{1} \\boxed{ \\frac{1}{2} } \\boxed{3") == "\\frac{1}{2}"
    assert extract_boxed("\\boxed{a \\boxed{2} b}") == "a \\boxed{2} b"
    assert extract_boxed("\\boxed{a \\boxed{2} b") == "2"
    assert extract_boxed("} \\\\boxed{\\}\\{}") == "\\}\\{"
    assert extract_boxed("\\boxed{1") is None


def test_a_text_that_repeats_itself_is_read_in_no_time() -> None:
    began = time.monotonic()
    assert extract_boxed("\\boxed{" * 20_000) is None
    assert normalise("{" * 20_000 + "07" + "}" * 20_000) == "7"
    assert time.monotonic() - began < 5  # square time would take minutes


def test_a_missing_answer_agrees_with_nothing() -> None:
    assert same("1/2", "0.5")
    assert not same("1", "2")
    assert not same(None, "1")
    assert not same(None, None)


def test_votes_go_to_the_majority_and_ties_to_the_earliest() -> None:
    assert vote(["3", None, "4", "04"]) == 2
    assert vote(["3", "4", "4", "3"]) == 0
    assert vote([None, "4", "3"]) == 1
    assert vote([None, None]) is None
    assert vote([]) is None
