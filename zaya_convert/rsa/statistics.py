"""Intervals and tests over problems: candidates of one problem are alike, so problems are drawn.

* The bootstrap draws problems with replacement (the cluster bootstrap of Davison & Hinkley,
  Bootstrap Methods and Their Application, 1997, section 3.8) and takes percentiles.
* The interval of a share is Wilson's (1927) with the effective sample size n = p(1 - p) / v, v
  being the variance of the mean over problems (Korn & Graubard, 1998): it does not shrink to
  nothing where all candidates are right.
* McNemar's test is the exact one: of the pairs that differ, a binomial with p = 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of 95 %
_DRAWS = 4000
_FEW = 1e-12


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(hits: Values, counts: Values) -> Interval:
    """The share of hits, and its Wilson interval over problems.

    Args:
        hits, counts: of each problem.
    """
    total = float(counts.sum())
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    p, problems = float(hits.sum()) / total, len(counts)
    n = float(problems)
    if problems > 1:
        # linearised variance of a ratio: residuals of the problems
        residuals = (hits - p * counts) / total
        variance = float((residuals**2).sum()) * problems / (problems - 1)
        if variance > _FEW:
            # a share that hardly varies between problems tells no more than all its candidates
            n = min(p * (1 - p) / variance, total)
    z2 = _Z * _Z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, min(max(middle - half, 0.0), p), max(min(middle + half, 1.0), p))


def bootstrap(columns: Sequence[Values], statistic: Callable[..., Values]) -> Interval:
    """A statistic of sums over problems, and its bootstrap interval, the same for the same sums.

    One that is infinite is so for certain, one that is nan could be anything.

    Args:
        columns: numbers of each problem.
        statistic: given the sums of the columns, for many draws at once.
    """
    table = np.stack(columns, axis=1)
    value = float(statistic(*table.sum(0)))
    generator = np.random.default_rng(0)
    weights = generator.multinomial(len(table), np.full(len(table), 1 / len(table)), _DRAWS)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = statistic(*(weights @ table).T)
    drawn = drawn[np.isfinite(drawn)]
    if math.isinf(value):
        return Interval(value, value, value)
    if math.isnan(value) or not len(drawn):
        return Interval(value, -math.inf, math.inf)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value, float(low), float(high))


def mean(values: Values, counts: Values) -> Interval:
    """The mean over everything counted, and its bootstrap interval over problems.

    Args:
        values: sums of each problem.
        counts: how many terms these sums have.
    """
    return bootstrap([values, counts], lambda total, n: total / n)


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """The two-sided exact p-value for two ways to decide the same cases."""
    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    differ = only_first + only_second
    if differ == 0:
        return 1.0
    tail = sum(math.comb(differ, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**differ)
