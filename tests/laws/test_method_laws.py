"""Laws of every method in the table: what comes out whatever goes in, and what stats they need."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_quant import blocks
from zaya_quant.affine import absmax_scales, round_with_scales
from zaya_quant.methods import METHODS, method
from zaya_quant.qtensor import SCALE_DTYPES, Quantized, QuantTensor
from zaya_quant.spec import ALLOWED_BITS, BLOCK_GRIDS, BlockSpec, QuantSpec, Spec
from zaya_quant.stats import InputStats

NEEDS = ("", "second_moment", "hessian", "drift")
SPECS = [
    QuantSpec(2, 16),
    QuantSpec(3, 32, scale_dtype="float32"),
    QuantSpec(4, 32),
    QuantSpec(4, -1, scale_dtype="bfloat16"),
    QuantSpec(4, 32, symmetric=False),
    QuantSpec(8, 128),
    BlockSpec("Q4_1"),
    BlockSpec("Q4_K"),
    BlockSpec("Q6_K"),
    BlockSpec("IQ4_NL"),
    BlockSpec("IQ4_XS"),
]
every_method = pytest.mark.parametrize("name", METHODS)
# all but plain rounding itself
searching = pytest.mark.parametrize("name", [name for name in METHODS if name != "absmax"])
needy = pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.needs])
several_specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
roundable_specs = pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if blocks.has_plain_rounding(spec)], ids=lambda spec: spec.label
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def specs(draw):
    if draw(st.booleans()):
        return BlockSpec(draw(st.sampled_from(tuple(BLOCK_GRIDS))))
    return QuantSpec(
        bits=draw(st.sampled_from(ALLOWED_BITS)),
        group_size=draw(st.sampled_from((16, 32, 128, -1))),
        symmetric=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(tuple(SCALE_DTYPES))),
    )


def whole(columns: int, spec: Spec) -> int:
    """Columns for this spec: at least so many, and whole blocks."""
    size = 1 if isinstance(spec, QuantSpec) else spec.group_size
    return -(-columns // size) * size


def weight_of(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of different magnitude; some elements zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 10 ** (2 * torch.rand(rows, 1, generator=generator) - 3)
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    return weight


def stats_of(columns: int, seen: int, seed: int, dead: float = 0.0) -> InputStats:
    """Statistics of correlated inputs that drift a little; a share of them is always 0."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(max(1, columns // 6), columns, generator=generator)
    r = torch.randn(seen, len(mixed), generator=generator) @ mixed
    r += 0.2 * torch.randn(seen, columns, generator=generator)
    r *= torch.rand(columns, generator=generator) >= dead
    x = r * (0.9 + 0.1 * torch.rand(columns, generator=generator))
    hessian = x.t() @ x / seen
    return InputStats(seen, hessian.diagonal().clone(), hessian, (r - x).t() @ x / seen)


def without_drift(stats: InputStats) -> InputStats:
    return InputStats(stats.count, stats.second_moment, stats.hessian)


def same(left: Quantized, right: Quantized) -> bool:
    """Every number equal as bits."""

    def equal(name: str) -> bool:
        mine, other = getattr(left, name), getattr(right, name)
        if not isinstance(mine, torch.Tensor):
            return mine == other
        return mine.dtype == other.dtype and torch.equal(
            *(t.view(torch.uint8) for t in (mine, other))
        )

    return all(equal(field.name) for field in fields(left))


def plain_rounding(weight: torch.Tensor, spec: Spec) -> Quantized:
    if isinstance(spec, BlockSpec):
        return blocks.absmax(weight, spec)
    scales = absmax_scales(weight, spec).to(SCALE_DTYPES[spec.scale_dtype])
    zeros = None
    if not spec.symmetric:
        columns = weight.shape[1]
        length = spec.group_length(columns)
        padding = (0, spec.groups(columns) * length - columns)
        low = torch.nn.functional.pad(weight, padding).unflatten(1, (-1, length)).amin(dim=2)
        zeros = torch.round(-low.clamp_max(0) / scales.float()).nan_to_num(0)
        zeros = zeros.clamp(0, spec.qmax).to(torch.uint8)
    return QuantTensor(round_with_scales(weight, scales, zeros, spec), scales, zeros, spec)


def what_counts(name: str, stats: InputStats) -> torch.Tensor:
    """The Hessian under which a method makes errors small, float64."""
    assert stats.hessian is not None
    identity = torch.eye(len(stats.hessian), dtype=torch.float64)
    if METHODS[name].needs == "":
        return identity
    if METHODS[name].needs == "second_moment":
        return torch.diag(stats.second_moment.double())
    return stats.hessian.double() + stats.factor().damping * identity


def error(weight: torch.Tensor, found: Quantized, hessian: torch.Tensor) -> float:
    difference = weight.double() - found.dequantize().double()
    return float(((difference @ hessian) * difference).sum())


@every_method
def test_a_row_of_the_table_names_a_function_and_a_known_need(name):
    row = METHODS[name]
    assert row.needs in NEEDS
    assert row.on_prefix is (row.needs in ("hessian", "drift"))
    assert method(name).__module__ == row.module


@settings(max_examples=40, deadline=None)
@given(
    spec=specs(),
    rows=st.integers(1, 9),
    columns=st.integers(1, 100),
    seen=st.integers(1, 60),
    dead=st.sampled_from((0.0, 0.3, 1.0)),
    seed=st.integers(0, 2**31),
)
@every_method
def test_results_are_valid_and_repeat_themselves(name, spec, rows, columns, seen, dead, seed):
    """Few rows, dead inputs, single columns, short last groups: nothing stops a method."""
    columns = whole(columns, spec)
    weight, stats = weight_of(rows, columns, seed), stats_of(columns, seen, seed, dead)
    known = weight.clone()
    found = method(name)(weight, spec, stats)
    assert found.spec == spec
    assert found.shape == (rows, columns)
    found.validate_codes()
    assert torch.isfinite(found.dequantize()).all()
    again = method(name)(weight, spec, stats_of(columns, seen, seed, dead))
    assert same(found, again)
    assert torch.equal(weight, known)


@searching
@roundable_specs
def test_the_error_a_method_minds_is_below_that_of_plain_rounding(name, spec):
    """Without drift, since plain rounding does not aim at the float model's outputs either.

    Of the whole matrix: the search goes by the channels' own errors, and the guard by the search.
    """
    columns = whole(100, spec)
    weight, stats = weight_of(24, columns, 0), without_drift(stats_of(columns, 150, 0))
    hessian = what_counts(name, stats)
    plain = error(weight, plain_rounding(weight, spec), hessian)
    assert error(weight, method(name)(weight, spec, stats), hessian) < plain


@every_method
@several_specs
def test_what_a_method_does_not_need_may_be_missing(name, spec):
    columns = whole(80, spec)
    weight, stats = weight_of(6, columns, 1), stats_of(columns, 100, 1)
    enough = {
        "": None,
        "second_moment": InputStats(100, stats.second_moment),
        "hessian": without_drift(stats),
        "drift": stats,
    }[METHODS[name].needs]
    assert same(method(name)(weight, spec, enough), method(name)(weight, spec, stats))
    if METHODS[name].needs == "drift":  # "a Hessian, and the drift if there is any"
        method(name)(weight, spec, without_drift(stats)).validate_codes()


@needy
@several_specs
def test_what_a_method_needs_it_uses(name, spec):
    columns = whole(80, spec)
    weight = weight_of(16, columns, 2)
    one, other = (method(name)(weight, spec, stats_of(columns, 100, seed)) for seed in (2, 3))
    assert not torch.equal(one.codes, other.codes)


@needy
@several_specs
def test_missing_statistics_are_refused_and_the_remedy_named(name, spec):
    columns = whole(80, spec)
    weight, stats = weight_of(4, columns, 4), stats_of(columns, 100, 4)
    lacking = [None]
    if METHODS[name].needs != "second_moment":
        lacking.append(InputStats(100, stats.second_moment))
    for too_little in lacking:
        with pytest.raises(ValueError, match=f"{name} needs .*; calibrate first"):
            method(name)(weight, spec, too_little)


@every_method
@several_specs
def test_bfloat16_weights_are_taken_as_the_floats_they_are(name, spec):
    columns = whole(80, spec)
    weight, stats = weight_of(8, columns, 5), without_drift(stats_of(columns, 100, 5))
    weight = weight.to(torch.bfloat16)
    found = method(name)(weight, spec, stats)
    assert same(found, method(name)(weight.float(), spec, stats))
