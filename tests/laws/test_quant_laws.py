"""Laws of the numerics, over every bit width, group size and scale type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tolerances import QUALITY_SQNR_DB, QUALITY_SQNR_DB_ASYMMETRIC
from zaya_quant import affine, native, pack
from zaya_quant.affine import absmax_scales, quantize_affine, round_with_scales
from zaya_quant.methods import METHODS, method, rtn
from zaya_quant.metrics import sqnr_db
from zaya_quant.qtensor import SCALE_DTYPES, QuantTensor
from zaya_quant.spec import ALLOWED_BITS, QuantSpec
from zaya_quant.stats import InputStats

SCALES = tuple(SCALE_DTYPES)
needs_native = pytest.mark.skipif(not native.available()[0], reason=native.available()[1])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@st.composite
def specs(draw, symmetric=None, scale_dtype=None):
    return QuantSpec(
        bits=draw(st.sampled_from(ALLOWED_BITS)),
        group_size=draw(st.sampled_from((16, 32, 48, 128, -1))),
        symmetric=draw(st.booleans()) if symmetric is None else symmetric,
        scale_dtype=scale_dtype or draw(st.sampled_from(SCALES)),
    )


@st.composite
def weights(draw, spread=4.0, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """Rows of very different magnitude, some elements zero, some tied at the absmax."""
    rows, columns = draw(st.integers(1, 20)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator)
    weight *= 10 ** (spread * (torch.rand(rows, 1, generator=generator) - 0.5))
    weight[torch.rand(rows, columns, generator=generator) < 0.1] = 0
    tie = torch.rand(rows, columns, generator=generator) < 0.05
    sign = torch.randint(0, 2, (rows, columns), generator=generator) * 2 - 1
    weight = torch.where(tie, weight.abs().amax(1, keepdim=True) * sign, weight)
    return weight.to(draw(st.sampled_from(dtypes)))


def same(left: QuantTensor, right: QuantTensor) -> bool:
    """Codes equal, scales equal as bits (so that -0 and NaN would count)."""
    scales = (left.scales, right.scales)
    bits = [s.view(torch.int32 if s.dtype == torch.float32 else torch.int16) for s in scales]
    zeros = left.zeros is right.zeros or torch.equal(left.zeros, right.zeros)
    return torch.equal(left.codes, right.codes) and torch.equal(*bits) and zeros


def plain_rounding(weight, spec):
    scales = absmax_scales(weight, spec).to(SCALE_DTYPES[spec.scale_dtype])
    return QuantTensor(round_with_scales(weight, scales, None, spec), scales, None, spec)


def error(weight, quantized) -> float:
    difference = weight.to(torch.float64) - quantized.dequantize().to(torch.float64)
    return float(difference.square().sum())


@needs_native
@settings(max_examples=150, deadline=None)
@given(data=st.data(), spec=specs(symmetric=True), weight=weights(), weighted=st.booleans())
def test_native_equals_reference_on_every_instruction_set(data, spec, weight, weighted):
    importance = None
    if weighted:
        seed = data.draw(st.integers(0, 2**31))
        generator = torch.Generator().manual_seed(seed)
        importance = torch.randn(weight.shape[1], generator=generator).square() * 3e4
        importance[: weight.shape[1] // 4] = 0
    expected = affine.quantize_affine(weight, spec, importance)
    for isa in native.supported_isas():
        assert same(native.quantize(weight, spec, importance, isa), expected), isa


@needs_native
@pytest.mark.parametrize("scale", [1e-42, 2.0**-126, 1e-30, 1e-7, 3e4, 1e30, 3e37])
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_native_equals_reference_at_extreme_magnitudes(scale, scale_dtype):
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(3)) * scale
    spec = QuantSpec(4, 32, scale_dtype=scale_dtype)
    try:
        expected = quantize_affine(weight, spec)
    except ValueError as failure:
        with pytest.raises(ValueError, match=str(failure)):
            native.quantize(weight, spec)
        return
    assert torch.isfinite(expected.dequantize()).all()
    for isa in native.supported_isas():
        assert same(native.quantize(weight, spec, isa=isa), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8))
def test_unpack_inverts_pack(data, bits):
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 100))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
    packed = pack.pack_int32(codes, bits)
    assert packed.shape == (rows, pack.packed_words(columns, bits))
    assert torch.equal(pack.unpack_int32(packed, bits, columns), codes)


@pytest.mark.parametrize("bits", pack.GPTQ_BITS)
def test_unpack_inverts_gptq_pack_for_all_codes(bits):
    half = 1 << (bits - 1)
    codes = torch.arange(-half, half, dtype=torch.int8).repeat(3, 32 * 4 // bits)
    assert torch.equal(pack.unpack_gptq(pack.pack_gptq(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_native_and_reference_pack_alike(bits, monkeypatch):
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    for columns in (1, 7, 8, 31, 32, 33, 100, 256):
        codes = torch.randint(-half, half, (3, columns), generator=generator).to(torch.int8)
        monkeypatch.delenv("ZAYA_QUANT_NATIVE", raising=False)
        fast = pack.pack_int32(codes, bits)
        monkeypatch.setenv("ZAYA_QUANT_NATIVE", "0")
        slow = pack.pack_int32(codes, bits)
        assert torch.equal(fast, slow)
        assert torch.equal(pack.unpack_int32(slow, bits, columns), codes)


@settings(max_examples=60, deadline=None)
@given(spec=specs(symmetric=True, scale_dtype="float32"), weight=weights())
def test_search_is_never_worse_than_plain_rounding(spec, weight):
    found = quantize_affine(weight, spec)
    found.validate_codes()
    # The search compares float32 sums; the slack is their rounding, over up to 150 terms.
    plain = error(weight, plain_rounding(weight, spec))
    energy = float(weight.double().square().sum())
    assert error(weight, found) <= plain * (1 + 1e-5) + energy * 1e-12


@settings(max_examples=40, deadline=None)
@given(spec=specs(scale_dtype="bfloat16"), weight=weights(dtypes=(torch.float32,)))
@pytest.mark.parametrize("power", [-40, 3])
def test_scaling_by_a_power_of_two_scales_the_scales(power, spec, weight):
    before, after = (quantize_affine(w, spec) for w in (weight, weight * 2.0**power))
    assert torch.equal(before.codes, after.codes)
    assert torch.equal(before.scales * 2.0**power, after.scales)


@settings(max_examples=40, deadline=None)
@given(spec=specs(symmetric=True), weight=weights(spread=1.0))
def test_rounding_again_with_the_found_scales_gives_the_same_codes(spec, weight):
    found = quantize_affine(weight, spec)
    again = round_with_scales(weight, found.scales, None, spec)
    assert torch.equal(again, found.codes)


@settings(max_examples=40, deadline=None)
@given(spec=specs(), rows=st.integers(1, 3), columns=st.integers(1, 70))
def test_zeros_stay_exactly_zero(spec, rows, columns):
    for body in (quantize_affine, rtn.quantize_affine):
        found = body(torch.zeros(rows, columns), spec)
        assert not found.codes.any()
        assert not found.scales.any()
        assert torch.equal(found.dequantize(), torch.zeros(rows, columns))


@pytest.mark.parametrize("bits", ALLOWED_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [1.0, -1.0, 0.75, -3e-4])
def test_a_constant_group_is_kept_to_the_precision_of_its_scale(bits, symmetric, value):
    spec = QuantSpec(bits, 32, symmetric, "float32")
    weight = torch.full((2, 64), value)
    found = quantize_affine(weight, spec).dequantize()
    torch.testing.assert_close(found, weight, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("bits", ALLOWED_BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_among_tiny_weights_is_kept(bits, symmetric):
    weight = torch.full((1, 32), 1e-6)
    weight[0, 5] = -1000.0
    found = quantize_affine(weight, QuantSpec(bits, 32, symmetric)).dequantize()
    assert torch.isfinite(found).all()
    assert abs(float(found[0, 5]) + 1000) <= 1000 * 2.0**-11
    assert (found[0, :5].abs() <= 1e-6).all()


@pytest.fixture(scope="module")
def white():
    """Statistics of inputs that are uncorrelated and equally large."""
    return InputStats(1024, torch.ones(1024), torch.eye(1024))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "absmax"])
@pytest.mark.parametrize(("bits", "group"), QUALITY_SQNR_DB)
def test_quality_on_normal_weights(name, bits, group, white):
    """On white inputs the error of the output is that of the weights, so no method may be worse."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    found = method(name)(weight, QuantSpec(bits, group), white if METHODS[name].needs else None)
    assert sqnr_db(weight, found.dequantize()) > QUALITY_SQNR_DB[bits, group]


@pytest.mark.parametrize(("bits", "group"), QUALITY_SQNR_DB_ASYMMETRIC)
def test_quality_asymmetric(bits, group):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
    found = rtn.quantize(weight, QuantSpec(bits, group, symmetric=False))
    found.validate_codes()
    assert sqnr_db(weight, found.dequantize()) > QUALITY_SQNR_DB_ASYMMETRIC[bits, group]


@settings(max_examples=50, deadline=None)
@given(spec=specs(symmetric=True), seed=st.integers(0, 2**31))
def test_importance_lowers_the_weighted_error(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 128, generator=generator)
    importance = torch.randn(128, generator=generator).square()

    def weighted(found):
        return float(((weight - found.dequantize()).double().square() * importance).sum())

    blind, aware = quantize_affine(weight, spec), quantize_affine(weight, spec, importance)
    # Per group the candidates are the same, but for what least squares adds to each list.
    assert weighted(aware) <= weighted(blind) * 1.01


def test_ranges_of_rows_are_independent():
    weight = torch.randn(37, 100, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    spec = QuantSpec(4, 32)
    whole = rtn.quantize(weight, spec)
    parts = [rtn.quantize(weight[start : start + 10], spec) for start in range(0, 37, 10)]
    assert torch.equal(torch.cat([part.codes for part in parts]), whole.codes)
    assert torch.equal(torch.cat([part.scales for part in parts]), whole.scales)
