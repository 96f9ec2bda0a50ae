"""Bit order of codes and zero points in ``MatMulNBits``, ``GatherBlockQuantized`` and ``QMoE``.

An unsigned code u = code + 2^(b-1) (symmetric) or code (asymmetric) has b = 4 or 8 bits; of two
4-bit codes the first is the low nibble. A row that does not fill its last byte ends with zero bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zaya_convert.export.onnx.places import QWEIGHT, SCALES, ZEROS
from zaya_quant.qtensor import SCALE_DTYPES, QuantTensor
from zaya_quant.spec import QuantSpec


def encode(value: QuantTensor) -> dict[str, Tensor]:
    """The components of a quantized matrix, by suffix."""
    bits = value.spec.bits
    # bytes wrap around: -8 is 248, and 248 + 8 is 0
    codes = value.codes.view(torch.uint8) + _offset(value.spec)
    found = {QWEIGHT: _pack(codes, bits), SCALES: value.scales.float()}
    if value.zeros is not None:
        found[ZEROS] = _pack(value.zeros, bits)
    return found


def decode(pieces: dict[str, Tensor], spec: QuantSpec, inputs: int) -> QuantTensor:
    """The inverse of ``encode``.

    Raises:
        ValueError: scales that are no numbers of the spec's dtype, or padding that is not zero.
    """
    scales = pieces[SCALES].to(SCALE_DTYPES[spec.scale_dtype])
    if not torch.equal(scales.float(), pieces[SCALES]):
        raise ValueError(f"has scales that are no {spec.scale_dtype} numbers")
    codes = _unpack(pieces[QWEIGHT], spec.bits, inputs)
    if spec.symmetric:
        return QuantTensor((codes - _offset(spec)).view(torch.int8), scales, None, spec)
    return QuantTensor(codes, scales, _unpack(pieces[ZEROS], spec.bits, scales.shape[1]), spec)


def _offset(spec: QuantSpec) -> int:
    return 1 << (spec.bits - 1) if spec.symmetric else 0


def _pack(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] to bytes [rows, ceil(n·bits/8)]."""
    if bits == 8:
        return values
    if values.numel() and int(values.max()) > 15:
        raise ValueError("a code or zero point does not fit 4 bits")
    if values.shape[1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[:, ::2] | values[:, 1::2] << 4


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of ``_pack``."""
    if bits == 8:
        return packed
    values = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
    if bool(values[:, count:].any()):
        raise ValueError(f"padding bits after element {count - 1} are not zero")
    return values[:, :count].contiguous()
