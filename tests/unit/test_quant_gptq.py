"""GPTQ against a slow oracle in float64, its guard, its refit, and its edges."""

import math
from itertools import pairwise

import pytest
import torch

from tolerances import kernel
from zaya_quant import stats as stats_module
from zaya_quant.affine import INPUT_DTYPES, round_with_scales
from zaya_quant.methods import gptq, imatrix, rtn
from zaya_quant.qtensor import SCALE_DTYPES, QuantTensor, expand_groups
from zaya_quant.spec import ALLOWED_BITS, QuantSpec
from zaya_quant.stats import InputStats

INT4 = QuantSpec(4, 32)
SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits in ALLOWED_BITS
    for group in (16, 32, 128, -1)
    for symmetric in (True, False)
]
SOME_SPECS = [
    QuantSpec(2, 16),
    QuantSpec(3, -1, symmetric=False),
    INT4,
    QuantSpec(4, 32, symmetric=False, scale_dtype="bfloat16"),
    QuantSpec(8, 128, scale_dtype="float32"),
]


def start_of(weight, spec, stats):
    """What GPTQ starts from: rounding to nearest on scales searched under damped moments."""
    weigh = InputStats(stats.count, stats.second_moment + stats.factor().damping)
    return imatrix.quantize(weight, spec, weigh)


def label(value):
    return value.label if isinstance(value, QuantSpec) else None


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_refit(monkeypatch):
    monkeypatch.setattr(gptq, "_REFITS", 0)


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def inputs(columns: int, rows: int, seed: int = 0) -> torch.Tensor:
    """Rows of strongly correlated channels of different size: few directions, and some noise."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(max(1, columns // 8), columns, generator=generator)
    x = torch.randn(rows, len(mixed), generator=generator) @ mixed
    x += 0.1 * torch.randn(rows, columns, generator=generator)
    return x * (0.1 + 2 * torch.rand(columns, generator=generator))


def stats_of(x: torch.Tensor) -> InputStats:
    hessian = x.t() @ x / len(x)
    return InputStats(len(x), hessian.diagonal().clone(), hessian)


def damped(stats: InputStats) -> torch.Tensor:
    """The Hessian that counts, float64."""
    assert stats.hessian is not None
    hessian = stats.hessian.double()
    damping = stats_module._DAMPING * float(hessian.diagonal().mean())
    return hessian + damping * torch.eye(len(hessian), dtype=torch.float64)


def row_errors(weight, found: QuantTensor, stats: InputStats) -> torch.Tensor:
    error = weight.double() - found.dequantize().double()
    return ((error @ damped(stats)) * error).sum(dim=1)


def slack(weight, found: QuantTensor, stats: InputStats) -> torch.Tensor:
    """How far off an error of a row may be that was summed up in float32."""
    error = (weight.double() - found.dequantize().double()).abs()
    terms = ((error @ damped(stats).abs()) * error).sum(dim=1)
    return kernel(torch.float32, 2 * weight.shape[1]) * terms


def same(left: QuantTensor, right: QuantTensor) -> bool:
    zeros = left.zeros is right.zeros or torch.equal(left.zeros, right.zeros)
    return torch.equal(left.codes, right.codes) and torch.equal(left.scales, right.scales) and zeros


def solved_anew(weight: torch.Tensor, start: QuantTensor, stats: InputStats) -> torch.Tensor:
    """GPTQ's codes from its definition, on the scales and zero points of ``start``.

    With e the errors made so far, on columns F, what is left of the quadratic e H e^T is smallest
    when the columns R to come are w_R + e_F H_FR inverse(H_RR). No Cholesky factor, no updates:
    this is solved from scratch for every column, from the float weights.
    """
    hessian = damped(stats)
    order = sorted(range(len(hessian)), key=lambda c: -float(stats.hessian[c, c]))
    hessian = hessian[order][:, order]
    exact = weight.double()[:, order]
    columns = weight.shape[1]
    scales = expand_groups(start.scales.double(), start.spec, columns)[:, order]
    zeros = torch.zeros_like(scales)
    if start.zeros is not None:
        zeros = expand_groups(start.zeros.double(), start.spec, columns)[:, order]
    codes, error = torch.zeros_like(exact), torch.zeros_like(exact)
    for k in range(columns):
        pull = torch.linalg.solve(hessian[k:, k:], hessian[:k, k:].t()).t()[:, 0]
        wanted = exact[:, k] + error[:, :k] @ pull
        codes[:, k] = (torch.round(wanted / scales[:, k]) + zeros[:, k]).clamp(
            start.spec.qmin, start.spec.qmax
        )
        error[:, k] = exact[:, k] - (codes[:, k] - zeros[:, k]) * scales[:, k]
    result = torch.empty_like(start.codes)
    result[:, order] = codes.to(result.dtype)
    return result


@pytest.mark.usefixtures("no_refit")
@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
@pytest.mark.parametrize(("columns", "seen"), [(130, 400), (80, 20)])
def test_codes_are_those_of_solving_for_the_other_columns_again_and_again(spec, columns, seen):
    weight, stats = normal(40, columns), stats_of(inputs(columns, seen))
    start = start_of(weight, spec, stats)
    expected = solved_anew(weight, start, stats)
    oracle = QuantTensor(expected, start.scales, start.zeros, spec)
    # The guard has nothing to do: the oracle is better in every row.
    assert (row_errors(weight, oracle, stats) < row_errors(weight, start, stats)).all()
    found = gptq.quantize(weight, spec, stats)
    assert torch.equal(found.scales, start.scales)
    # A near tie that falls the other way in float32 changes the rest of its row.
    assert (found.codes == expected).all(dim=1).float().mean() >= 0.9


@pytest.mark.parametrize("spec", SPECS, ids=label)
@pytest.mark.parametrize(("rows", "columns"), [(9, 80), (1, 70), (4, 1), (3, 17)])
def test_no_row_ends_worse_than_rounded_to_nearest(spec, rows, columns):
    weight = normal(rows, columns, seed=columns)
    stats = stats_of(inputs(columns, max(1, columns // 2), seed=spec.bits))
    nearest = start_of(weight, spec, stats)
    found = gptq.quantize(weight, spec, stats)
    found.validate_codes()
    allowed = slack(weight, nearest, stats) + slack(weight, found, stats)
    assert (row_errors(weight, found, stats) <= row_errors(weight, nearest, stats) + allowed).all()


@pytest.mark.parametrize("value", [1e9, math.inf, math.nan])
def test_the_guard_keeps_rows_that_fed_back_errors_would_spoil(monkeypatch, value):
    weight, stats = normal(6, 64), stats_of(inputs(64, 100))
    good = gptq._Problem.round

    def half_spoilt(self, start):
        codes, errors = good(self, start)
        codes[::2] = start.spec.qmin
        errors[::2] = value
        return codes, errors

    nearest, expected = start_of(weight, INT4, stats), gptq.quantize(weight, INT4, stats)
    monkeypatch.setattr(gptq, "_REFITS", 0)
    unspoilt = gptq.quantize(weight, INT4, stats)
    monkeypatch.setattr(gptq._Problem, "round", half_spoilt)
    found = gptq.quantize(weight, INT4, stats)
    assert torch.equal(found.codes[::2], nearest.codes[::2])
    assert torch.equal(found.codes[1::2], unspoilt.codes[1::2])
    assert not torch.equal(expected.codes[::2], nearest.codes[::2])


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_on_correlated_inputs_most_of_the_error_goes(spec):
    weight, stats = normal(24, 96), stats_of(inputs(96, 200))
    blind = row_errors(weight, rtn.quantize(weight, spec), stats)
    found = row_errors(weight, gptq.quantize(weight, spec, stats), stats)
    assert found.sum() < 0.3 * blind.sum()  # 0.06 to 0.2


@pytest.mark.usefixtures("no_refit")
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_without_correlation_it_is_rounding_to_nearest(spec):
    weight, moments = normal(12, 80), inputs(80, 50).square().mean(dim=0)
    stats = InputStats(50, moments, torch.diag(moments))
    assert same(gptq.quantize(weight, spec, stats), start_of(weight, spec, stats))


@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_refits_never_raise_an_error(monkeypatch, spec):
    weight, stats = normal(24, 80), stats_of(inputs(80, 60))
    errors = []
    for refits in (0, 1, 4):
        monkeypatch.setattr(gptq, "_REFITS", refits)
        found = gptq.quantize(weight, spec, stats)
        assert found.scales.dtype == SCALE_DTYPES[spec.scale_dtype]
        errors.append((row_errors(weight, found, stats), slack(weight, found, stats)))
    for (before, loose), (after, tight) in pairwise(errors):
        assert (after <= before + loose + tight).all()
    if spec.symmetric:
        assert errors[1][0].sum() < errors[0][0].sum()


@pytest.mark.parametrize(("group", "columns"), [(16, 80), (32, 80), (-1, 33)])
def test_refitted_scales_solve_the_least_squares_problem_of_their_codes(group, columns):
    spec = QuantSpec(4, group, scale_dtype="float32")
    weight, stats = normal(10, columns), stats_of(inputs(columns, 2 * columns))
    start = start_of(weight, spec, stats)
    problem = gptq._Problem(weight, stats.factor(), spec, gptq._damped(stats))
    found = problem.refit(start)
    # |L^T (w - Q s)| is smallest, L L^T the damped Hessian.
    root = torch.linalg.cholesky(damped(stats)).t()
    length = spec.group_length(columns)
    for row in range(len(weight)):
        columns_of = torch.zeros(columns, spec.groups(columns), dtype=torch.float64)
        for c in range(columns):
            columns_of[c, c // length] = float(start.codes[row, c])
        goal = root @ weight[row].double()
        expected = torch.linalg.lstsq(root @ columns_of, goal[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-7)


def test_a_group_of_zero_codes_keeps_its_scale_when_refitted():
    """Any scale fits it, but later codes may not be zeros."""
    weight, stats = normal(10, 80), stats_of(inputs(80, 100))
    start = start_of(weight, INT4, stats)
    start.codes[:, 32:64] = 0
    found = gptq._Problem(weight, stats.factor(), INT4, gptq._damped(stats)).refit(start)
    assert torch.equal(found[:, 1], start.scales[:, 1])
    assert not torch.equal(found[:, 0], start.scales[:, 0])


@pytest.mark.parametrize("spoiler", [100.0, math.nan])
def test_the_guard_keeps_rows_that_a_refit_would_spoil(monkeypatch, spoiler):
    weight, stats = normal(6, 64), stats_of(inputs(64, 100))
    expected = gptq.quantize(weight, INT4, stats)
    monkeypatch.setattr(gptq, "_REFITS", 0)
    without = gptq.quantize(weight, INT4, stats)
    known = gptq._Problem.refit

    def half_spoilt(self, value):
        scales = known(self, value)
        scales[::2] *= spoiler
        return scales

    monkeypatch.setattr(gptq, "_REFITS", 1)
    monkeypatch.setattr(gptq._Problem, "refit", half_spoilt)
    found = gptq.quantize(weight, INT4, stats)
    assert torch.equal(found.scales[::2], without.scales[::2])
    assert torch.equal(found.scales[1::2], expected.scales[1::2])
    assert not torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_codes_are_rounded_on_the_scales_stored(monkeypatch, scale_dtype):
    """Rounding refitted scales may spoil them, so they are rounded first."""
    used = []
    known = gptq._Problem.round

    def listening(self, start):
        used.append(start.scales)
        return known(self, start)

    monkeypatch.setattr(gptq._Problem, "round", listening)
    spec = QuantSpec(4, 32, scale_dtype=scale_dtype)
    found = gptq.quantize(normal(8, 64), spec, stats_of(inputs(64, 100)))
    assert len(used) == 2
    assert {scales.dtype for scales in used} == {SCALE_DTYPES[scale_dtype]}
    first, refitted = used
    assert ((found.scales == first) | (found.scales == refitted)).all()
    assert torch.isfinite(found.scales).all()


@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_rounding_knows_the_error_it_ends_with(spec):
    """The errors it sums up on its way are those of the result under the damped Hessian."""
    weight, stats = normal(24, 130), stats_of(inputs(130, 60))
    problem = gptq._Problem(weight, stats.factor(), spec, gptq._damped(stats))
    start = start_of(weight, spec, stats)
    codes, errors = problem.round(start)
    found = QuantTensor(codes, start.scales, start.zeros, spec)
    expected = row_errors(weight, found, stats)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(problem.errors(found).double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", ALLOWED_BITS)
def test_zero_points_stay_as_searched(bits):
    spec = QuantSpec(bits, 32, symmetric=False)
    weight, stats = normal(12, 80), stats_of(inputs(80, 100))
    weight[::2] = weight[::2].abs()  # zero points at the bottom
    found = gptq.quantize(weight, spec, stats)
    nearest = start_of(weight, spec, stats)
    assert torch.equal(found.zeros, nearest.zeros)
    assert not torch.equal(found.codes, nearest.codes)


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_groups_of_zeros_stay_exactly_zero(spec):
    """Though the errors of other columns pull at them."""
    stats = stats_of(inputs(160, 200))
    weight = normal(6, 160)
    length = spec.group_length(160)
    weight[2] = 0
    weight[::2, :length] = 0
    found = gptq.quantize(weight, spec, stats)
    found.validate_codes()
    values = found.dequantize()
    assert not values[2].any()
    assert not values[::2, :length].any()
    assert values[1].any()


@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_dead_inputs_are_rounded_to_nearest(spec):
    """Nothing is known of them, but at inference they may be alive."""
    x = inputs(160, 300)
    x[:, 32:64] = 0
    x[:, 3::7] = 0
    weight, stats = normal(12, 160), stats_of(x)
    found = gptq.quantize(weight, spec, stats)
    nearest = round_with_scales(weight, found.scales, found.zeros, spec)
    dead = stats.second_moment == 0
    assert torch.equal(found.codes[:, dead], nearest[:, dead])
    assert not torch.equal(found.codes, nearest)


@pytest.mark.usefixtures("no_refit")
@pytest.mark.parametrize("bits", ALLOWED_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_dead_inputs_is_rounded_by_weight_alone(bits, symmetric):
    """Nothing says that one of its weights matters more than another."""
    spec = QuantSpec(bits, 32, symmetric, scale_dtype="float32")
    x = inputs(96, 300)
    x[:, 32:64] = 0
    weight = normal(12, 96)
    found = gptq.quantize(weight, spec, stats_of(x)).dequantize()[:, 32:64]
    alone = rtn.quantize(weight[:, 32:64], spec).dequantize()
    assert torch.allclose(found, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_half_precision_weights_are_taken_as_the_floats_they_are(dtype, spec):
    weight, stats = normal(8, 80).to(dtype), stats_of(inputs(80, 100))
    expected = gptq.quantize(weight.float(), spec, stats)
    assert same(gptq.quantize(weight, spec, stats), expected)
    transposed = weight.t().contiguous().t()
    assert same(gptq.quantize(transposed, spec, stats), expected)


def test_a_matrix_without_rows_stays_one():
    stats = stats_of(inputs(64, 100))
    for spec in (INT4, QuantSpec(4, 32, symmetric=False)):
        assert gptq.quantize(torch.zeros(0, 64), spec, stats).shape == (0, 64)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_non_finite_weights_are_named(value, dtype):
    weight, stats = normal(5, 80).to(dtype), stats_of(inputs(80, 100))
    weight[3, 77] = value
    for spec in (INT4, QuantSpec(4, -1, symmetric=False)):
        with pytest.raises(ValueError, match="non-finite weight at row 3, column 77"):
            gptq.quantize(weight, spec, stats)


def test_a_scale_too_large_for_fp16_is_refused_as_by_rounding():
    weight, stats = normal(4, 80), stats_of(inputs(80, 100))
    weight[2, 40] = 1e6
    said = "no float16 scale is large enough for row 2, group 1; use scale_dtype bfloat16"
    for quantize in (rtn.quantize, gptq.quantize):
        with pytest.raises(ValueError, match=said):
            quantize(weight, INT4, stats)
    wide = QuantSpec(4, 32, scale_dtype="bfloat16")
    assert torch.isfinite(gptq.quantize(weight, wide, stats).dequantize()).all()


@pytest.mark.parametrize("stats", [None, InputStats(5, torch.ones(64))], ids=["none", "moments"])
def test_without_a_hessian_the_remedy_is_named(stats):
    with pytest.raises(ValueError, match="needs a Hessian; calibrate first, or use the method rtn"):
        gptq.quantize(normal(2, 64), INT4, stats)


@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_the_number_of_torch_threads_does_not_matter_to_small_matrices(spec):
    weight, x = normal(100, 128), inputs(128, 100)
    one = gptq.quantize(weight, spec, stats_of(x))
    stats = stats_of(x)
    torch.set_num_threads(2)
    assert same(gptq.quantize(weight, spec, stats), one)


@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_matrices_may_share_statistics(spec):
    up, gate, x = normal(20, 80), normal(31, 80, seed=1), inputs(80, 100)
    shared = stats_of(x)
    before = shared.hessian.clone()
    for weight in (up, gate, up):
        alone = gptq.quantize(weight, spec, stats_of(x))
        assert same(gptq.quantize(weight, spec, shared), alone)
    assert torch.equal(shared.hessian, before)
    # One under the other they are the same rows; products of another height may be summed
    # otherwise, so near ties may differ.
    both = gptq.quantize(torch.cat([up, gate]), spec, shared)
    rows = torch.cat([gptq.quantize(weight, spec, shared).codes for weight in (up, gate)])
    assert (both.codes == rows).all(dim=1).float().mean() >= 0.9


@pytest.mark.parametrize("tile", [1, 200, 1 << 18])
def test_tiles_do_not_matter(monkeypatch, tile):
    weight, stats = normal(20, 80), stats_of(inputs(80, 100))
    expected = gptq.quantize(weight, INT4, stats)
    monkeypatch.setattr(gptq, "_TILE", tile)
    found = gptq.quantize(weight, INT4, stats)
    assert (found.codes == expected.codes).all(dim=1).float().mean() >= 0.9


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_of_columns_do_not_matter(monkeypatch, block):
    weight, stats = normal(20, 80), stats_of(inputs(80, 100))
    expected = gptq.quantize(weight, INT4, stats)
    monkeypatch.setattr(gptq, "_BLOCK", block)
    found = gptq.quantize(weight, INT4, stats)
    assert (found.codes == expected.codes).all(dim=1).float().mean() >= 0.9


@pytest.mark.parametrize("power", [-30, 30])
@pytest.mark.parametrize("spec", SOME_SPECS, ids=label)
def test_only_the_proportions_of_a_hessian_count(spec, power):
    weight, stats = normal(12, 80), stats_of(inputs(80, 100))
    scaled = InputStats(9, stats.second_moment * 2.0**power, stats.hessian * 2.0**power)
    assert same(gptq.quantize(weight, spec, scaled), gptq.quantize(weight, spec, stats))
