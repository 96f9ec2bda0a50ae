"""ggml block types: their bytes, and plain rounding onto them as the gguf package does it.

A row is a sequence of blocks, a block a sequence of parts (ggml-common.h; ``_LAYOUTS``)::

    Q4_0   d  low[16]                Q4_1    d  m  low[16]            IQ4_NL  d  low[16]
    Q5_0   d  high[4]  low[16]       Q5_1    d  m  high[4]  low[16]   Q8_0    d  codes[32]
    Q4_K   d  m  sub[12]  low[128]   Q5_K    d  m  sub[12]  high[32]  low[128]
    Q6_K   low[128]  high[64]  sub[16]  d
    Q3_K   high[32]  low[64]  sub_low[8]  sub_high[4]  d
    IQ4_XS d  sub_high[2]  sub_low[4]  low[128]

``d`` and ``m`` (dmin for K-quants) are little-endian fp16.  A code is stored as the unsigned
u = code + bias, the bias 8 for Q4_0, 16 for Q5_0, 32 for Q6_K, 4 for Q3_K, else 0:

* ``low``, the low four bits (two for Q3_K), and ``high``, those above, are fields of bytes, the
  first in the lowest bits: of every run of R bytes, byte j holds the elements j, j + R, j + 2 R, ..
  of that run's.  R = 32 for all of Q3_K, Q4_K and Q5_K and for ``high`` of Q6_K, 64 for ``low`` of
  Q6_K; 1 (neighbours share a byte) for ``high`` of Q5_0 and Q5_1; else 16.
* ``sub_low`` and ``sub_high`` are likewise the low four bits and the two above of sub_scale + 32:
  R = 8 and 4 for Q3_K, 1 for IQ4_XS.
* ``sub`` of Q4_K and Q5_K, eight scales s and eight minima n of six bits, j = 0..3: byte j is
  s[j] | (s[j+4] >> 4) << 6, byte 4 + j the same of n, byte 8 + j is the low four bits of s[j+4]
  and above them those of n[j+4].  Of Q6_K: sixteen int8.

**Plain rounding** (``absmax``) repeats the float32 arithmetic of ``gguf.quants.quantize``, so that
files are equal byte for byte: codes are computed with the reciprocal of the scale *before* it is
rounded to fp16, and halves are rounded up (Q8_0: away from zero).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from zaya_quant import affine, native
from zaya_quant.qtensor import SCALE_DTYPES, BlockTensor, Quantized, QuantTensor
from zaya_quant.spec import (
    BLOCK_GRIDS,
    BLOCK_TYPES,
    BlockSpec,
    QuantSpec,
    Spec,
    holding_type,
    spec_of_type,
)

# Rows are processed in tiles of about this many weights, so that temporaries stay in cache.
_TILE = 1 << 18

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Fields:
    """Numbers of ``bits`` bits that share bytes, by runs of ``run`` bytes; see the top."""

    bits: int
    run: int

    def join(self, values: Tensor) -> Tensor:
        """uint8 ``[rows, blocks, n]``, each below 2^bits, to ``[rows, blocks, n bits / 8]``."""
        fields = values.unflatten(2, (-1, 8 // self.bits, self.run))
        joined = fields[:, :, :, 0]
        for index in range(1, fields.shape[3]):
            joined = joined | (fields[:, :, :, index] << (index * self.bits))
        return joined.flatten(2)

    def split(self, data: Tensor) -> Tensor:
        """The inverse of ``join``."""
        runs, mask = data.unflatten(2, (-1, self.run)), (1 << self.bits) - 1
        shifts = range(0, 8, self.bits)
        return torch.stack([(runs >> shift) & mask for shift in shifts], dim=3).flatten(2)


@dataclass(frozen=True)
class _Parts:
    """Integers in two parts: of value + ``bias``, the bits of ``low`` and those above them."""

    low: _Fields
    high: _Fields | None = None
    bias: int = 0

    def part(self, values: Tensor, name: str) -> Tensor:
        """The bytes of ``low`` or ``high``, of int8 or uint8 ``[rows, blocks, n]``."""
        stored = values.view(torch.uint8) + self.bias  # int8 + bias wraps to just the unsigned
        if name == "low":
            return self.low.join(stored & ((1 << self.low.bits) - 1))
        return _given(self.high).join(stored >> self.low.bits)

    def values(self, low: Tensor, high: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The inverse of ``part``."""
        stored = self.low.split(low)
        if high is not None:
            stored = stored | (_given(self.high).split(high) << self.low.bits)
        return (stored - self.bias).view(dtype)

    def sizes(self, count: int) -> dict[str, int]:
        """Bytes of either part of ``count`` integers."""
        parts = {"low": self.low, "high": self.high}
        return {name: count * part.bits // 8 for name, part in parts.items() if part}


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a block are; see the top of this file.

    Attributes:
        order: their names.
        codes: how they are stored, unless as bytes.
        sub: how sub-scales are stored that have parts of their own.
    """

    order: tuple[str, ...]
    codes: _Parts = _Parts(_Fields(4, 16))
    sub: _Parts | None = None


_ONE_STRING, _PLANES = _Fields(1, 1), _Fields(1, 32)
_LAYOUTS = {
    "Q4_0": _Layout(("d", "low"), _Parts(_Fields(4, 16), bias=8)),
    "Q4_1": _Layout(("d", "m", "low")),
    "Q5_0": _Layout(("d", "high", "low"), _Parts(_Fields(4, 16), _ONE_STRING, bias=16)),
    "Q5_1": _Layout(("d", "m", "high", "low"), _Parts(_Fields(4, 16), _ONE_STRING)),
    "Q8_0": _Layout(("d", "codes")),
    "Q3_K": _Layout(
        ("high", "low", "sub_low", "sub_high", "d"),
        _Parts(_Fields(2, 32), _PLANES, bias=4),
        _Parts(_Fields(4, 8), _Fields(2, 4), bias=32),
    ),
    "Q4_K": _Layout(("d", "m", "sub", "low"), _Parts(_Fields(4, 32))),
    "Q5_K": _Layout(("d", "m", "sub", "high", "low"), _Parts(_Fields(4, 32), _PLANES)),
    "Q6_K": _Layout(("low", "high", "sub", "d"), _Parts(_Fields(4, 64), _Fields(2, 32), bias=32)),
    "IQ4_NL": _Layout(("d", "low")),
    "IQ4_XS": _Layout(
        ("d", "sub_high", "sub_low", "low"),
        sub=_Parts(_Fields(4, 1), _Fields(2, 1), bias=32),
    ),
}


def row_bytes(type: str, columns: int) -> int:
    """Bytes of one row.

    Raises:
        ValueError: no such type, or the row is no whole number of blocks.
    """
    if type not in BLOCK_TYPES:
        raise ValueError(f"no block type {type!r}; there are {', '.join(BLOCK_TYPES)}")
    weights, size = BLOCK_TYPES[type]
    if columns < 1 or columns % weights:
        raise ValueError(f"{columns} columns are no whole number of {type} blocks of {weights}")
    return columns // weights * size


def pack(value: Quantized) -> Tensor:
    """The bytes of ``holding_type(value.spec, in)``: uint8 ``[out, row_bytes]``.

    Raises:
        ValueError: no block type holds it exactly, or a code is out of range.
    """
    rows, columns = value.shape
    type = holding_type(value.spec, columns)
    if not type:
        raise ValueError(f"no block type holds {value.spec.label} with {columns} columns exactly")
    scales = _scale_per_block(value, type)
    if value.codes.device.type == "cpu" and native.available()[0]:
        return native.pack_blocks(value, type, scales)
    value.validate_codes()
    packed = torch.empty((rows, row_bytes(type, columns)), dtype=torch.uint8)
    step = max(1, _TILE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        packed[part] = _pack_rows(value.rows(part), scales[part], type)
    return packed


def unpack(data: Tensor, type: str) -> Quantized:
    """The inverse of ``pack``: bytes uint8 ``[out, row_bytes]`` to values of ``type``'s own spec.

    Every pattern of bytes is valid; scales that are not finite are kept as they are.
    """
    spec = spec_of_type(type)
    weights, size = BLOCK_TYPES[type]
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] == 0 or data.shape[1] % size:
        raise ValueError(
            f"data is {data.dtype} {tuple(data.shape)}; expected uint8 rows of whole {type} "
            f"blocks of {size} bytes"
        )
    value = empty(spec, data.shape[0], data.shape[1] // size * weights)
    if data.device.type == "cpu" and native.available()[0]:
        native.unpack_blocks(data, value)
        return value
    step = max(1, _TILE // value.shape[1])
    for start in range(0, data.shape[0], step):
        part = slice(start, start + step)
        _unpack_rows(data[part], type, value.rows(part))
    return value


def absmax(weight: Tensor, spec: Spec) -> Quantized:
    """``weight [out, in]`` rounded plainly: the scale is what the largest weights ask for.

    Grids of ggml's Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: byte for byte what ``gguf.quants.quantize``
    computes.  Other grids with one scale per group: absmax / qmax, or (max - min) / qmax.

    Raises:
        ValueError: a weight is not finite, or a group's scale overflows; a type that has no plain
            rounding.
    """
    affine.check_weight(weight)
    if isinstance(spec, BlockSpec) and not has_plain_rounding(spec):
        raise ValueError(f"{spec.type} has no plain rounding, only a search")
    if isinstance(spec, QuantSpec) and not spec.ggml_type:
        return _absmax_affine(weight, spec)
    whole = weight.shape[1] % BLOCK_TYPES[spec.ggml_type][0] == 0
    if whole and weight.device.type == "cpu" and native.available()[0]:
        return absmax_natively(weight, spec)
    return _absmax_ggml(weight, spec)


def absmax_natively(weight: Tensor, spec: Spec, isa: str | None = None) -> Quantized:
    """``absmax`` of whole blocks of a ggml type in the native library."""
    value = empty(spec, *weight.shape)
    native.plain_blocks(weight.contiguous(), value, isa)
    return value


def has_plain_rounding(spec: Spec) -> bool:
    """Whether ``absmax`` takes this; the other block types have no scale that is just given."""
    return isinstance(spec, QuantSpec) or spec.type in ("Q4_1", "Q5_1")


# ---- bytes ------------------------------------------------------------------------------------


def _pack_rows(value: Quantized, scales: Tensor, type: str) -> Tensor:
    blocks = value.shape[1] // BLOCK_TYPES[type][0]
    parts = [
        _half_bytes(scales) if name == "d" else _part(name, value, _LAYOUTS[type], blocks)
        for name in _LAYOUTS[type].order
    ]
    return torch.cat(parts, dim=2).flatten(1)


def _part(name: str, value: Quantized, layout: _Layout, blocks: int) -> Tensor:
    """One part of every block, uint8 ``[rows, blocks, bytes]``."""
    if name == "codes":
        return _per_block(value.codes, blocks).view(torch.uint8)
    if name in ("low", "high"):
        return layout.codes.part(_per_block(value.codes, blocks), name)
    if not isinstance(value, BlockTensor):
        raise TypeError(f"{type(value).__name__} has no part {name}")
    if name == "m":
        return _half_bytes(_given(value.offsets))
    scales = _per_block(_given(value.sub_scales), blocks)
    if layout.sub is not None:
        return layout.sub.part(scales, name.removeprefix("sub_"))
    if value.sub_mins is None:
        return scales.view(torch.uint8)
    return _pack_twelve(scales, _per_block(value.sub_mins, blocks))


def _per_block(numbers: Tensor, blocks: int) -> Tensor:
    return numbers.contiguous().unflatten(1, (blocks, -1))


def _scale_per_block(value: Quantized, type: str) -> Tensor:
    """fp16 ``[out, blocks]``: the scale of a longer group repeated for each of its blocks."""
    blocks, scales = value.shape[1] // BLOCK_TYPES[type][0], value.scales
    if isinstance(value, QuantTensor) and scales.shape[1] != blocks:
        per_group = value.spec.group_length(value.shape[1]) // BLOCK_TYPES[type][0]
        scales = scales.repeat_interleave(per_group, dim=1)[:, :blocks]
    return scales


def _half_bytes(halves: Tensor) -> Tensor:
    return halves.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _halves(data: Tensor) -> Tensor:
    return data.contiguous().flatten(1).view(torch.float16)


def _pack_twelve(scales: Tensor, minima: Tensor) -> Tensor:
    """``sub`` of Q4_K and Q5_K."""
    first = [part[:, :, :4] | ((part[:, :, 4:] >> 4) << 6) for part in (scales, minima)]
    return torch.cat([*first, (scales[:, :, 4:] & 15) | (minima[:, :, 4:] << 4)], dim=2)


def _unpack_twelve(sub: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``_pack_twelve``: scales and minima."""
    low = sub[:, :, 8:]
    scales, minima = (
        torch.cat([first & 63, rest | ((first >> 6) << 4)], dim=2)
        for first, rest in ((sub[:, :, :4], low & 15), (sub[:, :, 4:8], low >> 4))
    )
    return scales, minima


def _unpack_rows(data: Tensor, type: str, value: Quantized) -> None:
    """Fill ``value``, a view of some rows."""
    layout, sizes = _LAYOUTS[type], _part_sizes(type)
    found = data.contiguous().unflatten(1, (-1, BLOCK_TYPES[type][1])).split(sizes, dim=2)
    parts = dict(zip(layout.order, found, strict=True))
    value.scales.copy_(_halves(parts["d"]))
    value.codes.copy_(_codes(parts, layout, value.codes.dtype).flatten(1))
    if isinstance(value, BlockTensor):
        if value.offsets is not None:
            value.offsets.copy_(_halves(parts["m"]))
        if value.sub_scales is not None:
            _unpack_sub(parts, layout, value)


def _codes(parts: dict[str, Tensor], layout: _Layout, dtype: torch.dtype) -> Tensor:
    if "codes" in parts:
        return parts["codes"].contiguous().view(dtype)
    return layout.codes.values(parts["low"], parts.get("high"), dtype)


def _unpack_sub(parts: dict[str, Tensor], layout: _Layout, value: BlockTensor) -> None:
    target = _given(value.sub_scales)
    if layout.sub is not None:
        scales = layout.sub.values(parts["sub_low"], parts["sub_high"], target.dtype)
    elif value.sub_mins is None:
        scales = parts["sub"].contiguous().view(target.dtype)
    else:
        scales, minima = _unpack_twelve(parts["sub"])
        value.sub_mins.copy_(minima.flatten(1))
    target.copy_(scales.flatten(1))


def _part_sizes(type: str) -> list[int]:
    """Bytes of the parts of a block in their order."""
    layout, weights = _LAYOUTS[type], BLOCK_TYPES[type][0]
    sizes = {"d": 2, "m": 2, "codes": weights, **layout.codes.sizes(weights)}
    if type in BLOCK_GRIDS:
        grid = BLOCK_GRIDS[type]
        count = weights // grid.sub_group
        sizes["sub"] = count * grid.sub_bits * (1 if grid.symmetric else 2) // 8
        if layout.sub is not None:
            sizes |= {f"sub_{name}": size for name, size in layout.sub.sizes(count).items()}
    return [sizes[name] for name in layout.order]


def empty(spec: Spec, rows: int, columns: int) -> Quantized:
    """Uninitialised values."""
    if isinstance(spec, QuantSpec):
        codes = torch.empty((rows, columns), dtype=torch.int8)
        scales = torch.empty((rows, spec.groups(columns)), dtype=torch.float16)
        return QuantTensor(codes, scales, None, spec)
    grid = spec.grid
    per_block, per_group = columns // spec.group_size, columns // grid.sub_group

    def empty(wanted: bool, count: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty((rows, count), dtype=dtype) if wanted else None

    return BlockTensor(
        codes=torch.empty((rows, columns), dtype=torch.int8 if grid.signed else torch.uint8),
        scales=torch.empty((rows, per_block), dtype=torch.float16),
        offsets=empty(not grid.symmetric, per_block, torch.float16),
        sub_scales=empty(
            grid.sub_bits > 0, per_group, torch.int8 if grid.symmetric else torch.uint8
        ),
        sub_mins=empty(grid.sub_bits > 0 and not grid.symmetric, per_group, torch.uint8),
        spec=spec,
    )


def _given(part: _T | None) -> _T:
    """Something the type is known to have."""
    if part is None:
        raise TypeError("a part of a block is missing")
    return part


# ---- plain rounding ---------------------------------------------------------------------------


def _absmax_ggml(weight: Tensor, spec: Spec) -> Quantized:
    rows, columns = weight.shape
    if isinstance(spec, BlockSpec):
        row_bytes(spec.type, columns)  # refuses broken blocks
    value = empty(spec, rows, columns)
    step = max(1, _TILE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        padded = torch.nn.functional.pad(weight[part].to(torch.float32), (0, -columns % 32))
        check_finite(padded, start)
        tile = padded.unflatten(1, (-1, 32))
        codes, scale, minimum = _plain(tile, spec)
        value.codes[part] = codes.flatten(1)[:, :columns].to(value.codes.dtype)
        value.scales[part] = scale.squeeze(2).to(torch.float16)
        if minimum is not None and isinstance(value, BlockTensor):
            _given(value.offsets)[part] = minimum.squeeze(2).to(torch.float16)
        _check_scales(value.rows(part), start)
    return value


def _plain(tile: Tensor, spec: Spec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and minimum, float32, of ``tile [rows, blocks, 32]``."""
    if isinstance(spec, BlockSpec):
        return _plain_minimum(tile, (1 << spec.bits) - 1)
    codes, scale = _plain_q8_0(tile) if spec.bits == 8 else _plain_half(tile, -spec.qmin)
    return codes, scale, None


def _plain_half(tile: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The first weight of the largest magnitude gets the code -half; halves are rounded up."""
    scale = tile.gather(2, tile.abs().argmax(dim=2, keepdim=True)) / -half
    stored = torch.trunc(tile * _reciprocal(scale) + (half + 0.5)).clamp(0, 2 * half - 1)
    return stored - half, scale


def _plain_q8_0(tile: Tensor) -> tuple[Tensor, Tensor]:
    """The scale is absmax / 127; halves are rounded away from zero."""
    scale = tile.abs().amax(dim=2, keepdim=True) / 127
    exact = tile * _reciprocal(scale)
    size = exact.abs()
    whole = size.floor()
    return torch.copysign(whole + (size - whole >= 0.5), exact), scale


def _plain_minimum(tile: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scale is (max - min) / top; halves are rounded up."""
    low, high = torch.aminmax(tile, dim=2, keepdim=True)
    scale = (high - low) / top
    codes = torch.trunc((tile - low) * _reciprocal(scale) + 0.5).clamp(0, top)
    return codes, scale, low + 0.0  # of two zeros, which is the minimum is nowhere defined


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is infinite: such a scale is 0 in fp16, whatever the codes."""
    inverse = 1 / scale
    return torch.where(inverse.isinf(), 0.0, inverse)


def _absmax_affine(weight: Tensor, spec: QuantSpec) -> QuantTensor:
    check_finite(weight, 0)
    wide = affine.absmax_scales(weight, spec)
    scales = wide.to(SCALE_DTYPES[spec.scale_dtype])
    lost = scales.isinf().nonzero()
    if len(lost):
        raise affine.not_representable(int(lost[0, 0]), int(lost[0, 1]), spec)
    zeros = None if spec.symmetric else _zero_points(weight, scales, spec)
    return QuantTensor(affine.round_with_scales(weight, scales, zeros, spec), scales, zeros, spec)


def _zero_points(weight: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """The codes nearest to value 0 on the range from min(lo, 0): uint8 ``[out, groups]``."""
    length, columns = spec.group_length(weight.shape[1]), weight.shape[1]
    padded = torch.nn.functional.pad(weight.to(torch.float32), (0, -columns % length))
    low = padded.unflatten(1, (-1, length)).amin(dim=2).clamp_max(0)
    zeros = torch.round(-low / scales.to(torch.float32)).nan_to_num(nan=0.0)  # 0 / 0
    return zeros.clamp(0, spec.qmax).to(torch.uint8)


def check_finite(weight: Tensor, first_row: int) -> None:
    """Raise ValueError at a NaN or an infinity in rows that start at ``first_row``."""
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        row, column = (int(i) for i in (~finite).nonzero()[0])
        raise affine.non_finite(first_row + row, column)


def _check_scales(value: Quantized, first_row: int) -> None:
    """Only overflow makes a scale of finite weights infinite."""
    lost = ~value.scales.isfinite()
    if isinstance(value, BlockTensor) and value.offsets is not None:
        lost |= ~value.offsets.isfinite()
    if not bool(lost.any()):
        return
    row, block = (int(i) for i in lost.nonzero()[0])
    if isinstance(value, QuantTensor):
        raise affine.not_representable(first_row + row, block, value.spec)
    raise native.overflows(value.spec.type, first_row + row, block)
