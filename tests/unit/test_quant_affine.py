"""The affine search at its edges, and against the blocks of the gguf package."""

import math

import numpy as np
import pytest
import torch

from zaya_quant import affine, native
from zaya_quant.affine import needs_wider_scales, quantize_affine, round_with_scales, scale_ratios
from zaya_quant.methods import rtn
from zaya_quant.metrics import sqnr_db
from zaya_quant.spec import ALLOWED_BITS, QuantSpec

INT4 = QuantSpec(4, 32)


@pytest.fixture(params=["native", "reference"], autouse=True)
def body(request, monkeypatch):
    """Both bodies; without the library the first is the second."""
    monkeypatch.setenv("ZAYA_QUANT_NATIVE", "1" if request.param == "native" else "0")


def normal(rows: int = 64, columns: int = 256) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def test_halves_round_to_even():
    # The plain scale 1 fits exactly, so the other candidates are not better.
    weight = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5] + [3.0] * 25])
    scales = torch.ones(1, 1, dtype=torch.float16)
    found = round_with_scales(weight, scales, None, INT4)
    assert found[0, :7].tolist() == [7, 0, 2, 2, 0, -2, -2]


def test_whole_multiples_are_kept_exactly_with_a_positive_scale():
    weight = torch.arange(-7, 8).repeat(3)[:32].to(torch.float32)[None] * 0.25
    found = rtn.quantize(weight, INT4)
    assert float(found.scales) == 0.25
    assert torch.equal(found.dequantize(), weight)


def test_a_negative_scale_gives_the_largest_weight_the_extra_code():
    weight = torch.arange(-7, 9).repeat(2).to(torch.float32)[None]
    found = rtn.quantize(weight, INT4)
    assert float(found.scales) == -1.0
    assert torch.equal(found.dequantize(), weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", affine.INPUT_DTYPES)
def test_non_finite_weights_are_named(value, dtype):
    weight = normal(5, 100).to(dtype)
    weight[3, 97] = value
    weight[4, 1] = value
    for spec in (INT4, QuantSpec(4, -1), QuantSpec(4, 32, symmetric=False)):
        with pytest.raises(ValueError, match="non-finite weight at row 3, column 97"):
            rtn.quantize(weight, spec)


def test_a_scale_too_large_for_fp16_is_refused_and_foreseen():
    weight = normal()
    weight[2, 40] = 1e6
    assert rtn.needs_wider_scales(weight, INT4)
    with pytest.raises(ValueError, match="float16 scale is large enough for row 2, group 1"):
        rtn.quantize(weight, INT4)
    wide = QuantSpec(4, 32, scale_dtype="bfloat16")
    assert torch.isfinite(rtn.quantize(weight, wide).dequantize()).all()


@pytest.mark.parametrize("dtype", affine.INPUT_DTYPES)
def test_needs_wider_scales(dtype):
    weight = normal().to(dtype)
    weight[1] = 0  # groups of zeros do not count
    assert not rtn.needs_wider_scales(weight, INT4)
    tiny = weight.clone()
    tiny[0, :32] = 7 * 2.0**-15
    huge = weight.to(torch.float32).clone()
    huge[0, 0] = 7.1 * 65504
    for changed, expected in ((weight, False), (tiny, True), (huge, True)):
        assert needs_wider_scales(changed, INT4) is expected
        assert rtn.needs_wider_scales(changed, INT4) is expected


def test_groups_below_every_scale_become_zeros():
    weight = torch.full((1, 64), 1e-9)
    weight[0, 32:] = 1.0
    found = rtn.quantize(weight, INT4)
    assert found.dequantize()[0].tolist() == [0.0] * 32 + [1.0] * 32
    assert rtn.needs_wider_scales(weight, INT4)


def test_the_last_group_may_be_shorter():
    weight = normal(4, 70)
    found = rtn.quantize(weight, INT4)
    assert found.scales.shape == (4, 3)
    alone = rtn.quantize(weight[:, 64:], INT4)
    assert torch.equal(found.codes[:, 64:], alone.codes)


def test_importance_is_checked():
    for wrong in (torch.ones(5), torch.full((256,), math.nan), -torch.ones(256)):
        with pytest.raises(ValueError, match="importance"):
            rtn.quantize_affine(normal(), INT4, wrong)


def test_no_importance_at_all_falls_back_to_plain_rounding():
    weight = normal()
    found = rtn.quantize_affine(weight, INT4, torch.zeros(256))
    assert torch.equal(found.scales, (affine.absmax_scales(weight, INT4)).to(torch.float16))


def test_weights_are_checked():
    for wrong in (torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 2, dtype=torch.int8)):
        with pytest.raises(ValueError, match="weight has"):
            rtn.quantize(wrong, INT4)
    empty = rtn.quantize(torch.zeros(0, 32), INT4)
    assert empty.shape == (0, 32)


@pytest.mark.parametrize("bits", ALLOWED_BITS)
@pytest.mark.parametrize("length", [32, 128, 4096])
def test_ratios_start_with_plain_rounding_then_the_ggml_scale(bits, length):
    ratios = scale_ratios(bits, length)
    assert ratios[:2] == (1 / (2 ** (bits - 1) - 1), 1 / 2 ** (bits - 1))
    assert all(ratio > 0 for ratio in ratios)


def q4_0_blocks(found) -> np.ndarray:
    """Codes and scales in ggml's Q4_0: fp16 scale, then byte j = u[j] | u[j + 16] << 4."""
    u = (found.codes.to(torch.int16) + 8).to(torch.uint8).numpy().reshape(-1, 2, 16)
    scales = found.scales.numpy().reshape(-1, 1).view(np.uint8)
    blocks = np.concatenate([scales, u[:, 0] | (u[:, 1] << 4)], axis=1)
    return blocks.reshape(found.shape[0], -1)


def q8_0_blocks(found) -> np.ndarray:
    """Codes and scales in ggml's Q8_0: fp16 scale, then 32 signed bytes."""
    scales = found.scales.numpy().reshape(-1, 1).view(np.uint8)
    blocks = np.concatenate([scales, found.codes.numpy().view(np.uint8).reshape(-1, 32)], axis=1)
    return blocks.reshape(found.shape[0], -1)


@pytest.mark.parametrize(
    ("bits", "name", "blocks"), [(4, "Q4_0", q4_0_blocks), (8, "Q8_0", q8_0_blocks)]
)
def test_the_grid_is_that_of_ggml(bits, name, blocks):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[name]
    weight = normal()
    found = rtn.quantize(weight, QuantSpec(bits, 32))
    theirs = gguf.quants.dequantize(blocks(found), kind)
    assert theirs.tobytes() == found.dequantize().numpy().tobytes()
    # And on that grid the search finds better values than ggml's own rounding.
    own = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)
    assert sqnr_db(weight, torch.from_numpy(theirs)) > sqnr_db(weight, torch.from_numpy(own))


def test_native_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.delenv("ZAYA_QUANT_NATIVE")
    usable, reason = native.available()
    if not usable:
        pytest.skip(reason)
    with pytest.raises(ValueError, match="symmetric"):
        native.quantize(normal(), QuantSpec(4, 32, symmetric=False))
    assert native.isa() in native.ISAS
    monkeypatch.setenv("ZAYA_QUANT_NATIVE", "0")
    assert native.available() == (False, "ZAYA_QUANT_NATIVE=0")
    assert native.isa() == "reference"
    assert native.supported_isas() == ()


def test_asymmetric_uses_its_zero_point():
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(0)) + 0.5
    for bits in ALLOWED_BITS:
        found = quantize_affine(weight, QuantSpec(bits, 32, symmetric=False))
        assert found.zeros is not None
        assert not found.zeros.any()  # all weights positive: zero lies at the bottom
        assert not quantize_affine(-weight, found.spec).dequantize().gt(0).any()
