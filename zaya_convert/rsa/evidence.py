"""What teacher forcing showed, in figures: of a candidate beside the reference, and of an engine
beside our runtime on the same weights.

Divergence is judged on tokens that were generated, routing on all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zaya_convert.rsa import statistics
from zaya_convert.rsa.forced import Places, Reading
from zaya_convert.rsa.statistics import Interval
from zaya_convert.runtime.model import Evaluation

_FEW = 32  # tokens: of fewer no mean is shown
_CLASSES = 3  # that are named where divergence is concentrated
NOISE_FACTOR = 100  # ten times the amplitude: other orders of summation, other kernels
_LEAST_NOISE = 1e-14  # nats: what float64 leaves of a divergence of 0


@dataclass(frozen=True)
class ClassFigures:
    """Tokens that one layer sends to one class (expert -1: the skip expert)."""

    layer: int
    expert: int
    tokens: int
    kl: float
    times_others: float


@dataclass(frozen=True)
class Figures:
    """A reading in numbers. KL in nats, the others as shares.

    Attributes:
        kl_mean, kl_p99, kl_max, top1_agreement: of generated tokens.
        router_agreement, router_agreement_by_layer, skip_rate: of all tokens.
        kl_skipped, kl_not_skipped: mean over all tokens that the reference sends to the skip
            expert in some layer, and over the others; None where there are few.
        concentrated: the classes whose tokens diverge most, as multiples of all others.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    router_agreement: float
    router_agreement_by_layer: list[float]
    skip_rate: float
    kl_skipped: float | None
    kl_not_skipped: float | None
    concentrated: list[ClassFigures]


@dataclass(frozen=True)
class Excess:
    """A candidate's figures minus the yardstick's, intervals over problems: below 0 is better.

    Attributes:
        kl: mean KL.
        beyond: share of tokens beyond the yardstick's 99th percentile, minus 1 %.
        top1, router: shares that disagree.
        router_worst: of the layer where the excess is surest, and which layer it is.
        skipped: mean KL of tokens that take the skip expert; None where there are few.
    """

    kl: Interval
    beyond: Interval
    top1: Interval
    router: Interval
    router_worst: Interval
    router_worst_layer: int
    skipped: Interval | None


@dataclass(frozen=True)
class EngineFigures:
    """An engine beside our runtime in exact arithmetic, on the candidate's own weights.

    Attributes:
        kl_mean, kl_max: of all tokens.
        noise_p99: 99th percentile of KL that rounding in such arithmetic causes in our runtime.
        beyond: share of tokens whose KL is more than ``NOISE_FACTOR`` times that.
        router_agreement: share of equal choices.
        kl_skipped, kl_not_skipped: as in ``Figures``.
        first_column: the earliest position of a trace that is beyond; None when none is.
        first_layer: the first layer whose router differs there; None when no router does.
        whole_beyond: the same share when whole sequences run at once, without a cache; None when
            that was not asked.
    """

    kl_mean: float
    kl_max: float
    noise_p99: float
    beyond: Interval
    router_agreement: float
    kl_skipped: float | None
    kl_not_skipped: float | None
    first_column: int | None
    first_layer: int | None
    whole_beyond: float | None = None


def figures(reading: Reading, reference: Evaluation, places: Places, skip: int) -> Figures:
    """The numbers of a reading.

    Args:
        skip: the class of the skip expert, E.
    """
    generated = places.generated
    kl = reading.kl[generated]
    agreement = (reading.routes == reference.routes).double().mean(1)
    skipped = (reference.routes == skip).any(0)
    return Figures(
        kl_mean=float(kl.mean()),
        kl_p99=_p99(kl),
        kl_max=float(kl.max()),
        top1_agreement=float(reading.same_top1[generated].double().mean()),
        router_agreement=float(agreement.mean()),
        router_agreement_by_layer=agreement.tolist(),
        skip_rate=float((reading.routes == skip).double().mean()),
        kl_skipped=_mean(reading.kl[skipped]),
        kl_not_skipped=_mean(reading.kl[~skipped]),
        concentrated=_concentrated(reading.kl, reference.routes, skip),
    )


def excess(
    candidate: Reading, yardstick: Reading, reference: Evaluation, places: Places, skip: int
) -> Excess:
    """How much worse than the yardstick a candidate is, on the same tokens."""
    generated = places.generated
    threshold = _p99(yardstick.kl[generated])
    beyond = (candidate.kl > threshold).double() - 0.01
    top1 = yardstick.same_top1.double() - candidate.same_top1.double()
    differ = [(reading.routes != reference.routes).double() for reading in (candidate, yardstick)]
    router = differ[0] - differ[1]
    everywhere = torch.ones_like(generated)
    layers = [mean_over_problems(row, everywhere, places) for row in router]
    worst = max(range(len(layers)), key=lambda i: (layers[i].low, layers[i].value))
    difference = candidate.kl - yardstick.kl
    skipped = (reference.routes == skip).any(0)
    return Excess(
        kl=mean_over_problems(difference, generated, places),
        beyond=mean_over_problems(beyond, generated, places),
        top1=mean_over_problems(top1, generated, places),
        router=mean_over_problems(router.mean(0), everywhere, places),
        router_worst=layers[worst],
        router_worst_layer=worst,
        skipped=mean_over_problems(difference, skipped, places)
        if int(skipped.sum()) >= _FEW
        else None,
    )


def engine_figures(
    reading: Reading, own: Evaluation, noise: Reading, places: Places, skip: int
) -> EngineFigures:
    """What an engine adds to the weights it runs.

    Args:
        reading: of the engine, beside ``own``: our runtime on the same weights.
        noise: our runtime in arithmetic like the engine's, beside ``own``.
    """
    limit = NOISE_FACTOR * max(_p99(noise.kl), _LEAST_NOISE)
    beyond = reading.kl > limit
    first_column, first_layer = None, None
    if bool(beyond.any()):
        first_column = int(places.column[beyond].min())
        at = beyond & (places.column == first_column)
        usual = (noise.weights - own.weights).abs().amax(1)
        shift = (reading.weights[:, at] - own.weights[:, at]).abs().amax(1)
        moved = (reading.routes[:, at] != own.routes[:, at]).any(1)
        moved |= shift > NOISE_FACTOR**0.5 * usual  # KL grows with the square
        first_layer = int(moved.int().argmax()) if bool(moved.any()) else None
    skipped = (own.routes == skip).any(0)
    return EngineFigures(
        kl_mean=float(reading.kl.mean()),
        kl_max=float(reading.kl.max()),
        noise_p99=limit / NOISE_FACTOR,
        beyond=mean_over_problems(beyond.double(), torch.ones_like(beyond), places),
        router_agreement=float((reading.routes == own.routes).double().mean()),
        kl_skipped=_mean(reading.kl[skipped]),
        kl_not_skipped=_mean(reading.kl[~skipped]),
        first_column=first_column,
        first_layer=first_layer,
    )


def mean_over_problems(values: Tensor, among: Tensor, places: Places) -> Interval:
    """The mean of ``values [n]`` over the positions ``among``, its interval over problems."""
    problems = places.problem[among].numpy()
    sums = np.bincount(problems, weights=values[among].double().numpy()).astype(np.float64)
    counts = np.bincount(problems).astype(np.float64)
    there = counts > 0
    return statistics.mean(sums[there], counts[there])


def _concentrated(kl: Tensor, routes: Tensor, skip: int) -> list[ClassFigures]:
    """Where divergence is: a few classes whose tokens have most of it, compared with all others."""
    total, found = float(kl.sum()), list[ClassFigures]()
    if total <= 0:
        return []
    for layer, row in enumerate(routes):
        counts = torch.bincount(row, minlength=skip + 1)
        sums = torch.bincount(row, weights=kl, minlength=skip + 1)
        for index in range(skip + 1):
            count, inside = int(counts[index]), float(sums[index])
            rest = len(kl) - count
            if count < _FEW or rest < _FEW:
                continue
            others = max(total - inside, 0.0) / rest
            ratio = inside / count / others if others > 0 else float("inf")
            expert = -1 if index == skip else index
            found.append(ClassFigures(layer, expert, count, inside / count, ratio))
    return sorted(found, key=lambda row: -row.times_others)[:_CLASSES]


def _p99(values: Tensor) -> float:
    # numpy's, because torch's quantile has a limit of 16 million values
    return float(np.quantile(values.numpy(), 0.99))


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) >= _FEW else None


def share_beyond(reading: Reading, noise_p99: float) -> float:
    """The share of tokens beyond the noise, without an interval."""
    limit = NOISE_FACTOR * noise_p99
    return float((reading.kl > limit).double().mean())
