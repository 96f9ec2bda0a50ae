"""Laws of every method in the table: what comes out whatever goes in, and what stats they need."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_quant.affine import absmax_scales, round_with_scales
from zaya_quant.methods import METHODS, method
from zaya_quant.qtensor import SCALE_DTYPES, QuantTensor
from zaya_quant.spec import ALLOWED_BITS, QuantSpec
from zaya_quant.stats import InputStats

NEEDS = ("", "second_moment", "hessian", "drift")
SPECS = [
    QuantSpec(2, 16),
    QuantSpec(3, 32, scale_dtype="float32"),
    QuantSpec(4, 32),
    QuantSpec(4, -1, scale_dtype="bfloat16"),
    QuantSpec(4, 32, symmetric=False),
    QuantSpec(8, 128),
]
every_method = pytest.mark.parametrize("name", METHODS)
needy = pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.needs])
several_specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def specs(draw):
    return QuantSpec(
        bits=draw(st.sampled_from(ALLOWED_BITS)),
        group_size=draw(st.sampled_from((16, 32, 128, -1))),
        symmetric=draw(st.booleans()),
        scale_dtype=draw(st.sampled_from(tuple(SCALE_DTYPES))),
    )


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


def same(left: QuantTensor, right: QuantTensor) -> bool:
    """Codes equal, scales equal as bits."""
    scales = (left.scales, right.scales)
    bits = [s.view(torch.int32 if s.dtype == torch.float32 else torch.int16) for s in scales]
    zeros = left.zeros is right.zeros or torch.equal(left.zeros, right.zeros)
    return torch.equal(left.codes, right.codes) and torch.equal(*bits) and zeros


def plain_rounding(weight: torch.Tensor, spec: QuantSpec) -> QuantTensor:
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


def error(weight: torch.Tensor, found: QuantTensor, hessian: torch.Tensor) -> float:
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


@every_method
@several_specs
def test_the_error_a_method_minds_is_below_that_of_plain_rounding(name, spec):
    """Without drift, since plain rounding does not aim at the float model's outputs either.

    Of the whole matrix: the search goes by the channels' own errors, and the guard by the search.
    """
    weight, stats = weight_of(24, 100, 0), without_drift(stats_of(100, 150, 0))
    hessian = what_counts(name, stats)
    plain = error(weight, plain_rounding(weight, spec), hessian)
    assert error(weight, method(name)(weight, spec, stats), hessian) < plain


@every_method
@several_specs
def test_what_a_method_does_not_need_may_be_missing(name, spec):
    weight, stats = weight_of(6, 80, 1), stats_of(80, 100, 1)
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
def test_what_a_method_needs_it_uses(name):
    weight, spec = weight_of(16, 80, 2), QuantSpec(4, 32)
    one, other = (method(name)(weight, spec, stats_of(80, 100, seed)) for seed in (2, 3))
    assert not torch.equal(one.codes, other.codes)


@needy
@several_specs
def test_missing_statistics_are_refused_and_the_remedy_named(name, spec):
    weight, stats = weight_of(4, 80, 4), stats_of(80, 100, 4)
    lacking = [None]
    if METHODS[name].needs != "second_moment":
        lacking.append(InputStats(100, stats.second_moment))
    for too_little in lacking:
        with pytest.raises(ValueError, match=f"{name} needs .*; calibrate first"):
            method(name)(weight, spec, too_little)


@every_method
def test_bfloat16_weights_are_taken_as_the_floats_they_are(name):
    weight, stats = weight_of(8, 80, 5).to(torch.bfloat16), without_drift(stats_of(80, 100, 5))
    for spec in SPECS:
        found = method(name)(weight, spec, stats)
        assert same(found, method(name)(weight.float(), spec, stats))
