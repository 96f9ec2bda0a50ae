"""ggml block types: their bytes, and plain rounding onto them as the gguf package does it.

A row is a sequence of blocks, a block a sequence of parts (ggml-common.h; ``_LAYOUTS``)::

    Q4_0   d  low[16]                Q4_1   d  m  low[16]            IQ4_NL  d  low[16]
    Q5_0   d  high[4]  low[16]       Q5_1   d  m  high[4]  low[16]   Q8_0    d  codes[32]
    Q4_K   d  m  sub[12]  low[128]   Q5_K   d  m  sub[12]  high[32]  low[128]
    Q6_K   low[128]  high[64]  sub[16]  d

``d`` and ``m`` (dmin for K-quants) are little-endian fp16.  A code is stored as the unsigned
u = code + bias, the bias 8 for Q4_0, 16 for Q5_0, 32 for Q6_K, else 0:

* ``low``, the low four bits: byte j of a run of R bytes holds element j of the run's 2 R elements
  in its low nibble and element j + R in its high one; R = 32 for Q4_K and Q5_K, 64 for Q6_K,
  else 16.
* ``high``, the bits above: Q5_0 and Q5_1 one bit string, bit i % 8 of byte i // 8 for element i;
  Q5_K bit k of byte j for element 32 k + j; Q6_K, for either half of 128 elements, two bits at
  2 k of byte j for element 32 k + j of the half.
* ``sub`` of Q4_K and Q5_K, eight scales s and eight minima n of six bits, j = 0..3: byte j is
  s[j] | (s[j+4] >> 4) << 6, byte 4 + j the same of n, byte 8 + j is the low four bits of s[j+4]
  and above them those of n[j+4].  Of Q6_K: sixteen int8.

**Plain rounding** (``absmax``) repeats the float32 arithmetic of ``gguf.quants.quantize``, so that
files are equal byte for byte: codes are computed with the reciprocal of the scale *before* it is
rounded to fp16, and halves are rounded up (Q8_0: away from zero).
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a block are; see the top of this file.

    Attributes:
        parts: their names in order.
        bias: what is added to a code before it is stored.
        run: bytes of ``low`` that hold one run of codes.
        high: fields per byte of ``high``, their bits, and whether the fields of one byte belong to
            neighbours.
    """

    parts: tuple[str, ...]
    bias: int = 0
    run: int = 16
    high: tuple[int, int, bool] = (0, 0, False)


_ONE_STRING, _PLANES = (8, 1, True), (8, 1, False)
_LAYOUTS = {
    "Q4_0": _Layout(("d", "low"), bias=8),
    "Q4_1": _Layout(("d", "m", "low")),
    "Q5_0": _Layout(("d", "high", "low"), bias=16, high=_ONE_STRING),
    "Q5_1": _Layout(("d", "m", "high", "low"), high=_ONE_STRING),
    "Q8_0": _Layout(("d", "codes")),
    "Q4_K": _Layout(("d", "m", "sub", "low"), run=32),
    "Q5_K": _Layout(("d", "m", "sub", "high", "low"), run=32, high=_PLANES),
    "Q6_K": _Layout(("low", "high", "sub", "d"), bias=32, run=64, high=(4, 2, False)),
    "IQ4_NL": _Layout(("d", "low")),
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
    rows, columns = value.shape
    blocks = columns // BLOCK_TYPES[type][0]
    layout = _LAYOUTS[type]
    codes = value.codes.contiguous()
    # int8 + bias wraps to just the unsigned value.
    stored = (codes.view(torch.uint8) + layout.bias).view(rows, blocks, -1)
    parts = [
        _half_bytes(scales) if name == "d" else _part(name, value, stored, layout)
        for name in layout.parts
    ]
    return torch.cat(parts, dim=2).flatten(1)


def _part(name: str, value: Quantized, stored: Tensor, layout: _Layout) -> Tensor:
    """One part of every block, uint8 ``[rows, blocks, bytes]``; ``stored [rows, blocks, n]``."""
    if name == "codes":
        return stored
    if name == "low":
        return _join((stored & 15).unflatten(2, (-1, 2, layout.run)), 4)
    if name == "high":
        return _join(_planes(stored >> 4, layout), layout.high[1])
    if not isinstance(value, BlockTensor):
        raise TypeError(f"{type(value).__name__} has no part {name}")
    if name == "m":
        return _half_bytes(_given(value.offsets))
    return _pack_sub(value, stored.shape[1])


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


def _join(fields: Tensor, bits: int) -> Tensor:
    """uint8 ``[rows, blocks, runs, n, k]``, field n at bit n * bits: ``[rows, blocks, runs k]``."""
    joined = fields[:, :, :, 0]
    for index in range(1, fields.shape[3]):
        joined = joined | (fields[:, :, :, index] << (index * bits))
    return joined.flatten(2)


def _split(data: Tensor, count: int, bits: int, run: int) -> Tensor:
    """The inverse of ``_join``: uint8 ``[rows, blocks, runs, count, run]``."""
    fields = data.unflatten(2, (-1, run))
    mask = (1 << bits) - 1
    return torch.stack([(fields >> (index * bits)) & mask for index in range(count)], dim=3)


def _planes(high: Tensor, layout: _Layout) -> Tensor:
    """High bits ``[rows, blocks, n]`` as the fields ``_join`` takes."""
    count, _, neighbours = layout.high
    if neighbours:
        return high.unflatten(2, (1, -1, count)).transpose(3, 4)
    return high.unflatten(2, (-1, count, 32))


def _codes_of_planes(data: Tensor, layout: _Layout) -> Tensor:
    """The inverse of ``_planes`` after ``_join``: ``[rows, blocks, n]``."""
    count, bits, neighbours = layout.high
    fields = _split(data, count, bits, data.shape[2] if neighbours else 32)
    return (fields.transpose(3, 4) if neighbours else fields).flatten(2)


def _pack_sub(value: BlockTensor, blocks: int) -> Tensor:
    scales = _given(value.sub_scales).contiguous().unflatten(1, (blocks, -1))
    if value.sub_mins is None:
        return scales.view(torch.uint8)
    minima = value.sub_mins.unflatten(1, (blocks, -1))
    first = [part[:, :, :4] | ((part[:, :, 4:] >> 4) << 6) for part in (scales, minima)]
    return torch.cat([*first, (scales[:, :, 4:] & 15) | (minima[:, :, 4:] << 4)], dim=2)


def _unpack_sub(sub: Tensor, value: BlockTensor) -> None:
    scales = _given(value.sub_scales)
    if value.sub_mins is None:
        scales.copy_(sub.contiguous().view(torch.int8).flatten(1))
        return
    low = sub[:, :, 8:]
    for target, first, rest in (
        (scales, sub[:, :, :4], low & 15),
        (value.sub_mins, sub[:, :, 4:8], low >> 4),
    ):
        target.copy_(torch.cat([first & 63, rest | ((first >> 6) << 4)], dim=2).flatten(1))


def _unpack_rows(data: Tensor, type: str, value: Quantized) -> None:
    """Fill ``value``, a view of some rows."""
    weights, size = BLOCK_TYPES[type]
    layout = _LAYOUTS[type]
    parts = data.contiguous().unflatten(1, (-1, size)).split(_part_sizes(type, weights), dim=2)
    stored = torch.zeros((*parts[0].shape[:2], weights), dtype=torch.uint8)
    for name, part in zip(layout.parts, parts, strict=True):
        if name == "d":
            value.scales.copy_(_halves(part))
        elif name == "codes":
            stored = part
        elif name == "low":
            stored = stored | _split(part, 2, 4, layout.run).flatten(2)
        elif name == "high":
            stored = stored | (_codes_of_planes(part, layout) << 4)
        elif isinstance(value, BlockTensor) and name == "m":
            _given(value.offsets).copy_(_halves(part))
        elif isinstance(value, BlockTensor):
            _unpack_sub(part, value)
    codes = (stored - layout.bias).flatten(1)
    value.codes.copy_(codes.view(value.codes.dtype))


def _part_sizes(type: str, weights: int) -> list[int]:
    layout = _LAYOUTS[type]
    _, bits, _ = layout.high
    sub = 0 if type not in BLOCK_GRIDS else _sub_bytes(type)
    sizes = {
        "d": 2,
        "m": 2,
        "codes": weights,
        "low": weights // 2,
        "high": weights * bits // 8,
        "sub": sub,
    }
    return [sizes[name] for name in layout.parts]


def _sub_bytes(type: str) -> int:
    grid, weights = BLOCK_GRIDS[type], BLOCK_TYPES[type][0]
    return weights // grid.sub_group * grid.sub_bits * (1 if grid.symmetric else 2) // 8


def empty(spec: Spec, rows: int, columns: int) -> Quantized:
    """Uninitialised values."""
    if isinstance(spec, QuantSpec):
        codes = torch.empty((rows, columns), dtype=torch.int8)
        scales = torch.empty((rows, spec.groups(columns)), dtype=torch.float16)
        return QuantTensor(codes, scales, None, spec)
    grid = spec.grid
    signed = torch.int8 if spec.type == "Q6_K" else torch.uint8
    per_block, per_group = columns // spec.group_size, columns // grid.sub_group

    def empty(wanted: bool, count: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty((rows, count), dtype=dtype) if wanted else None

    return BlockTensor(
        codes=torch.empty((rows, columns), dtype=signed),
        scales=torch.empty((rows, per_block), dtype=torch.float16),
        offsets=empty(not grid.symmetric, per_block, torch.float16),
        sub_scales=empty(grid.sub_bits > 0, per_group, signed),
        sub_mins=empty(grid.sub_bits > 0 and not grid.symmetric, per_group, torch.uint8),
        spec=spec,
    )


def _given(tensor: Tensor | None) -> Tensor:
    """A tensor the type is known to have."""
    if tensor is None:
        raise TypeError("a part of a block is missing")
    return tensor


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
