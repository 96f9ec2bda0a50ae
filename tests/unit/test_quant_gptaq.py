"""GPTAQ: the weights it rounds towards, against plain least squares, and what that gains."""

import math
from dataclasses import fields
from functools import partial

import pytest
import torch

from zaya_quant.methods import gptaq, gptq
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import BLOCK_GRIDS, BlockSpec, QuantSpec, Spec
from zaya_quant.stats import InputStats

INT4 = QuantSpec(4, 32)
SOME_SPECS = [
    QuantSpec(2, 16),
    INT4,
    QuantSpec(3, -1, symmetric=False),
    QuantSpec(8, 128, scale_dtype="float32"),
    *(BlockSpec(type) for type in BLOCK_GRIDS),
]


def label(value):
    return value.label if isinstance(value, Spec) else None


def whole(columns: int, spec: Spec) -> int:
    """Columns for this spec: at least so many, and whole blocks."""
    size = 1 if isinstance(spec, QuantSpec) else spec.group_size
    return -(-columns // size) * size


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def drifted(columns: int, rows: int, drift: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs x [rows, in] of the quantized prefix, and r, what the float model has there.

    r has few directions and some noise; x is r, a linear error of it (what weights rounded once and
    for all make of it), and noise.
    """
    generator = torch.Generator().manual_seed(columns)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    few = max(1, columns // 4)
    r = draw(rows, few) @ draw(few, columns) / few**0.5 + 0.3 * draw(rows, columns)
    mixing = drift * draw(columns, columns) / columns**0.5
    x = r + r @ mixing - drift * r + 0.1 * drift * draw(rows, columns)
    return x, r


def stats_of(x: torch.Tensor, r: torch.Tensor | None = None) -> InputStats:
    hessian = x.t() @ x / len(x)
    drift = None if r is None else (r - x).t() @ x / len(x)
    return InputStats(len(x), hessian.diagonal().clone(), hessian, drift)


def output_error(weight: torch.Tensor, value: torch.Tensor, x, r) -> float:
    """mean |V x - W r|^2."""
    difference = x.double() @ value.double().t() - r.double() @ weight.double().t()
    return float(difference.square().sum(dim=1).mean())


def same(left: Quantized, right: Quantized) -> bool:
    def equal(name: str) -> bool:
        mine, other = getattr(left, name), getattr(right, name)
        return torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other

    return all(equal(field.name) for field in fields(left))


@pytest.mark.parametrize(("columns", "rows"), [(40, 200), (64, 30), (1, 5)])
def test_the_goal_is_the_damped_least_squares_solution(columns, rows):
    """min mean |T x - W r|^2 + damping |T - W|^2, as one tall system of equations."""
    weight, (x, r) = normal(12, columns), drifted(columns, rows)
    stats = stats_of(x, r)
    exact = weight.double()
    pull = math.sqrt(rows * stats.factor().damping) * torch.eye(columns, dtype=torch.float64)
    left = torch.cat([x.double(), pull])
    right = torch.cat([r.double() @ exact.t(), pull @ exact.t()])
    expected = torch.linalg.lstsq(left, right).solution.t()
    found = gptaq.corrected(weight, stats, 1.0)
    assert found.dtype == torch.float32
    change = (expected - exact).abs().max()
    assert change > 1e-4
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4 * float(change))


@pytest.mark.parametrize("strength", [0.25, 0.5, 0.75])
def test_strength_is_the_share_of_the_way(strength):
    weight, (x, r) = normal(12, 40), drifted(40, 200)
    stats = stats_of(x, r)
    whole = gptaq.corrected(weight, stats, 1.0) - weight
    part = gptaq.corrected(weight, stats, strength) - weight
    torch.testing.assert_close(part, strength * whole, rtol=0, atol=1e-7)
    default = gptaq.corrected(weight, stats)
    assert torch.equal(default, gptaq.corrected(weight, stats, gptaq.STRENGTH))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_drift_the_goal_is_the_weight(dtype):
    weight, (x, r) = normal(12, 40).to(dtype), drifted(40, 200)
    known = weight.clone()
    unmeasured, unmoved = stats_of(x), stats_of(x, x)
    for strength in (0.0, 0.5, 1.0):
        assert torch.equal(gptaq.corrected(weight, unmeasured, strength), weight.float())
        assert torch.equal(gptaq.corrected(weight, unmoved, strength), weight.float())
    assert torch.equal(gptaq.corrected(weight, stats_of(x, r), 0.0), weight.float())
    gptaq.corrected(weight, stats_of(x, r), 1.0)
    assert torch.equal(weight, known)


def test_a_drift_that_is_not_finite_is_left_out():
    weight, (x, r) = normal(4, 40), drifted(40, 200)
    for value in (math.nan, math.inf):
        stats = stats_of(x, r)
        stats.drift[3, 5] = value
        assert torch.equal(gptaq.corrected(weight, stats), weight)
        assert same(gptaq.quantize(weight, INT4, stats), gptq.quantize(weight, INT4, stats))


@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_without_drift_or_strength_it_is_gptq(monkeypatch, spec):
    columns = whole(80, spec)
    weight, (x, r) = normal(12, columns), drifted(columns, 200)
    expected = gptq.quantize(weight, spec, stats_of(x))
    assert same(gptaq.quantize(weight, spec, stats_of(x)), expected)
    assert not same(gptaq.quantize(weight, spec, stats_of(x, r)), expected)
    monkeypatch.setattr(gptaq, "corrected", partial(gptaq.corrected, strength=0.0))
    assert same(gptaq.quantize(weight, spec, stats_of(x, r)), expected)


@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
@pytest.mark.parametrize("strength", [gptaq.STRENGTH, 1.0])
def test_where_inputs_drift_the_output_comes_closer_to_the_float_model(monkeypatch, spec, strength):
    columns = whole(96, spec)
    weight, (x, r) = normal(48, columns), drifted(columns, 600)
    stats = stats_of(x, r)
    blind = output_error(weight, gptq.quantize(weight, spec, stats).dequantize(), x, r)
    monkeypatch.setattr(gptaq, "corrected", partial(gptaq.corrected, strength=strength))
    aware = output_error(weight, gptaq.quantize(weight, spec, stats).dequantize(), x, r)
    print(spec.label, strength, aware / blind)
    assert aware < blind


def test_more_strength_brings_the_goal_closer_on_the_rows_it_was_made_of():
    weight, (x, r) = normal(48, 96), drifted(96, 600)
    stats = stats_of(x, r)
    errors = [
        output_error(weight, gptaq.corrected(weight, stats, strength), x, r)
        for strength in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("stats", [None, InputStats(5, torch.ones(64))], ids=["none", "moments"])
def test_without_a_hessian_the_remedy_is_named(stats):
    with pytest.raises(ValueError, match="gptaq needs a Hessian; calibrate first, or use"):
        gptaq.quantize(normal(2, 64), INT4, stats)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_named(value):
    """Although the correction spreads them over their rows."""
    weight, (x, r) = normal(5, 80), drifted(80, 200)
    weight[3, 77] = value
    for stats in (stats_of(x), stats_of(x, r)):
        with pytest.raises(ValueError, match="non-finite weight at row 3, column 77"):
            gptaq.quantize(weight, INT4, stats)


@pytest.mark.parametrize("spec", [spec for spec in SOME_SPECS if spec.group_size <= 128], ids=label)
def test_the_number_of_torch_threads_does_not_matter_to_small_matrices(spec):
    columns = whole(80, spec)
    weight, (x, r) = normal(100, columns), drifted(columns, 200)
    stats = stats_of(x, r)
    one = gptaq.quantize(weight, spec, stats)
    torch.set_num_threads(2)
    again = InputStats(len(x), stats.second_moment, stats.hessian, stats.drift)
    assert same(gptaq.quantize(weight, spec, again), one)
