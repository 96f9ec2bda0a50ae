"""Timing calls in turn, and what came of it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

Call = Callable[[], object]

# Seconds. Threads of other libraries spin for more work, and would be in the next one's way.
_SETTLE = 0.02
_CALLS = 5  # of a contender before the next one's turn, at least

OURS, PEER, CEILING = "ours", "peer", "ceiling"


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: for people.
        calls: made one after the other, each on other weights, so that no cache holds them.
        kind: ``OURS``, ``PEER`` or ``CEILING``.
        operations: of one call, where they are not the case's (a ceiling that computes).
    """

    name: str
    calls: Sequence[Call]
    kind: str = OURS
    operations: int | None = None


@dataclass(frozen=True)
class Case:
    """What several ways compute.

    Attributes:
        name: for people.
        bytes: of weights that one call reads.
        operations: multiplications and additions of one call.
        contenders: ways to compute it.
        notes: peers that could not take part, and why.
    """

    name: str
    bytes: int
    operations: int
    contenders: Sequence[Contender]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """How long a contender took.

    Attributes:
        seconds: of a call, the median.
        fastest: of a call, the tenth percentile.
        slowest: of a call, the ninetieth percentile.
        gigabytes: of weights a second.
        gigaops: multiplications and additions a second, in 10⁹.
        share: of what a pure read of the same bytes takes (decode), or of the fastest dense product
            measured beside it (prefill); None without such a ceiling.
        times: how many times as long as the first contender it took.

    The last two are medians over rounds, in each of which everything ran, one after the other: a
    machine is at times faster and at times slower.
    """

    name: str
    kind: str
    seconds: float
    fastest: float
    slowest: float
    gigabytes: float
    gigaops: float
    share: float | None
    times: float


@dataclass(frozen=True)
class Measured:
    """A case and its figures, in the order of its contenders."""

    name: str
    bytes: int
    operations: int
    figures: Sequence[Figure]
    notes: Sequence[str] = ()


def seconds(call: Call) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rotate(calls: Sequence[Sequence[Call]], rounds: int) -> list[list[list[float]]]:
    """Seconds of every call, by column and round; a column runs after the other in each round."""
    samples: list[list[list[float]]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for column, own in enumerate(calls):
            time.sleep(_SETTLE)
            taken = [seconds(call) for _ in range(-(-_CALLS // len(own))) for call in own]
            if turn:  # the first is for warming up
                samples[column].append(taken)
    return samples


def run(case: Case, rounds: int) -> Measured:
    """Measure a case."""
    samples = rotate([contender.calls for contender in case.contenders], rounds)
    medians = [[statistics.median(taken) for taken in column] for column in samples]
    ceiling = _ceiling(case, medians)
    figures: list[Figure] = []
    for contender, taken, own in zip(case.contenders, samples, medians, strict=True):
        ordered = sorted(chain.from_iterable(taken))
        median, tenth = statistics.median(ordered), len(ordered) // 10
        is_limit = contender.kind == CEILING
        operations = contender.operations or 0 if is_limit else case.operations
        figures.append(Figure(
            contender.name, contender.kind, median, ordered[tenth], ordered[-1 - tenth],
            0.0 if contender.operations is not None else case.bytes / median / 1e9,
            operations / median / 1e9,
            None if is_limit or ceiling is None else _ratio(ceiling, own),
            _ratio(own, medians[0]),
        ))  # fmt: skip
    return Measured(case.name, case.bytes, case.operations, figures, case.notes)


def _ceiling(case: Case, medians: Sequence[Sequence[float]]) -> list[float] | None:
    """Seconds of each round that the case would take at its ceiling; None without one."""
    limits = [
        # A read takes as long; a product of other operations is as fast.
        [taken * case.operations / (contender.operations or case.operations) for taken in own]
        for contender, own in zip(case.contenders, medians, strict=True)
        if contender.kind == CEILING
    ]
    return [min(taken) for taken in zip(*limits, strict=True)] if limits else None


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def machine(threads: int) -> dict[str, Any]:
    """What the figures are of."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "load": list(os.getloadavg()),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
