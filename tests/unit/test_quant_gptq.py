"""GPTQ against a slow oracle in float64, its guard, its refit, and its edges."""

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from tolerances import kernel
from zaya_quant import stats as stats_module
from zaya_quant.affine import INPUT_DTYPES
from zaya_quant.methods import gptq, imatrix, rtn
from zaya_quant.qtensor import SCALE_DTYPES, Quantized
from zaya_quant.spec import ALLOWED_BITS, BLOCK_GRIDS, BlockSpec, QuantSpec, Spec
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
BLOCKS = [BlockSpec(type) for type in BLOCK_GRIDS]
SMALL_BLOCKS = [spec for spec in BLOCKS if spec.group_size == 32]


def start_of(weight, spec, stats):
    """What GPTQ starts from: rounding to nearest on scales searched under damped moments."""
    weigh = InputStats(stats.count, stats.second_moment + stats.factor().damping)
    return imatrix.quantize(weight, spec, weigh)


def label(value):
    return value.label if isinstance(value, Spec) else None


def whole(columns: int, spec: Spec) -> int:
    """Columns for this spec: at least so many, and whole blocks."""
    return (
        columns if isinstance(spec, QuantSpec) else -(-columns // spec.group_size) * spec.group_size
    )


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


def large(rows: int, columns: int) -> torch.Tensor:
    """Weights for which Q6_K's d is a normal fp16 number, that a refit can change by little."""
    return 16 * normal(rows, columns)


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


def problem_of(weight: torch.Tensor, stats: InputStats) -> gptq._Problem:
    return gptq._Problem(weight, stats.factor(), gptq._damped(stats))


def row_errors(weight, found: Quantized, stats: InputStats) -> torch.Tensor:
    error = weight.double() - found.dequantize().double()
    return ((error @ damped(stats)) * error).sum(dim=1)


def slack(weight, found: Quantized, stats: InputStats) -> torch.Tensor:
    """How far off an error of a row may be that was summed up in float32."""
    error = (weight.double() - found.dequantize().double()).abs()
    terms = ((error @ damped(stats).abs()) * error).sum(dim=1)
    return kernel(torch.float32, 2 * weight.shape[1]) * terms


def same(left: Quantized, right: Quantized) -> bool:
    def equal(name: str) -> bool:
        mine, other = getattr(left, name), getattr(right, name)
        return torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other

    return all(equal(field.name) for field in fields(left))


def choices(value: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code [n], and the weights that it would mean [n, out, in], float64."""
    signed = value.codes.dtype == torch.int8
    codes = torch.arange(1 << value.spec.bits) - signed * (1 << (value.spec.bits - 1))
    tables = [
        replace(value, codes=torch.full_like(value.codes, int(c))).dequantize() for c in codes
    ]
    return codes, torch.stack(tables).double()


def nearest_codes(wanted: torch.Tensor, value: Quantized) -> torch.Tensor:
    """Of each weight [out, in] the code that means the nearest one, by trying them all."""
    codes, table = choices(value)
    return codes[(table - wanted.double()).abs().argmin(dim=0)].to(value.codes.dtype)


def solved_anew(weight: torch.Tensor, start: Quantized, stats: InputStats) -> torch.Tensor:
    """GPTQ's codes from its definition, on the grid of ``start``.

    With e the errors made so far, on columns F, what is left of the quadratic e H e^T is smallest
    when the columns R to come are w_R + e_F H_FR inverse(H_RR). No Cholesky factor, no updates:
    this is solved from scratch for every column, from the float weights.
    """
    hessian = damped(stats)
    order = sorted(range(len(hessian)), key=lambda c: -float(stats.hessian[c, c]))
    hessian = hessian[order][:, order]
    exact = weight.double()[:, order]
    all_codes, table = choices(start)
    codes, error = torch.empty_like(start.codes), torch.zeros_like(exact)
    for k, column in enumerate(order):
        pull = torch.linalg.solve(hessian[k:, k:], hessian[:k, k:].t()).t()[:, 0]
        wanted = exact[:, k] + error[:, :k] @ pull
        best = (table[:, :, column] - wanted).abs().argmin(dim=0)
        codes[:, column] = all_codes[best].to(codes.dtype)
        error[:, k] = exact[:, k] - table[best, torch.arange(len(exact)), column]
    return codes


@pytest.mark.usefixtures("no_refit")
@pytest.mark.parametrize(
    ("spec", "columns", "seen"),
    [(spec, *case) for spec in SOME_SPECS for case in ((130, 400), (80, 20))]
    + [(spec, whole(96, spec), 200) for spec in BLOCKS],
    ids=label,
)
def test_codes_are_those_of_solving_for_the_other_columns_again_and_again(spec, columns, seen):
    weight, stats = normal(40, columns), stats_of(inputs(columns, seen))
    start = start_of(weight, spec, stats)
    expected = solved_anew(weight, start, stats)
    oracle = replace(start, codes=expected)
    # The guard has nothing to do: the oracle is better in every row.
    assert (row_errors(weight, oracle, stats) < row_errors(weight, start, stats)).all()
    found = gptq.quantize(weight, spec, stats)
    assert same(replace(found, codes=start.codes), start)
    # A near tie that falls the other way in float32 changes the rest of its row.
    assert (found.codes == expected).all(dim=1).float().mean() >= 0.9


@pytest.mark.parametrize("spec", [*SPECS, *BLOCKS], ids=label)
@pytest.mark.parametrize(("rows", "columns"), [(9, 80), (1, 70), (4, 1), (3, 17)])
def test_no_row_ends_worse_than_rounded_to_nearest(spec, rows, columns):
    columns = whole(columns, spec)
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


@pytest.mark.parametrize("spec", [*SPECS, *BLOCKS], ids=label)
def test_on_correlated_inputs_most_of_the_error_goes(spec):
    columns = whole(96, spec)
    weight, stats = normal(24, columns), stats_of(inputs(columns, 2 * columns + 8))
    found = row_errors(weight, gptq.quantize(weight, spec, stats), stats)
    for blind in (rtn.quantize(weight, spec), start_of(weight, spec, stats)):
        assert found.sum() < 0.3 * row_errors(weight, blind, stats).sum()  # 0.06 to 0.2


@pytest.mark.usefixtures("no_refit")
@pytest.mark.parametrize("spec", [*SPECS, *BLOCKS], ids=label)
def test_without_correlation_it_is_rounding_to_nearest(spec):
    columns = whole(80, spec)
    weight, moments = normal(12, columns), inputs(columns, 50).square().mean(dim=0)
    stats = InputStats(50, moments, torch.diag(moments))
    assert same(gptq.quantize(weight, spec, stats), start_of(weight, spec, stats))


@pytest.mark.parametrize("spec", BLOCKS, ids=label)
def test_without_correlation_codes_are_the_nearest_of_all(spec):
    """Refitted or not: IQ4_NL's levels are no even steps, and scales may be negative."""
    columns = whole(96, spec)
    weight, moments = normal(12, columns), inputs(columns, 50).square().mean(dim=0)
    found = gptq.quantize(weight, spec, InputStats(50, moments, torch.diag(moments)))
    values = found.dequantize().double()
    nearest = replace(found, codes=nearest_codes(weight, found)).dequantize().double()
    missed, least = (values - weight).abs(), (nearest - weight).abs()
    assert (missed <= least + 1e-6 * weight.abs().max()).all()  # a tie may fall either way


@pytest.mark.parametrize("spec", [*SOME_SPECS, *BLOCKS], ids=label)
def test_refits_never_raise_an_error(monkeypatch, spec):
    columns = whole(80, spec)
    weight, stats = large(24, columns), stats_of(inputs(columns, 60))
    errors = []
    for refits in (0, 1, 4):
        monkeypatch.setattr(gptq, "_REFITS", refits)
        found = gptq.quantize(weight, spec, stats)
        errors.append((row_errors(weight, found, stats), slack(weight, found, stats)))
    for (before, loose), (after, tight) in pairwise(errors):
        assert (after <= before + loose + tight).all()
    # One number for 256 weights of Q6_K, or beside a zero point that stays: little to gain.
    if spec.symmetric if isinstance(spec, QuantSpec) else spec.type != "Q6_K":
        assert errors[1][0].sum() < errors[0][0].sum()


def directions(value: Quantized, row: int) -> torch.Tensor:
    """What a row's weights are made of: [in, numbers], its scales and offsets times these.

    Weights are linear in either, so each is the row with that one 1 and every other 0.
    """
    names = [name for name in ("scales", "offsets") if getattr(value, name, None) is not None]
    one, found = value.rows(slice(row, row + 1)), []
    nothing = {name: torch.zeros_like(getattr(one, name)) for name in names}
    for name in names:
        for index in range(nothing[name].shape[1]):
            unit = nothing[name].clone()
            unit[0, index] = 1
            found.append(replace(one, **(nothing | {name: unit})).dequantize()[0].double())
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("spec", "columns"),
    [(QuantSpec(4, group, scale_dtype="float32"), n) for group, n in ((16, 80), (32, 80), (-1, 33))]
    + [(QuantSpec(4, 32, symmetric=False, scale_dtype="float32"), 80)]
    + [(spec, 2 * spec.group_size) for spec in BLOCKS],
    ids=label,
)
def test_refitted_numbers_solve_the_least_squares_problem_of_their_codes(spec, columns):
    weight, stats = large(10, columns), stats_of(inputs(columns, 2 * columns))
    start = start_of(weight, spec, stats)
    found = problem_of(weight, stats).refit(start)
    # |L^T (w - Q s)| is smallest, L L^T the damped Hessian.
    root = torch.linalg.cholesky(damped(stats)).t()
    numbers = gptq._numbers(found).double()
    for row in range(len(weight)):
        system, goal = root @ directions(start, row), root @ weight[row].double()
        expected = torch.linalg.lstsq(system, goal[:, None]).solution[:, 0]
        precise = {"rtol": 1e-4, "atol": 1e-7}
        close = precise if isinstance(spec, QuantSpec) else {"rtol": 2.0**-10, "atol": 2.0**-24}
        torch.testing.assert_close(numbers[row], expected, **close)


def test_a_group_of_zero_codes_keeps_its_scale_when_refitted():
    """Any scale fits it, but later codes may not be zeros."""
    weight, stats = normal(10, 80), stats_of(inputs(80, 100))
    start = start_of(weight, INT4, stats)
    start.codes[:, 32:64] = 0
    found = problem_of(weight, stats).refit(start).scales
    assert torch.equal(found[:, 1], start.scales[:, 1])
    assert not torch.equal(found[:, 0], start.scales[:, 0])


@pytest.mark.parametrize("spec", [INT4, BlockSpec("Q4_K"), BlockSpec("IQ4_NL")], ids=label)
@pytest.mark.parametrize("spoiler", [100.0, math.nan])
def test_the_guard_keeps_rows_that_a_refit_would_spoil(monkeypatch, spec, spoiler):
    columns = whole(64, spec)
    weight, stats = normal(6, columns), stats_of(inputs(columns, 100))
    expected = gptq.quantize(weight, spec, stats)
    monkeypatch.setattr(gptq, "_REFITS", 0)
    without = gptq.quantize(weight, spec, stats)
    known = gptq._Problem.refit

    def half_spoilt(self, value):
        found = known(self, value)
        found.scales[::2] *= spoiler
        return found

    monkeypatch.setattr(gptq, "_REFITS", 1)
    monkeypatch.setattr(gptq._Problem, "refit", half_spoilt)
    found = gptq.quantize(weight, spec, stats)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    assert same(found.rows(even), without.rows(even))
    assert same(found.rows(odd), expected.rows(odd))
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


@pytest.mark.parametrize("spec", [*SOME_SPECS, *BLOCKS], ids=label)
def test_rounding_knows_the_error_it_ends_with(spec):
    """The errors it sums up on its way are those of the result under the damped Hessian."""
    columns = whole(130, spec)
    weight, stats = normal(24, columns), stats_of(inputs(columns, 60))
    problem = problem_of(weight, stats)
    start = start_of(weight, spec, stats)
    codes, errors = problem.round(start)
    found = replace(start, codes=codes)
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


@pytest.mark.parametrize("type", [type for type, grid in BLOCK_GRIDS.items() if grid.sub_bits])
def test_the_integers_of_super_blocks_stay_as_searched(type):
    spec = BlockSpec(type)
    weight, stats = large(12, 512), stats_of(inputs(512, 600))
    found, nearest = gptq.quantize(weight, spec, stats), start_of(weight, spec, stats)
    assert torch.equal(found.sub_scales, nearest.sub_scales)
    assert spec.grid.symmetric or torch.equal(found.sub_mins, nearest.sub_mins)
    assert not torch.equal(found.codes, nearest.codes)
    assert not torch.equal(found.scales, nearest.scales)


@pytest.mark.parametrize("spec", [*SPECS, *BLOCKS], ids=label)
def test_groups_of_zeros_stay_exactly_zero(spec):
    """Though the errors of other columns pull at them."""
    blocks = isinstance(spec, BlockSpec)
    columns = 2 * spec.group_size if blocks else 160
    stats = stats_of(inputs(columns, 200))
    weight = normal(6, columns)
    length = spec.group_size if blocks else spec.group_length(columns)
    weight[2] = 0
    weight[::2, :length] = 0
    found = gptq.quantize(weight, spec, stats)
    found.validate_codes()
    values = found.dequantize()
    assert not values[2].any()
    assert not values[::2, :length].any()
    assert values[1].any()


@pytest.mark.parametrize("spec", [*SOME_SPECS, *BLOCKS], ids=label)
def test_dead_inputs_are_rounded_to_nearest(spec):
    """Nothing is known of them, but at inference they may be alive."""
    columns = whole(160, spec)
    x = inputs(columns, 300)
    x[:, 32:64] = 0
    x[:, 3::7] = 0
    weight, stats = normal(12, columns), stats_of(x)
    found = gptq.quantize(weight, spec, stats)
    nearest = nearest_codes(weight, found)
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
@pytest.mark.parametrize("spec", [*SOME_SPECS, *BLOCKS], ids=label)
def test_half_precision_weights_are_taken_as_the_floats_they_are(dtype, spec):
    columns = whole(80, spec)
    weight, stats = normal(8, columns).to(dtype), stats_of(inputs(columns, 100))
    expected = gptq.quantize(weight.float(), spec, stats)
    assert same(gptq.quantize(weight, spec, stats), expected)
    transposed = weight.t().contiguous().t()
    assert same(gptq.quantize(transposed, spec, stats), expected)


@pytest.mark.parametrize("spec", [INT4, QuantSpec(4, 32, symmetric=False), *BLOCKS], ids=label)
def test_a_matrix_without_rows_stays_one(spec):
    columns = whole(64, spec)
    stats = stats_of(inputs(columns, 100))
    assert gptq.quantize(torch.zeros(0, columns), spec, stats).shape == (0, columns)


@pytest.mark.parametrize("spec", BLOCKS, ids=label)
def test_rows_of_broken_blocks_are_refused(spec):
    columns = spec.group_size + 16
    with pytest.raises(ValueError, match=f"{columns} columns are no whole number of"):
        gptq.quantize(normal(4, columns), spec, stats_of(inputs(columns, 100)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_non_finite_weights_are_named(value, dtype):
    for spec in (INT4, QuantSpec(4, -1, symmetric=False), BlockSpec("Q4_1"), BlockSpec("Q6_K")):
        columns = whole(80, spec)
        weight, stats = normal(5, columns).to(dtype), stats_of(inputs(columns, 100))
        weight[3, 77] = value
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


@pytest.mark.parametrize("spec", [*SOME_SPECS, *SMALL_BLOCKS], ids=label)
def test_the_number_of_torch_threads_does_not_matter_to_small_matrices(spec):
    weight, x = normal(100, 128), inputs(128, 100)
    one = gptq.quantize(weight, spec, stats_of(x))
    stats = stats_of(x)
    torch.set_num_threads(2)
    assert same(gptq.quantize(weight, spec, stats), one)


@pytest.mark.parametrize("spec", [*SOME_SPECS, *BLOCKS], ids=label)
def test_matrices_may_share_statistics(spec):
    columns = whole(80, spec)
    up, gate, x = normal(20, columns), normal(31, columns, seed=1), inputs(columns, 100)
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
@pytest.mark.parametrize("spec", [*SOME_SPECS, *BLOCKS], ids=label)
def test_only_the_proportions_of_a_hessian_count(spec, power):
    columns = whole(80, spec)
    weight, stats = normal(12, columns), stats_of(inputs(columns, 100))
    scaled = InputStats(9, stats.second_moment * 2.0**power, stats.hessian * 2.0**power)
    assert same(gptq.quantize(weight, spec, scaled), gptq.quantize(weight, spec, stats))
