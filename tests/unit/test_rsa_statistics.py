"""Intervals over problems, against figures worked out by hand or by simulation."""

import numpy as np
import pytest

from zaya_convert.rsa import statistics
from zaya_convert.rsa.statistics import mean
from zaya_convert.rsa.verdict import FAIL, UNDECIDED, Check, at_least, at_most, enough, verdict


def of(*values: float) -> statistics.Values:
    return np.array(values, dtype=np.float64)


def test_wilson_of_independent_cases() -> None:
    # one candidate a problem, 8 of 10: Wilson's interval is [0.490, 0.943]; the variance over
    # problems divides by n - 1, which makes it a little wider
    found = statistics.share(of(*[1] * 8, 0, 0), of(*[1] * 10))
    assert found.value == 0.8
    assert found.low == pytest.approx(0.490, abs=0.02)
    assert found.high == pytest.approx(0.943, abs=0.01)
    assert found.low <= 0.490


def test_copies_of_a_case_tell_nothing_new() -> None:
    single = statistics.share(of(1, 1, 0, 1), of(1, 1, 1, 1))
    copied = statistics.share(of(8, 8, 0, 8), of(8, 8, 8, 8))
    assert copied == single


def test_all_right_is_not_certain() -> None:
    found = statistics.share(of(4, 4, 4), of(4, 4, 4))
    assert (found.value, found.high) == (1, 1)
    assert 0.3 < found.low < 0.5  # three problems, not twelve cases


def test_no_cases() -> None:
    found = statistics.share(of(0), of(0))
    assert (found.low, found.high) == (0, 1)


def test_the_interval_covers_the_truth_for_clustered_cases() -> None:
    generator = np.random.default_rng(0)
    hit = 0
    for _ in range(300):
        chances = generator.beta(2, 1, 30)  # mean 2/3, problems differ much
        found = statistics.share(generator.binomial(8, chances).astype(np.float64), of(*[8] * 30))
        hit += found.low <= 2 / 3 <= found.high
    assert 0.90 < hit / 300 < 0.99


def test_the_bootstrap_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3, 1, 400)
    found = statistics.mean(values, np.ones(400))
    assert found.value == pytest.approx(values.mean())
    error = values.std(ddof=1) / 20
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)
    assert statistics.mean(values, np.ones(400)) == found
    zero = statistics.mean(of(0, 0), of(3, 5))
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)


def test_what_is_infinite_is_so_for_certain() -> None:
    broken = mean(np.array([1.0, np.inf]), np.ones(2))
    assert (broken.low, broken.high) == (np.inf, np.inf)
    assert at_most("x", broken, 5).outcome == FAIL
    nothing = mean(np.array([1.0, np.nan]), np.ones(2))
    assert at_most("x", nothing, 5).outcome == UNDECIDED


def test_mcnemar() -> None:
    first = np.array([True] * 5 + [False] + [True] * 10)
    second = np.array([False] * 5 + [True] + [True] * 10)
    assert statistics.mcnemar(first, second) == pytest.approx(2 * (1 + 6) / 2**6)
    assert statistics.mcnemar(first, first) == 1
    assert statistics.mcnemar(np.ones(10, bool), np.zeros(10, bool)) == pytest.approx(2**-9)


def test_three_outcomes() -> None:
    between = statistics.Interval(0.0, -0.1, 0.1)
    assert at_most("a", between, 0.1).outcome == "pass"
    assert at_most("a", between, -0.2).outcome == "fail"
    assert at_most("a", between, 0.0).outcome == "undecided"
    assert at_least("a", between, -0.1).outcome == "pass"
    assert at_least("a", between, 0.2).outcome == "fail"
    assert at_least("a", between, 0.0).outcome == "undecided"
    assert at_most("a", float("nan"), 0.0).outcome == "undecided"
    assert at_least("a", float("inf"), 3.0).outcome == "pass"
    assert enough("a", 3, 8).outcome == "undecided"


def test_one_failure_outweighs_everything() -> None:
    def check(outcome: str) -> Check:
        return Check("a", 0, 0, 0, 0, True, outcome)

    assert verdict([check("pass"), check("pass")]) == "pass"
    assert verdict([check("pass"), check("undecided")]) == "inconclusive"
    assert verdict([check("undecided"), check("fail")]) == "fail"
    assert verdict([]) == "inconclusive"
