"""Timing calls in turn, and what came of it."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """

    name: str
    kind: str
    seconds: float
    fastest: float
    slowest: float
    gigabytes: float
    gigaops: float
    share: float | None = None


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


def rotate(calls: Sequence[Sequence[Call]], rounds: int) -> list[list[float]]:
    """Seconds of every call of each column; a column runs after the other, round after round."""
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for column, own in enumerate(calls):
            time.sleep(_SETTLE)
            taken = [seconds(call) for _ in range(-(-_CALLS // len(own))) for call in own]
            if turn:  # the first is for warming up
                samples[column] += taken
    return samples


def run(case: Case, rounds: int) -> Measured:
    """Measure a case."""
    samples = rotate([contender.calls for contender in case.contenders], rounds)
    figures = [_figure(c, own, case) for c, own in zip(case.contenders, samples, strict=True)]
    limits = [figure for figure in figures if figure.kind == CEILING]
    reads = [figure.seconds for figure in limits if not figure.gigaops]
    if limits:  # a read is compared by time, a product by speed
        figures = [
            replace(f, share=reads[0] / f.seconds if reads
                    else f.gigaops / max(limit.gigaops for limit in limits))
            if f.kind != CEILING else f
            for f in figures
        ]  # fmt: skip
    return Measured(case.name, case.bytes, case.operations, figures, case.notes)


def machine(threads: int) -> dict[str, Any]:
    """What the figures are of."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "load": list(os.getloadavg()),
    }


def _figure(contender: Contender, samples: list[float], case: Case) -> Figure:
    ordered = sorted(samples)
    median, tenth = statistics.median(ordered), len(ordered) // 10
    computes = contender.operations is not None
    operations = case.operations if contender.kind != CEILING else contender.operations or 0
    return Figure(
        contender.name, contender.kind, median, ordered[tenth], ordered[-1 - tenth],
        0.0 if computes else case.bytes / median / 1e9, operations / median / 1e9,
    )  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
