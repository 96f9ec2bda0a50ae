"""Named bounds, and what figures make of them: pass, fail, or undecided.

A figure with an interval passes when all of the interval keeps the bound, fails when none of it
does, and is undecided between. One failure fails the test; without one, anything undecided makes it
inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from zaya_convert.rsa.statistics import Interval

PASS, FAIL, UNDECIDED = "pass", "fail", "undecided"
INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Bounds:
    """Limits; None takes the yardstick's figure in its place. KL in nats, the others as shares.

    Attributes:
        max_kl, max_kl_p99, min_top1, min_router: of the candidate beside the reference.
        margin: most that accuracy and agreement may fall short.
        min_sqnr_db: of every tensor: with less it is another one, since even one bit a weight
            keeps 4.4 dB (the error of the best two-level quantizer of a normal variable, Max 1960).
        max_gain: how far from 1 the gain of a row may be: quantizers keep what a row is, within
            7 % at 4 bits.
        max_beyond: share of tokens on which an engine may differ from our runtime on the same
            weights by more than rounding explains.
        router_slack: share of choices that may differ beyond the yardstick's on average, twice that
            in one layer. It leaves routers, norms, embedding and head alone, a candidate need not.
        min_problems, min_tokens: with less evidence nothing is decided.
    """

    max_kl: float | None = None
    max_kl_p99: float | None = None
    min_top1: float | None = None
    min_router: float | None = None
    margin: float = 0.05
    min_sqnr_db: float = 3.0
    max_gain: float = 0.3
    max_beyond: float = 0.01
    router_slack: float = 0.01
    min_problems: int = 8
    min_tokens: int = 1000


@dataclass(frozen=True)
class Check:
    """One bound and how it turned out.

    Attributes:
        value, low, high: the figure and its interval; equal when it has none.
        limit: what it is held against.
        above: whether it has to be at least the limit, rather than at most.
    """

    name: str
    value: float
    low: float
    high: float
    limit: float
    above: bool
    outcome: str

    def line(self) -> str:
        """For people."""
        mark = {PASS: "ok  ", FAIL: "FAIL", UNDECIDED: "?   "}[self.outcome]
        word = "at least" if self.above else "at most"
        if math.isnan(self.value):
            return f"{mark} {self.name}: nothing to judge it by ({word} {_short(self.limit)})"
        interval = "" if self.low == self.high else f" [{_short(self.low)}, {_short(self.high)}]"
        return f"{mark} {self.name}: {_short(self.value)}{interval} ({word} {_short(self.limit)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < math.inf else f"{value:.3g}"


def at_most(name: str, found: Interval | float, limit: float) -> Check:
    """The figure must not exceed the limit; NaN is undecided."""
    value, low, high = _parts(found)
    outcome = PASS if high <= limit else FAIL if low > limit else UNDECIDED
    return Check(name, value, low, high, limit, False, outcome)


def at_least(name: str, found: Interval | float, limit: float) -> Check:
    """The figure must reach the limit; NaN is undecided."""
    value, low, high = _parts(found)
    outcome = PASS if low >= limit else FAIL if high < limit else UNDECIDED
    return Check(name, value, low, high, limit, True, outcome)


def enough(name: str, found: float, least: float) -> Check:
    """There must be so much evidence, or nothing is decided."""
    outcome = PASS if found >= least else UNDECIDED
    return Check(name, found, found, found, least, True, outcome)


def verdict(checks: Sequence[Check]) -> str:
    """ "pass", "fail" or "inconclusive"."""
    outcomes = {check.outcome for check in checks}
    if FAIL in outcomes:
        return FAIL
    return INCONCLUSIVE if UNDECIDED in outcomes or not outcomes else PASS


def _parts(found: Interval | float) -> tuple[float, float, float]:
    if isinstance(found, Interval):
        return found.value, found.low, found.high
    return found, found, found
