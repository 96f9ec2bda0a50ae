"""``PackedWeight``: a quantized matrix in the order in which the native kernels read it.

Codes stay codes: 4.5 bits a weight with int4, groups of 32 and 16-bit scales. The layout is in
``src/layout.h``: 16 rows side by side, the scales of each stretch of 128 columns behind its codes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from zaya_kernels.library import Matrix, library
from zaya_quant.qtensor import Quantized, QuantTensor
from zaya_quant.spec import QuantSpec, Spec

_SCALE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
BITS = (4, 8)
GROUPS = (32, 64, 128)
ALIGNMENT = 64


def refusal(spec: Spec) -> str | None:
    """Why matrices with this spec cannot be packed, or None."""
    if not isinstance(spec, QuantSpec) or not spec.symmetric:
        return "symmetric grids only"
    if spec.bits not in BITS:
        return f"int{spec.bits}: int4 and int8 only"
    if spec.group_size not in GROUPS:
        return f"groups of {', '.join(map(str, GROUPS))} only"
    return None


class PackedWeight:
    """A packed matrix; make one with ``pack``, or over ``data`` that was packed before.

    Attributes:
        shape: ``(out, in)``.
        spec: of the matrix it was made from.
        fast: whether products with it may round activations to int8.
        data: the bytes, uint8 [nbytes], aligned to 64.
        matrix: what the library's functions take.
    """

    def __init__(
        self, shape: tuple[int, int], spec: QuantSpec, fast: bool, data: Tensor | None = None
    ) -> None:
        self.shape, self.spec, self.fast = shape, spec, fast
        self.matrix = _describe(shape, spec)
        size = library().zk_packed_bytes(ctypes.byref(self.matrix))
        # torch aligns to 64 bytes
        data = torch.empty(size, dtype=torch.uint8) if data is None else data
        if len(data) < size or data.data_ptr() % ALIGNMENT:
            raise ValueError(
                f"{spec.label} {list(shape)} takes {size} bytes aligned to {ALIGNMENT}; "
                f"there are {len(data)} at {data.data_ptr():#x}"
            )
        self.data = data[:size]
        self.matrix.data = self.data.data_ptr()

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


def packed_bytes(shape: tuple[int, int], spec: QuantSpec) -> int:
    """Size of a packed matrix."""
    return library().zk_packed_bytes(ctypes.byref(_describe(shape, spec)))


def pack(value: Quantized, fast: bool = False) -> PackedWeight:
    """Pack a matrix.

    Raises:
        ValueError: the kernels do not take such a grid, or a code is out of its range.
    """
    reason = refusal(value.spec)
    if reason is not None or not isinstance(value, QuantTensor):
        raise ValueError(f"cannot pack {value.spec.label}: {reason}")
    value.validate_codes()  # a code of too many bits would change its neighbours
    packed = PackedWeight(value.shape, value.spec, fast)
    codes, scales = value.codes.contiguous(), value.scales.contiguous()
    library().zk_pack(
        ctypes.byref(packed.matrix), codes.data_ptr(), scales.data_ptr(), torch.get_num_threads()
    )
    return packed


def pack_fast(value: Quantized) -> PackedWeight:
    """``pack`` for products that may round activations to int8."""
    return pack(value, fast=True)


def _describe(shape: tuple[int, int], spec: QuantSpec) -> Matrix:
    return Matrix(None, *shape, spec.bits, spec.group_size, _SCALE_CODES[spec.scale_dtype])
