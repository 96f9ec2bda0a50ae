"""Laws of ggml block types: native and reference bodies agree, and the search is worth its name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import QUALITY_SQNR_DB_BLOCKS
from zaya_quant import blocks, native
from zaya_quant.block_search import quantize_blocks, quantize_natively
from zaya_quant.methods import rtn
from zaya_quant.metrics import sqnr_db
from zaya_quant.qtensor import IQ4_NL_LEVELS, BlockTensor, Quantized
from zaya_quant.spec import BLOCK_GRIDS, BLOCK_TYPES, BlockSpec, spec_of_type

# Optional by design: without a compiler there is none, and the reference gives the same bytes.
needs_native = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
every_type = pytest.mark.parametrize("type", BLOCK_TYPES)
every_grid = pytest.mark.parametrize("type", BLOCK_GRIDS)
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
WHOLE = 256  # columns that are whole blocks of every type


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def weights(draw, spread=8.0):
    """Rows of very different magnitude; zeros, ties, runs of one sign, constant or tiny ones."""
    rows, columns = draw(st.integers(1, 5)), WHOLE * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 10 ** (spread * (torch.rand(rows, 1, generator=generator) - 0.5))
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    runs = weight.view(rows, -1, 32)
    kind = torch.randint(0, 8, runs.shape[:2], generator=generator)
    runs[kind == 0] = runs[kind == 0].abs()
    runs[kind == 1] = -runs[kind == 1].abs()
    runs[kind == 2] *= 1e-12
    runs[kind == 3] = runs[kind == 3][:, :1]
    tie = torch.rand(rows, columns, generator=generator) < 0.05
    weight = torch.where(tie, weight.abs().amax(1, keepdim=True) * weight.sign(), weight)
    return weight.to(draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))))


@st.composite
def importances(draw, columns):
    """None, or second moments, some channels dead."""
    if draw(st.booleans()):
        return None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    importance = torch.randn(columns, generator=generator).square() * 3e4
    dead = torch.rand(columns, generator=generator) < draw(st.sampled_from((0.0, 0.3, 1.0)))
    return importance.masked_fill(dead, 0)


def tensors(value: Quantized) -> list[torch.Tensor]:
    """All of a value; fp16 as bits, so that -0 and NaN would count."""
    found = [value.codes, value.scales]
    if isinstance(value, BlockTensor):
        found += [t for t in (value.offsets, value.sub_scales, value.sub_mins) if t is not None]
    return [t.view(torch.int16) if t.dtype == torch.float16 else t for t in found]


def same(left: Quantized, right: Quantized) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(left), tensors(right), strict=True))


def error(weight: torch.Tensor, found: Quantized, importance: torch.Tensor | None = None) -> float:
    square = (weight.double() - found.dequantize().double()).square()
    return float((square if importance is None else square * importance).sum())


@needs_native
@every_grid
@settings(max_examples=25, deadline=None)
@given(data=st.data(), weight=weights())
def test_native_equals_reference_on_every_instruction_set(type, data, weight):
    importance = data.draw(importances(weight.shape[1]))
    spec = BlockSpec(type)
    expected = quantize_blocks(weight, spec, importance)
    expected.validate_codes()
    assert torch.isfinite(expected.dequantize()).all()
    for isa in native.supported_isas():
        assert same(quantize_natively(weight, spec, importance, isa), expected), isa


@needs_native
@pytest.mark.parametrize("type", PLAIN)
@settings(max_examples=25, deadline=None)
@given(weight=weights())
def test_native_plain_rounding_equals_reference(type, weight):
    spec = spec_of_type(type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZAYA_QUANT_NATIVE", "0")
        expected = blocks.absmax(weight, spec)
    for isa in native.supported_isas():
        assert same(blocks.absmax_natively(weight, spec, isa), expected), isa


@every_grid
def test_a_large_weight_nobody_looks_at_may_become_zero(type):
    weight = torch.full((1, 256), 1e-9)
    weight[0, 5] = -600.0
    importance = torch.ones(256)
    importance[5] = 0
    found = quantize_blocks(weight, BlockSpec(type), importance)
    assert torch.isfinite(found.dequantize()).all()
    for isa in native.supported_isas():
        assert same(quantize_natively(weight, BlockSpec(type), importance, isa), found)


@pytest.mark.parametrize("type", [type for type, grid in BLOCK_GRIDS.items() if grid.codebook])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_halfway_between_two_levels_the_lower_is_taken(type, sign):
    """All levels, which count and so make the step 1, and all middles, which do not."""
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32)
    run = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, torch.zeros(1)])
    count = WHOLE // len(run)
    weight = sign * run.repeat(1, count)
    importance = torch.tensor([1.0] * 16 + [0.0] * 16).repeat(count)
    found = quantize_blocks(weight, BlockSpec(type), importance)
    expected = torch.tensor([*range(16), *range(15), IQ4_NL_LEVELS.index(1)]).repeat(1, count)
    assert bool((found.steps() == sign).all())
    assert torch.equal(found.codes.long(), expected)
    for isa in native.supported_isas():
        assert same(quantize_natively(weight, BlockSpec(type), importance, isa), found), isa


@needs_native
@every_grid
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e-6, 1e5, 1e8, 1e30, 1e38])
def test_native_equals_reference_at_extreme_magnitudes(type, scale):
    weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(3)).clamp(-3, 3) * scale
    spec = BlockSpec(type)
    try:
        expected = quantize_blocks(weight, spec)
    except ValueError as failure:
        for isa in native.supported_isas():
            with pytest.raises(ValueError, match=str(failure)):
                quantize_natively(weight, spec, isa=isa)
        return
    for isa in native.supported_isas():
        assert same(quantize_natively(weight, spec, isa=isa), expected), isa


@needs_native
@every_type
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 4), count=st.integers(1, 3))
def test_both_bodies_pack_and_unpack_alike(type, seed, rows, count):
    size = BLOCK_TYPES[type][1] * count
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (rows, size), generator=generator).to(torch.uint8)
    values, packed = [], []
    with pytest.MonkeyPatch.context() as patch:
        for switch in ("1", "0"):
            patch.setenv("ZAYA_QUANT_NATIVE", switch)
            values.append(blocks.unpack(data, type))
            packed.append(blocks.pack(values[0]))
    assert same(*values)
    assert torch.equal(packed[0], data)
    assert torch.equal(packed[1], data)


@pytest.mark.parametrize("type", ["Q4_0", "Q5_0", "Q4_1", "Q5_1"])
@settings(max_examples=40, deadline=None)
@given(weight=weights(spread=2.0))
def test_search_is_never_worse_than_plain_rounding(type, weight):
    spec = spec_of_type(type)
    plain = error(weight, blocks.absmax(weight, spec))
    # The search compares float32 sums; the slack is their rounding.
    slack = float(weight.double().square().sum()) * 1e-12
    assert error(weight, rtn.quantize(weight, spec)) <= plain * (1 + 1e-5) + slack


@every_grid
@settings(max_examples=15, deadline=None)
@given(weight=weights(spread=1.0), power=st.sampled_from((-3, 1, 4)))
def test_scaling_by_a_power_of_two_scales_the_numbers(type, weight, power):
    weight = weight.float() * 64  # far from fp16's smallest numbers, where steps are no ratios
    runs = weight.view(len(weight), -1, 32)
    runs += 1e-2 * torch.arange(32) * weight.abs().amax()
    before, after = (rtn.quantize(w, BlockSpec(type)) for w in (weight, weight * 2.0**power))
    assert isinstance(before, BlockTensor)
    assert isinstance(after, BlockTensor)
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scales * 2.0**power, after.scales)
    for name in ("sub_scales", "sub_mins"):
        one, other = getattr(before, name), getattr(after, name)
        assert one is other or torch.equal(one, other)


@every_type
@settings(max_examples=10, deadline=None)
@given(weight=weights())
def test_rows_are_independent(type, weight):
    spec = spec_of_type(type)
    for quantize in (rtn.quantize, blocks.absmax):
        if quantize is blocks.absmax and not blocks.has_plain_rounding(spec):
            continue
        whole = quantize(weight, spec)
        for row in range(len(weight)):
            part = slice(row, row + 1)
            assert same(quantize(weight[part], spec), whole.rows(part))


@every_grid
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_importance_lowers_the_weighted_error(type, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16, 512, generator=generator)
    importance = torch.randn(512, generator=generator).square()
    blind = rtn.quantize(weight, BlockSpec(type))
    aware = rtn.quantize_searched(weight, BlockSpec(type), importance)
    assert error(weight, aware, importance) < error(weight, blind, importance)


@every_grid
def test_dead_channels_are_still_rounded(type):
    """What no input reaches today must not become garbage."""
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(512)
    importance[128:256] = 0
    found = rtn.quantize_searched(weight, BlockSpec(type), importance)
    dead = slice(128, 256)
    part = (weight[:, dead] - found.dequantize()[:, dead]).square().sum()
    assert part < 0.05 * weight[:, dead].square().sum()


@every_grid
def test_quality_on_normal_weights(type):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    found = rtn.quantize(weight if native.available()[0] else weight[:64], BlockSpec(type))
    assert sqnr_db(weight[: found.shape[0]], found.dequantize()) > QUALITY_SQNR_DB_BLOCKS[type]
