"""Packing against literal bytes and against the compressed-tensors package."""

import pytest
import torch

from zaya_quant import pack


def words(*hexadecimal: str) -> torch.Tensor:
    """int32 words written as unsigned hexadecimal."""
    values = [int(word, 16) for word in hexadecimal]
    return torch.tensor([v - (1 << 32) if v >> 31 else v for v in values], dtype=torch.int32)


def codes(*values: int) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.int8)


@pytest.fixture(params=["native", "reference"])
def body(request, monkeypatch):
    """Both bodies; without the library the first is the second."""
    monkeypatch.setenv("ZAYA_QUANT_NATIVE", "1" if request.param == "native" else "0")


@pytest.mark.usefixtures("body")
def test_golden_4_bits():
    # u = q + 8, lowest nibble first: -8..-1 are 0..7, 0..7 are 8..15.
    packed = pack.pack_int32(codes(*range(-8, 8)), 4)
    assert torch.equal(packed[0], words("76543210", "FEDCBA98"))
    assert packed.numpy().tobytes() == bytes.fromhex("1032547698badcfe")


@pytest.mark.usefixtures("body")
def test_golden_8_bits():
    # u = q + 128, lowest byte first; the sixth code leaves two bytes of padding.
    packed = pack.pack_int32(codes(-128, -1, 0, 127, 1, -2), 8)
    assert torch.equal(packed[0], words("FF807F00", "00007E81"))
    assert packed.numpy().tobytes() == bytes.fromhex("007f80ff817e0000")


@pytest.mark.usefixtures("body")
def test_golden_3_bits_crosses_a_word():
    # u = q + 4. Element 10 has bits 30..32: the low two in word 0, the third in word 1.
    packed = pack.pack_int32(codes(*[-4] * 10, 3, 1), 3)
    assert torch.equal(packed[0], words("C0000000", "0000000B"))


def test_golden_gptq():
    # Output 0 holds -8..-1 and output 1 holds 0..7: one word each, side by side.
    matrix = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    assert torch.equal(pack.pack_gptq(matrix, 4), words("76543210", "FEDCBA98")[None])
    # Zero points 2^(bits-1), stored minus one.
    assert torch.equal(pack.gptq_zeros(2, 16, 4), words("77777777", "77777777").repeat(2, 1))
    assert torch.equal(pack.gptq_zeros(1, 4, 8)[0], words("7F7F7F7F"))
    assert torch.equal(pack.gptq_zeros(1, 16, 2)[0], words("55555555"))


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 5, 31, 32, 33, 64, 100])
def test_equals_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(columns)
    values = torch.randint(-half, half, (4, columns), generator=generator).to(torch.int8)
    theirs = helpers.pack_to_int32(values, bits)
    assert torch.equal(pack.pack_int32(values, bits), theirs)
    assert torch.equal(pack.unpack_int32(theirs, bits, columns), values)
    back = helpers.unpack_from_int32(pack.pack_int32(values, bits), bits, values.shape)
    assert torch.equal(back, values)


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize(("bits", "low", "high"), [(2, -2, 1), (4, -8, 7), (5, -16, 15)])
def test_codes_out_of_range_are_refused(bits, low, high):
    for wrong in (low - 1, high + 1):
        matrix = torch.tensor([[0, 0, 0], [0, wrong, 0]], dtype=torch.int8)
        with pytest.raises(ValueError, match=f"code {wrong} at row 1, column 1"):
            pack.pack_int32(matrix, bits)
    with pytest.raises(ValueError, match="int8"):
        pack.pack_int32(torch.zeros(2, 2), bits)


def test_wrong_shapes_are_refused():
    packed = torch.zeros(2, 3, dtype=torch.int32)
    for columns in (0, 16, 25):
        with pytest.raises(ValueError, match="words per row"):
            pack.unpack_int32(packed, 4, columns)
    with pytest.raises(ValueError, match="padding bits after element 22"):
        pack.unpack_int32(torch.full((1, 3), -1, dtype=torch.int32), 4, 23)
    with pytest.raises(ValueError, match="int32 matrix"):
        pack.unpack_int32(packed.float(), 4, 24)
    with pytest.raises(ValueError, match="do not fill whole"):
        pack.pack_gptq(torch.zeros(2, 12, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="GPTQ packing allows: 2, 4, 8"):
        pack.unpack_gptq(packed, 3)
    with pytest.raises(ValueError, match="multiple of 8"):
        pack.gptq_zeros(1, 12, 4)
    with pytest.raises(ValueError, match="allowed: 1 to 8"):
        pack.pack_int32(torch.zeros(1, 1, dtype=torch.int8), 9)
