"""ggml block types: bytes by hand, and against the gguf package."""

import math

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_quant import blocks
from zaya_quant.block_search import SEARCHES, quantize_blocks
from zaya_quant.methods import absmax, imatrix, rtn
from zaya_quant.qtensor import IQ4_NL_LEVELS, BlockTensor, Quantized, QuantTensor
from zaya_quant.spec import (
    BLOCK_GRIDS,
    BLOCK_TYPES,
    CANONICAL,
    BlockSpec,
    QuantSpec,
    fitting,
    holding_type,
    spec_of_type,
)
from zaya_quant.stats import InputStats

PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
every_type = pytest.mark.parametrize("type", BLOCK_TYPES)


@pytest.fixture(params=["native", "reference"], autouse=True)
def body(request, monkeypatch):
    """Both bodies; without the library the first is the second."""
    monkeypatch.setenv("ZAYA_QUANT_NATIVE", "1" if request.param == "native" else "0")


def gguf_quantized(weight: torch.Tensor, type: str) -> torch.Tensor:
    return torch.from_numpy(quants.quantize(weight.float().numpy(), GGMLQuantizationType[type]))


def normal(rows: int = 8, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def random_bytes(type: str, rows: int = 20, count: int = 2, seed: int = 0) -> torch.Tensor:
    size = BLOCK_TYPES[type][1] * count
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, size), generator=generator).to(torch.uint8)


# ---- one block of each type, written by hand ----------------------------------------------------

HALF = {1.0: "003c", -1.0: "00bc", 0.5: "0038", 0.25: "0034", -2.0: "00c0"}
NIBBLES = bytes(j * 0x11 for j in range(16)).hex()  # u = 0..15 in both halves
# of eight scales and minima: the low six bits of the first four below the top two of the last four
SUB_SCALES = (1, 2, 3, 4, 0b010001, 0b100010, 0b110011, 0b111111)
SUB_MINS = (5, 6, 7, 8, 0b010010, 0b100001, 0b110010, 0b111110)
SUB_BYTES = "4182c3c44586c7c8211223ef"
# + 32: low bits 0 .. 15, those above 0 1 2 3  1 2 3 0  2 3 0 1  3 0 1 2
SIXTEEN_SCALES = [j + 16 * ((j + j // 4) % 4) - 32 for j in range(16)]


def halves(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float16)


def row(values: object, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([list(values)], dtype=dtype)  # type: ignore[call-overload]


def canonical(type: str, codes: object, scale: float) -> QuantTensor:
    return QuantTensor(row(codes, torch.int8), halves(scale), None, CANONICAL[type])


def block(type: str, codes: object, scale: float, *rest: torch.Tensor | None) -> BlockTensor:
    """``rest``: offsets, sub_scales, sub_mins."""
    dtype = torch.int8 if BLOCK_GRIDS[type].signed else torch.uint8
    offsets, scales, minima = (*rest, None, None, None)[:3]
    return BlockTensor(row(codes, dtype), halves(scale), offsets, scales, minima, BlockSpec(type))


def by_group(codes: object, length: int) -> list[int]:
    """Every code ``length`` times."""
    return [code for code in codes for _ in range(length)]  # type: ignore[attr-defined]


SIX = row(SUB_SCALES, torch.uint8), row(SUB_MINS, torch.uint8)
BY_HAND: dict[str, tuple[Quantized, str]] = {
    "Q4_0": (canonical("Q4_0", [*range(-8, 8)] * 2, 1.0), HALF[1.0] + NIBBLES),
    "Q4_1": (
        block("Q4_1", [*range(16)] * 2, 0.5, halves(-2.0)),
        HALF[0.5] + HALF[-2.0] + NIBBLES,
    ),
    # u = 0..31: the upper sixteen have the fifth bit
    "Q5_0": (canonical("Q5_0", range(-16, 16), -1.0), HALF[-1.0] + "0000ffff" + NIBBLES),
    "Q5_1": (
        block("Q5_1", range(32), 0.25, halves(1.0)),
        HALF[0.25] + HALF[1.0] + "0000ffff" + NIBBLES,
    ),
    "Q8_0": (
        canonical("Q8_0", range(-16, 16), 1.0),
        HALF[1.0] + bytes([*range(240, 256), *range(16)]).hex(),
    ),
    # u of the eight 32s: low bits 0 1 2 3 and 3 2 1 0, high ones 0 1 0 1 1 0 1 0, upwards
    "Q3_K": (
        block("Q3_K", by_group((u - 4 for u in (0, 5, 2, 7, 7, 2, 5, 0)), 32), 1.0, None,
              row(SIXTEEN_SCALES, torch.int8)),
        "5a" * 32 + "e4" * 32 + "1b" * 32 + "8091a2b3c4d5e6f7" + "e4394e93" + HALF[1.0],
    ),
    # all codes of sub-group g are g; two sub-groups share 32 bytes
    "Q4_K": (
        block("Q4_K", by_group(range(8), 32), 0.5, halves(1.0), *SIX),
        HALF[0.5] + HALF[1.0] + SUB_BYTES + "".join(f"{b}" * 32 for b in ("10", "32", "54", "76")),
    ),
    # the codes of odd sub-groups have the fifth bit: 0xaa
    "Q5_K": (
        block("Q5_K", by_group((0, 17, 2, 19, 4, 21, 6, 23), 32), 0.5, halves(1.0), *SIX),
        HALF[0.5] + HALF[1.0] + SUB_BYTES + "aa" * 32
        + "".join(f"{b}" * 32 for b in ("10", "32", "54", "76")),
    ),
    # u = 16 q + 4 h + q in quarter q of half h; quarters q and q + 2 share 32 bytes
    "Q6_K": (
        block("Q6_K", by_group((16 * q + 4 * h + q - 32 for h in (0, 1) for q in range(4)), 32),
              1.0, None, row(range(-8, 8), torch.int8)),
        "20" * 32 + "31" * 32 + "64" * 32 + "75" * 32 + "e4" * 64
        + "f8f9fafbfcfdfeff0001020304050607" + HALF[1.0],
    ),
    "IQ4_NL": (block("IQ4_NL", [*range(16)] * 2, 1.0), HALF[1.0] + NIBBLES),
    # sub_scale + 32: low bits 8 .. 15, those above 3 0 1 2 2 1 0 3
    "IQ4_XS": (
        block("IQ4_XS", [*range(16)] * 16, 0.5, None,
              row((24, -23, -6, 11, 12, -3, -18, 31), torch.int8)),
        HALF[0.5] + "93c6" + "98badcfe" + NIBBLES * 8,
    ),
}  # fmt: skip


@every_type
def test_bytes_by_hand(type):
    value, expected = BY_HAND[type]
    packed = blocks.pack(value)
    assert packed.numpy().tobytes().hex() == expected
    assert packed.shape == (1, blocks.row_bytes(type, value.shape[1]))
    back = blocks.unpack(packed, type)
    assert back.spec == value.spec
    assert torch.equal(back.codes, value.codes)
    assert torch.equal(back.dequantize(), value.dequantize())


def test_values_by_hand():
    values = {type: value.dequantize()[0] for type, (value, _) in BY_HAND.items()}
    assert values["Q4_0"][[0, 15]].tolist() == [-8, 7]
    assert values["Q4_1"][[0, 15]].tolist() == [-2, 5.5]
    assert values["Q5_0"][[0, 31]].tolist() == [16, -15]
    assert values["Q5_1"][[0, 31]].tolist() == [1, 8.75]
    # d s k - dmin n, sub-groups 1 and 7
    assert values["Q4_K"][[32, 224]].tolist() == [0.5 * 2 * 1 - 6, 0.5 * 63 * 7 - 62]
    assert values["Q5_K"][[32, 224]].tolist() == [0.5 * 2 * 17 - 6, 0.5 * 63 * 23 - 62]
    assert values["Q6_K"][[0, 255]].tolist() == [-8 * -32, 7 * (16 * 3 + 4 + 3 - 32)]
    assert values["Q3_K"][[0, 255]].tolist() == [-32 * -4, 15 * -4]
    assert values["IQ4_NL"][:16].tolist() == list(IQ4_NL_LEVELS)
    assert values["IQ4_XS"][:16].tolist() == [0.5 * 24 * level for level in IQ4_NL_LEVELS]
    assert values["IQ4_XS"][255] == 0.5 * 31 * 113


# ---- against the gguf package -------------------------------------------------------------------


@every_type
def test_all_bytes_are_valid_and_survive(type):
    data = random_bytes(type)
    value = blocks.unpack(data, type)
    value.validate_codes()
    assert torch.equal(blocks.pack(value), data)


@every_type
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the package's, at NaN
def test_dequantized_as_the_gguf_package_does(type):
    data = random_bytes(type, rows=200)
    expected = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[type]))
    found = blocks.unpack(data, type).dequantize()
    nan = expected.isnan()
    assert nan.any()  # scales are random fp16 bits
    assert torch.equal(found.isnan(), nan)
    same = found.view(torch.int32) == expected.view(torch.int32)
    assert bool((same | nan).all())


@pytest.mark.parametrize("type", PLAIN)
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    exponent=st.integers(-30, 12),
    kind=st.sampled_from(["normal", "halves", "ties", "one sign", "zeros"]),
)
def test_plain_rounding_as_the_gguf_package_does(type, seed, exponent, kind):
    weight = normal(4, 96, seed) * 50
    if kind == "halves":
        weight = (weight * 4).round() / 4
    if kind == "ties":
        weight = weight.sign() * 1.5
    if kind == "one sign":
        weight = weight.abs() + 1
    if kind == "zeros":
        weight[:, ::2] = 0
        weight[1] = 0
    weight = weight * 2.0**exponent
    packed = blocks.pack(blocks.absmax(weight, spec_of_type(type)))
    assert torch.equal(packed, gguf_quantized(weight, type))


@pytest.mark.parametrize("type", PLAIN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_rounding_of_narrow_weights(type, dtype):
    weight = normal(5, 256).to(dtype)
    packed = blocks.pack(absmax.quantize(weight, spec_of_type(type)))
    assert torch.equal(packed, gguf_quantized(weight, type))


@pytest.mark.parametrize("type", PLAIN)
def test_scales_below_fp16_become_zero(type):
    # The package divides by zero here; the value is 0 either way.
    weight = normal(2, 64) * 1e-38
    found = blocks.absmax(weight, spec_of_type(type))
    assert not found.dequantize().any()


def test_zero_minima_have_no_sign():
    # Which of -0 and 0 is the smaller is nowhere defined, so the bytes must not depend on it.
    weight = torch.tensor([[-0.0, 0.0] * 16, [0.0, -0.0] * 16, [-0.0] * 32])
    found = blocks.absmax(weight, BlockSpec("Q4_1"))
    assert not blocks.pack(found).any()


# ---- grids that a block type holds ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "columns", "expected"),
    [
        (QuantSpec(4, 32), 96, "Q4_0"),
        (QuantSpec(2, 64), 96, "Q4_0"),
        (QuantSpec(3, -1), 96, "Q4_0"),
        (QuantSpec(5, 128), 160, "Q5_0"),
        (QuantSpec(6, 32), 32, "Q8_0"),
        (QuantSpec(8, -1), 64, "Q8_0"),
        (QuantSpec(4, 32), 80, ""),
        (QuantSpec(4, 16), 96, ""),
        (QuantSpec(4, 48), 96, ""),
        (QuantSpec(4, 32, symmetric=False), 96, ""),
        (QuantSpec(4, 32, scale_dtype="bfloat16"), 96, ""),
        (BlockSpec("Q4_K"), 512, "Q4_K"),
        (BlockSpec("Q4_K"), 384, ""),
        (BlockSpec("IQ4_NL"), 96, "IQ4_NL"),
    ],
    ids=str,
)
def test_which_type_holds_a_grid(spec, columns, expected):
    assert holding_type(spec, columns) == expected
    if isinstance(spec, BlockSpec) and not expected:
        with pytest.raises(ValueError, match="no whole number of Q4_K blocks"):
            rtn.quantize(normal(3, columns), spec)
        return
    value = rtn.quantize(normal(3, columns), spec)
    if not expected:
        with pytest.raises(ValueError, match="no block type holds"):
            blocks.pack(value)
        return
    held = blocks.unpack(blocks.pack(value), expected)
    assert torch.equal(held.codes, value.codes)
    assert torch.equal(held.dequantize(), value.dequantize())


@pytest.mark.parametrize("type", BLOCK_GRIDS)
def test_rows_of_broken_super_blocks_get_another_type(type):
    spec = BlockSpec(type)
    assert fitting(spec, 512) == spec
    other = fitting(spec, 288)
    assert holding_type(other, 288) == other.ggml_type
    assert (other == spec) is (spec.group_size == 32)
    assert other.bits >= spec.bits


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_rounding_of_other_grids(bits, symmetric):
    """The largest weight sets the scale, so no error exceeds half of it by more than fp16 does."""
    spec = QuantSpec(bits, 48, symmetric)
    weight = normal(6, 100)
    weight[2] = 0
    found = blocks.absmax(weight, spec)
    assert isinstance(found, QuantTensor)
    found.validate_codes()
    steps = found.scales.float().repeat_interleave(48, dim=1)[:, :100]
    error = (found.dequantize() - weight).abs()
    # Of an asymmetric range the zero point is rounded too.
    assert bool((error <= steps * (0.5 if symmetric else 1.0) * 1.1 + 1e-9).all())
    assert not found.dequantize()[2].any()


# ---- the search ----------------------------------------------------------------------------------


def test_what_a_grid_holds_is_found_exactly():
    for type in BLOCK_GRIDS:
        value, _ = BY_HAND[type]
        if BLOCK_GRIDS[type].sub_bits:
            continue  # constant sub-groups leave open how they are written
        assert torch.equal(rtn.quantize(value.dequantize(), value.spec).dequantize(),
                           value.dequantize())  # fmt: skip


@pytest.mark.parametrize("type", BLOCK_GRIDS)
def test_constant_blocks(type):
    for constant in (0.0, 0.75, -0.75):
        weight = torch.full((2, 256), constant)
        found = rtn.quantize(weight, BlockSpec(type)).dequantize()
        torch.testing.assert_close(found, weight, rtol=2.0**-10, atol=0)


@pytest.mark.parametrize("type", BLOCK_GRIDS)
def test_magnitudes(type):
    """From far below fp16 to the edge of what it can scale: finite, and never worse than zeros."""
    for scale in (1e-42, 1e-20, 1e-7, 1e-4, 1.0, 1e4):
        weight = normal(2, 512) * scale * 50
        found = rtn.quantize(weight, BlockSpec(type)).dequantize()
        assert torch.isfinite(found).all()
        assert (found - weight).double().square().sum() <= weight.double().square().sum()


def test_methods_take_block_types():
    stats = InputStats(1, torch.rand(256, generator=torch.Generator().manual_seed(0)))
    for type in BLOCK_GRIDS:
        spec = BlockSpec(type)
        weight = normal(2, 256)
        expected = quantize_blocks(weight, spec, stats.second_moment)
        found = imatrix.quantize(weight, spec, stats)
        assert torch.equal(blocks.pack(found), blocks.pack(expected))
        plain, searched = absmax.quantize(weight, spec), rtn.quantize(weight, spec)
        same = torch.equal(blocks.pack(plain), blocks.pack(searched))
        assert same is not blocks.has_plain_rounding(spec)


def test_the_lists_have_a_sensible_form():
    for type, search in SEARCHES.items():
        grid = BLOCK_GRIDS[type]
        assert bool(search.scales) == bool(search.reach) == (grid.sub_bits > 0)
        assert bool(search.minima) == (grid.sub_bits > 0 and not grid.symmetric)
        assert all(math.isfinite(ratio) and ratio for ratio in (*search.ratios, *search.scales))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_type
def test_non_finite_weights_are_refused(type, value):
    weight = normal(5, 512)
    weight[3, 300] = value
    spec = spec_of_type(type)
    for quantize in (rtn.quantize, absmax.quantize):
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match="non-finite weight at row 3, column 300"):
                quantize(weight.to(dtype), spec)
    with pytest.raises(ValueError, match="non-finite weight at row 3, column 300"):
        blocks.absmax(weight, QuantSpec(4, 64))


@every_type
def test_overflowing_scales_are_refused(type):
    weight = normal(3, 512)
    weight[1, 300] = 3e38
    spec = spec_of_type(type)
    place = 300 // BLOCK_TYPES[type][0]
    message = f"row 1, (block {place} of {type}; use another type|group {place}; use scale_dtype)"
    for quantize in (rtn.quantize, absmax.quantize):
        with pytest.raises(ValueError, match=message):
            quantize(weight, spec)
    with pytest.raises(ValueError, match="row 1, group 4; use scale_dtype"):
        blocks.absmax(weight, QuantSpec(4, 64))


@pytest.mark.parametrize("type", ["Q4_1", "Q5_1"])
def test_overflowing_minima_are_refused(type):
    weight = normal(2, 64) + 1e5
    for quantize in (rtn.quantize, absmax.quantize):
        with pytest.raises(ValueError, match=f"row 0, block 0 of {type}"):
            quantize(weight, BlockSpec(type))


@pytest.mark.parametrize("type", BLOCK_GRIDS)
def test_broken_blocks_and_wrong_inputs_are_refused(type):
    spec, weights = BlockSpec(type), BLOCK_TYPES[type][0]
    with pytest.raises(ValueError, match=f"no whole number of {type} blocks of {weights}"):
        absmax.quantize(normal(2, weights + 16), spec)
    with pytest.raises(ValueError, match=r"dtype torch\.float64"):
        rtn.quantize(normal(2, weights).double(), spec)
    for importance, message in ((torch.ones(3), "shape"), (-torch.ones(weights), "negative")):
        with pytest.raises(ValueError, match=message):
            rtn.quantize_searched(normal(2, weights), spec, importance)


def test_codes_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"codes span -9\.\.0; 4-bit codes must lie in -8\.\.7"):
        blocks.pack(canonical("Q4_0", [-9] + [0] * 31, 1.0))
    with pytest.raises(ValueError, match=r"codes span 0\.\.32; allowed: 0\.\.31"):
        blocks.pack(block("Q5_1", [32] + [0] * 31, 1.0, halves(0.0)))
    with pytest.raises(ValueError, match=r"codes span -33\.\.0; allowed: -32\.\.31"):
        blocks.pack(block("Q6_K", [-33] + [0] * 255, 1.0, None, row([0] * 16, torch.int8)))
    wide = row([-33] + [0] * 15, torch.int8)
    with pytest.raises(ValueError, match=r"sub_scales span -33\.\.0; allowed: -32\.\.31"):
        blocks.pack(block("Q3_K", [0] * 256, 1.0, None, wide))
    wrong = row([64] + [0] * 7, torch.uint8)
    with pytest.raises(ValueError, match=r"sub_mins span 0\.\.64; allowed: 0\.\.63"):
        blocks.pack(block("Q4_K", [0] * 256, 1.0, halves(0.0), SIX[0], wrong))


def test_wrong_bytes_are_refused():
    for data in (torch.zeros(1, 19, dtype=torch.uint8), torch.zeros(1, 18), torch.zeros(18)):
        with pytest.raises(
            ValueError, match="expected uint8 rows of whole Q4_0 blocks of 18 bytes"
        ):
            blocks.unpack(data, "Q4_0")
    with pytest.raises(ValueError, match="no block type 'Q2_K'"):
        blocks.unpack(torch.zeros(1, 18, dtype=torch.uint8), "Q2_K")
    with pytest.raises(ValueError, match="no block type 'Q2_K'"):
        blocks.row_bytes("Q2_K", 256)
    assert blocks.row_bytes("Q6_K", 512) == 420


def test_views_are_taken_as_they_are():
    """Transposed weights, slices of values and of bytes."""
    weight = normal(256, 48).t()
    assert not weight.is_contiguous()
    for type in ("Q4_0", "Q4_K"):
        spec = spec_of_type(type)
        found = rtn.quantize(weight, spec)
        assert torch.equal(found.codes, rtn.quantize(weight.contiguous(), spec).codes)
        data = blocks.pack(found)
        assert torch.equal(blocks.pack(found.rows(slice(3, 40, 2))), data[3:40:2])
        assert torch.equal(blocks.unpack(data[3:40:2], type).codes, found.codes[3:40:2])
    plain = absmax.quantize(weight, CANONICAL["Q8_0"])
    assert torch.equal(blocks.pack(plain), gguf_quantized(weight.contiguous(), "Q8_0"))


def test_empty_matrices():
    assert blocks.unpack(np_bytes(0, 144), "Q4_K").shape == (0, 256)
    assert blocks.pack(rtn.quantize(torch.zeros(0, 256), BlockSpec("Q4_K"))).shape == (0, 144)


def np_bytes(rows: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(np.zeros((rows, columns), dtype=np.uint8))
