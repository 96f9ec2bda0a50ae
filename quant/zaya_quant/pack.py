"""Bit order, and nothing else.

**compressed-tensors, "pack-quantized"** — ``pack_int32``.  A code q of ``bits`` bits is stored
as the unsigned u = q + 2^(bits-1).  The u of one row form one little-endian bit string along the
input dimension: element i occupies the bits ``i*bits .. i*bits + bits - 1``, where bit k of the
string is bit ``k % 32`` of word ``k // 32``.  The string is padded with zero bits to whole int32
words, ``ceil(in * bits / 32)`` of them.  So at 4 bits word 0 is
``u0 | u1<<4 | u2<<8 | ... | u7<<28``; at 3, 5 and 6 bits an element may cross a word boundary
(dense, as ``compressed_tensors.compressors.pack_quantized`` does it since it supports them).

**GPTQ v1 / auto-round "auto_gptq"** — ``pack_gptq``.  The transposed matrix, packed along the
input dimension too: word [j, o] holds the inputs ``j*n .. j*n + n - 1`` of output o, n = 32/bits,
lowest bits first, as the same unsigned u.  Only 2, 4 and 8 bits, where n is whole.  The zero
points are packed along the *output* dimension and stored **minus one**: symmetric int4 has
zero 8, stored 7 = 0x7, hence words of 0x77777777.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zaya_quant import native

GPTQ_BITS = (2, 4, 8)
# Rows are packed in blocks of about this many codes, so that temporaries stay in cache.
_BLOCK = 1 << 18


def packed_words(in_features: int, bits: int) -> int:
    """int32 words per row of ``pack_int32``."""
    return -(-in_features * bits // 32)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 ``[out, in]`` → int32 ``[out, ceil(in*bits/32)]``."""
    _check_codes(codes, bits)
    return _pack_rows(codes, bits)


def unpack_int32(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The inverse of ``pack_int32``; padding bits must be zero."""
    _check_words("packed", packed, bits)
    if in_features < 1 or packed.shape[1] != packed_words(in_features, bits):
        raise ValueError(
            f"packed has {packed.shape[1]} words per row; {in_features} codes of {bits} bits "
            f"need {packed_words(max(in_features, 0), bits)}"
        )
    used = (in_features * bits - 1) % 32 + 1
    if used < 32 and bool(((packed[:, -1] >> used) & ((1 << (32 - used)) - 1)).any()):
        raise ValueError(f"padding bits after element {in_features - 1} are not zero")
    return _unpack_rows(packed, bits, in_features)


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 ``[out, in]`` → qweight int32 ``[in*bits/32, out]``."""
    _check_gptq_bits(bits)
    _check_codes(codes, bits)
    if codes.shape[1] * bits % 32:
        raise ValueError(f"{codes.shape[1]} inputs of {bits} bits do not fill whole int32 words")
    # One row of words is the same in both layouts: GPTQ transposes words, not bits.
    return _pack_rows(codes, bits).t().contiguous()


def unpack_gptq(qweight: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack_gptq``: int8 ``[out, in]``."""
    _check_gptq_bits(bits)
    _check_words("qweight", qweight, bits)
    return _unpack_rows(qweight.t().contiguous(), bits, qweight.shape[0] * 32 // bits)


def gptq_zeros(groups: int, out_features: int, bits: int) -> Tensor:
    """qzeros int32 ``[groups, out*bits/32]`` of a symmetric weight: zero - 1 in every field."""
    _check_gptq_bits(bits)
    if groups < 1 or out_features < 1 or out_features * bits % 32:
        raise ValueError(
            f"groups={groups}, out_features={out_features}: both must be positive and "
            f"out_features a multiple of {32 // bits}"
        )
    stored = (1 << (bits - 1)) - 1
    word = sum(stored << shift for shift in range(0, 32, bits))
    # The top field is below 2^(bits-1), so the word is a positive int32.
    return torch.full((groups, out_features * bits // 32), word, dtype=torch.int32)


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    if codes.device.type == "cpu" and native.available()[0]:
        return native.pack_int32(codes, bits)
    _check_range(codes, bits)
    rows, columns = codes.shape
    packed = torch.empty((rows, packed_words(columns, bits)), dtype=torch.int32)
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        packed[start : start + step] = _pack_block(codes[start : start + step], bits)
    return packed


def _pack_block(codes: Tensor, bits: int) -> Tensor:
    """32 elements fill exactly ``bits`` words, so every run of 32 is packed the same way."""
    rows, columns = codes.shape
    runs = -(-columns // 32)
    fields = torch.zeros((rows, runs * 32), dtype=torch.int64)
    fields[:, :columns] = codes.to(torch.int64) + (1 << (bits - 1))
    fields = fields.view(rows, runs, 32)
    words = torch.zeros((rows, runs, bits), dtype=torch.int64)
    for element in range(32):
        word, shift = divmod(element * bits, 32)
        field = fields[:, :, element] << shift
        words[:, :, word] |= field & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, :, word + 1] |= field >> 32
    # int64 → int32 keeps the low 32 bits.
    return words.view(rows, runs * bits)[:, : packed_words(columns, bits)].to(torch.int32)


def _unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    if packed.device.type == "cpu" and native.available()[0]:
        return native.unpack_int32(packed, bits, columns)
    rows = packed.shape[0]
    codes = torch.empty((rows, columns), dtype=torch.int8)
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        codes[start : start + step] = _unpack_block(packed[start : start + step], bits, columns)
    return codes


def _unpack_block(packed: Tensor, bits: int, columns: int) -> Tensor:
    rows, used_words = packed.shape
    runs = -(-columns // 32)
    words = torch.zeros((rows, runs * bits), dtype=torch.int64)
    words[:, :used_words] = packed.to(torch.int64) & 0xFFFFFFFF
    words = words.view(rows, runs, bits)
    codes = torch.empty((rows, runs, 32), dtype=torch.int8)
    for element in range(32):
        word, shift = divmod(element * bits, 32)
        field = words[:, :, word] >> shift
        if shift + bits > 32:
            field = field | (words[:, :, word + 1] << (32 - shift))
        field = (field & ((1 << bits) - 1)) - (1 << (bits - 1))
        codes[:, :, element] = field.to(torch.int8)
    return codes.view(rows, runs * 32)[:, :columns]


def _check_codes(codes: Tensor, bits: int) -> None:
    _check_bits(bits)
    if codes.dtype != torch.int8 or codes.ndim != 2 or codes.shape[1] == 0:
        raise ValueError(
            f"codes are {codes.dtype} {tuple(codes.shape)}; expected int8 [out, in] with in > 0"
        )


def _check_range(codes: Tensor, bits: int) -> None:
    limit = 1 << (bits - 1)
    # Not `codes >= limit`: at 8 bits torch would wrap the limit to the int8 -128.
    outside = ((codes < -limit) | (codes > limit - 1)).nonzero()
    if len(outside):
        raise native.out_of_range(codes, int(outside[0, 0]), int(outside[0, 1]), bits)


def _check_words(name: str, words: Tensor, bits: int) -> None:
    _check_bits(bits)
    if words.dtype != torch.int32 or words.ndim != 2 or 0 in words.shape[1:]:
        raise ValueError(
            f"{name} is {words.dtype} {tuple(words.shape)}; expected a non-empty int32 matrix"
        )


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; allowed: 1 to 8")


def _check_gptq_bits(bits: int) -> None:
    if bits not in GPTQ_BITS:
        raise ValueError(f"bits is {bits}; GPTQ packing allows: {', '.join(map(str, GPTQ_BITS))}")
