"""``PackedWeight``: a quantized matrix in the order in which the native kernels read it.

Codes stay codes: 4.5 bits a weight with int4, groups of 32 and 16-bit scales. The layout is in
``src/layout.h``: 16 rows side by side, the scales of each stretch of 1024 columns before its codes.
Every grid has its place there. Codes of two and three bits take four, those of five and six take
eight; a group is kept as groups of 16, 32, 64 or 128 that share its scale; scales of ggml's
K-quants stay products of an integer and an fp16 number.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache

import torch
from torch import Tensor

from zaya_kernels.library import Matrix, Source, library
from zaya_quant.qtensor import Quantized, QuantTensor
from zaya_quant.spec import BLOCK_TYPES, PER_CHANNEL, QuantSpec, Spec

_SCALE_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_PRODUCT = 3
_SYMMETRIC, _ZERO_POINTS, _MINIMA, _LEVELS = range(4)
ALIGNMENT = 64
_PANEL = 128  # columns that any group divides, or that divide any group


def layout_version() -> int:
    """Of what packed bytes mean: part of the key of whatever keeps them."""
    return library().zk_layout_version()


class PackedWeight:
    """A packed matrix; make one with ``pack``, or over ``data`` that was packed before.

    Attributes:
        shape: ``(out, in)``.
        spec: of the matrix it was made from.
        fast: whether products with it may round activations to int8.
        data: the bytes, uint8 [nbytes], aligned to 64; they may lie in a mapped file.
        matrix: what the library's functions take.
        address: where that lies.
    """

    def __init__(
        self, shape: tuple[int, int], spec: Spec, fast: bool, data: Tensor | None = None
    ) -> None:
        self.shape, self.spec, self.fast = shape, spec, fast
        self.matrix = _describe(shape, spec)
        size = packed_bytes(shape, spec)
        # torch aligns to 64 bytes
        data = torch.empty(size, dtype=torch.uint8) if data is None else data
        plain = data.dtype == torch.uint8 and data.ndim == 1 and data.is_contiguous()
        if not plain or len(data) < size or data.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"{spec.label} {list(shape)} takes {size} bytes aligned to {ALIGNMENT}; there are "
                f"{list(data.shape)} of {data.dtype} at {data.data_ptr():#x}, {data.stride()} apart"
            )
        self.data = data[:size]
        self.matrix.data = self.data.data_ptr()
        self.address = ctypes.addressof(self.matrix)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.data.numel()

    def rows(self, ids: Tensor) -> Tensor:
        """The given rows [n] as fp32 [n, in]; the caller has checked that they exist."""
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(len(ids), self.shape[1])
        library().zk_unpack_rows(
            ctypes.byref(self.matrix), ids.data_ptr(), len(ids), out.data_ptr()
        )
        return out

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values ``[out, in]``, bit for bit those of the matrix it was made from."""
        return self.rows(torch.arange(self.shape[0])).to(dtype)


@lru_cache(1024)
def packed_bytes(shape: tuple[int, int], spec: Spec) -> int:
    """Size of a packed matrix."""
    return library().zk_packed_bytes(ctypes.byref(_describe(shape, spec)))


def pack(value: Quantized, fast: bool = False) -> PackedWeight:
    """Pack a matrix.

    Raises:
        ValueError: a code is out of its range.
    """
    value.validate_codes()  # a code of too many bits would change its neighbours
    packed = PackedWeight(value.shape, value.spec, fast)
    kept: list[Tensor] = []  # what the source points to

    def pointer(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept.append(tensor.contiguous())
        return kept[-1].data_ptr()

    bias = _bias(value.spec)
    if isinstance(value, QuantTensor):
        group = value.spec.group_length(value.shape[1])
        source = Source(
            pointer(value.codes), pointer(value.scales), pointer(value.zeros), None, None,
            group, 0, bias,
        )  # fmt: skip
    elif value.sub_scales is None:
        group = value.spec.grid.sub_group
        source = Source(
            pointer(value.codes), pointer(value.scales), pointer(value.offsets), None, None,
            group, 0, bias,
        )  # fmt: skip
    else:
        # value = (d sub_scale) code - (dmin sub_min): what is added is a product of -dmin
        minima = None if value.offsets is None else -value.offsets
        source = Source(
            pointer(value.codes), pointer(value.sub_scales), pointer(value.sub_mins),
            pointer(value.scales), pointer(minima),
            value.spec.grid.sub_group, BLOCK_TYPES[value.spec.type][0], bias,
        )  # fmt: skip
    library().zk_pack(ctypes.byref(packed.matrix), ctypes.byref(source), torch.get_num_threads())
    return packed


def pack_fast(value: Quantized) -> PackedWeight:
    """``pack`` for products that may round activations to int8."""
    return pack(value, fast=True)


def _describe(shape: tuple[int, int], spec: Spec) -> Matrix:
    return Matrix(None, *shape, *_means(spec))


@lru_cache(1024)
def _means(spec: Spec) -> tuple[int, int, int, int]:
    """bits, group, scale type and form of ``zk::Matrix``."""
    bits = 4 if spec.bits <= 4 else 8
    if isinstance(spec, QuantSpec):
        group = _PANEL if spec.group_size == PER_CHANNEL else math.gcd(spec.group_size, _PANEL)
        form = _SYMMETRIC if spec.symmetric else _ZERO_POINTS
        return bits, group, _SCALE_TYPES[spec.scale_dtype], form
    grid = spec.grid
    form = _LEVELS if grid.codebook else _SYMMETRIC if grid.symmetric else _MINIMA
    return bits, grid.sub_group, _PRODUCT if grid.sub_bits else _SCALE_TYPES["float16"], form


def _bias(spec: Spec) -> int:
    """What is added to a code, and to a zero point, to have it as the library stores it."""
    bits, _, _, form = _means(spec)
    fills = form != _SYMMETRIC and (bits == 4 or spec.bits == bits)  # unsigned, from 0 on
    return 0 if fills else 1 << (bits - 1)
