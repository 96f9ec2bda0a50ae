"""The native library: same numbers as the torch references, many times the speed.

``libzaya_quant`` has a plain C interface (``src/zaya_quant.h``) and is loaded with ctypes, which
releases the interpreter lock during a call.  A call runs on the thread that makes it; to use more
cores, quantize ranges of rows from several threads.

It is optional.  ``available()`` tells whether it is in use and, if not, why; everything then runs
on the torch reference, with the same results.  ``ZAYA_QUANT_NATIVE=0`` forces that.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

import zaya_quant
from zaya_quant import affine, shared_library
from zaya_quant.qtensor import SCALE_DTYPES, BlockTensor, Quantized, QuantTensor
from zaya_quant.spec import BLOCK_TYPES, QuantSpec

_ABI_VERSION = 4
ISAS = ("base", "avx2", "avx512")
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BLOCK_CODES = {name: index for index, name in enumerate(BLOCK_TYPES)}
_OK, _NON_FINITE, _NOT_REPRESENTABLE, _NO_MEMORY = range(4)


class _Request(ctypes.Structure):
    """``zq::Request``, field by field."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("importance", ctypes.c_void_p),
        ("ratios", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_length", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("scale_dtype", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("ratio_count", ctypes.c_int32),
        ("both_signs", ctypes.c_int32),
        ("refinements", ctypes.c_int32),
    )


class _BlockRequest(ctypes.Structure):
    """``zq::BlockRequest``, field by field."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("sub_scales", ctypes.c_void_p),
        ("sub_mins", ctypes.c_void_p),
        ("importance", ctypes.c_void_p),
        ("ratios", ctypes.c_void_p),
        ("scale_ratios", ctypes.c_void_p),
        ("minimum_ratios", ctypes.c_void_p),
        ("reach", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("ratio_count", ctypes.c_int32),
        ("scale_count", ctypes.c_int32),
        ("minimum_count", ctypes.c_int32),
        ("turn_count", ctypes.c_int32),
    )


class _Blocks(ctypes.Structure):
    """``zq::Blocks``, field by field."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("sub_scales", ctypes.c_void_p),
        ("sub_mins", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def available() -> tuple[bool, str]:
    """Whether the library is in use, and where it is or why it is not."""
    if os.environ.get("ZAYA_QUANT_NATIVE") == "0":
        return False, "ZAYA_QUANT_NATIVE=0"
    library, reason = _load()
    return library is not None, reason


def isa() -> str:
    """The instruction set in use: one of ISAS, or "reference" without the library."""
    return ISAS[_library().zq_best_isa()] if available()[0] else "reference"


def supported_isas() -> tuple[str, ...]:
    """What this machine can run; empty without the library."""
    return ISAS[: _library().zq_best_isa() + 1] if available()[0] else ()


def quantize(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, isa: str | None = None
) -> QuantTensor:
    """``affine.quantize_affine`` for symmetric specs and tensors on the CPU."""
    affine.check_weight(weight)
    if not spec.symmetric:
        raise ValueError("the native library quantizes symmetric specs only")
    chosen = _isa_code(isa)
    rows, columns = weight.shape
    weight = _host(weight)
    if importance is not None:
        importance = affine.scaled_importance(importance, columns)
    length = spec.group_length(columns)
    ratios = torch.tensor(affine.scale_ratios(spec.bits, length), dtype=torch.float32)
    scale_dtype = SCALE_DTYPES[spec.scale_dtype]
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty((rows, spec.groups(columns)), dtype=scale_dtype)
    request = _Request(
        weight=weight.data_ptr(),
        importance=None if importance is None else importance.data_ptr(),
        ratios=ratios.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        rows=rows,
        columns=columns,
        group_length=length,
        dtype=_DTYPE_CODES[weight.dtype],
        scale_dtype=_DTYPE_CODES[scale_dtype],
        bits=spec.bits,
        ratio_count=len(ratios),
        both_signs=affine.tries_both_signs(spec.bits),
        refinements=affine.REFINEMENTS,
    )
    index = ctypes.c_int64(-1)
    status = _library().zq_quantize(ctypes.byref(request), chosen, ctypes.byref(index))
    _raise_for(status, index.value, columns, spec)
    return QuantTensor(codes, scales, None, spec)


def search_blocks(
    weight: Tensor,
    value: BlockTensor,
    importance: Tensor | None,
    ratios: Sequence[float],
    scales: Sequence[float],
    minima: Sequence[float],
    reach: Sequence[int],
    isa: str | None = None,
) -> None:
    """Fill ``value`` with what ``block_search`` finds; ``importance`` is float32, contiguous."""
    lists = [torch.tensor(values, dtype=torch.float32) for values in (ratios, scales, minima)]
    turns = torch.tensor(reach, dtype=torch.int32)
    request = _block_request(weight, value, value.spec.type)
    request.importance = None if importance is None else importance.data_ptr()
    request.ratios, request.scale_ratios, request.minimum_ratios = (t.data_ptr() for t in lists)
    request.ratio_count, request.scale_count, request.minimum_count = map(len, lists)
    request.reach, request.turn_count = turns.data_ptr(), len(turns)
    _quantize_blocks(request, value, plain=False, isa=isa)


def plain_blocks(weight: Tensor, value: Quantized, isa: str | None = None) -> None:
    """Fill ``value`` with what ``blocks.absmax`` computes, for types of whole blocks of 32."""
    request = _block_request(weight, value, value.spec.ggml_type)
    _quantize_blocks(request, value, plain=True, isa=isa)


def pack_blocks(value: Quantized, type: str, scales: Tensor) -> Tensor:
    """``blocks.pack``, ``scales [out, blocks]`` those of the blocks of ``type``."""
    weights, size = BLOCK_TYPES[type]
    rows, columns = value.shape
    packed = torch.empty((rows, columns // weights * size), dtype=torch.uint8)
    held = [None if t is None else _host(t) for t in (value.codes, scales, *_block_parts(value))]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in held]
    blocks = _Blocks(packed.data_ptr(), *pointers, rows * columns // weights, _BLOCK_CODES[type])
    if not _library().zq_pack_blocks(ctypes.byref(blocks)):
        value.validate_codes()
        raise ValueError(f"a code does not fit {type}")
    return packed


def unpack_blocks(data: Tensor, value: Quantized) -> None:
    """Fill ``value`` from the bytes of its type."""
    data = _host(data)
    type = value.spec.ggml_type
    tensors = (value.codes, value.scales, *_block_parts(value))
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    count = value.codes.numel() // BLOCK_TYPES[type][0]
    blocks = _Blocks(data.data_ptr(), *pointers, count, _BLOCK_CODES[type])
    _library().zq_unpack_blocks(ctypes.byref(blocks))


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """``pack.pack_int32`` of a checked int8 matrix; raises ValueError at a code out of range."""
    rows, columns = codes.shape
    codes = _host(codes)
    packed = torch.empty((rows, -(-columns * bits // 32)), dtype=torch.int32)
    bad = _library().zq_pack(codes.data_ptr(), packed.data_ptr(), rows, columns, bits)
    if bad >= 0:
        row, column = divmod(bad, columns)
        raise out_of_range(codes, row, column, bits)
    return packed


def unpack_int32(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """``pack.unpack_int32`` of a checked int32 matrix."""
    packed = _host(packed)
    codes = torch.empty((packed.shape[0], in_features), dtype=torch.int8)
    rows, columns = codes.shape
    _library().zq_unpack(packed.data_ptr(), codes.data_ptr(), rows, columns, bits)
    return codes


def absmax_span(weight: Tensor, group_length: int) -> tuple[float, float]:
    """The smallest nonzero and the largest absmax of the groups, 0.0 where there is none."""
    affine.check_weight(weight)
    weight = _host(weight)
    rows, columns = weight.shape
    span = torch.zeros(2, dtype=torch.int32)
    bad = _library().zq_absmax_span(
        weight.data_ptr(), _DTYPE_CODES[weight.dtype], rows, columns, group_length, span.data_ptr()
    )
    if bad >= 0:
        raise affine.non_finite(*divmod(bad, columns))
    patterns = span if weight.dtype == torch.float32 else span.to(torch.int16)
    low, high = patterns.view(weight.dtype).tolist()
    return low, high


def overflows(type: str, row: int, block: int) -> ValueError:
    """The error for a block whose every scale overflows."""
    return ValueError(
        f"no float16 scale is large enough for row {row}, block {block} of {type}; use another type"
    )


def out_of_range(codes: Tensor, row: int, column: int, bits: int) -> ValueError:
    """The error for a code that does not fit."""
    code = int(codes[row, column])
    return ValueError(f"code {code} at row {row}, column {column} does not fit {bits} bits")


def _isa_code(isa: str | None) -> int:
    best = _library().zq_best_isa()
    chosen = best if isa is None else ISAS.index(isa)
    if chosen > best:
        raise ValueError(f"this machine cannot run {isa}; it can: {', '.join(ISAS[: best + 1])}")
    return chosen


def _block_parts(value: Quantized) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """offsets, sub_scales, sub_mins."""
    if isinstance(value, QuantTensor):
        return None, None, None
    return value.offsets, value.sub_scales, value.sub_mins


def _block_request(weight: Tensor, value: Quantized, type: str) -> _BlockRequest:
    """Everything but the lists; ``weight`` must be contiguous and outlive the call."""
    rows, columns = weight.shape
    tensors = (value.codes, value.scales, *_block_parts(value))
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return _BlockRequest(
        weight.data_ptr(),
        *pointers,
        rows=rows,
        columns=columns,
        dtype=_DTYPE_CODES[weight.dtype],
        type=_BLOCK_CODES[type],
    )


def _quantize_blocks(
    request: _BlockRequest, value: Quantized, *, plain: bool, isa: str | None
) -> None:
    index = ctypes.c_int64(-1)
    status = _library().zq_quantize_blocks(
        ctypes.byref(request), plain, _isa_code(isa), ctypes.byref(index)
    )
    if status == _NOT_REPRESENTABLE and isinstance(value, BlockTensor):
        row, block = divmod(index.value, value.scales.shape[1])
        raise overflows(value.spec.type, row, block)
    spec = value.spec if isinstance(value, QuantTensor) else None
    _raise_for(status, index.value, value.shape[1], spec)


def _host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    if tensor.device.type != "cpu":
        raise ValueError(f"the native library needs a tensor on the CPU, not on {tensor.device}")
    return tensor


def _raise_for(status: int, index: int, columns: int, spec: QuantSpec | None) -> None:
    if status == _NON_FINITE:
        raise affine.non_finite(*divmod(index, columns))
    if status == _NOT_REPRESENTABLE and spec is not None:
        raise affine.not_representable(*divmod(index, spec.groups(columns)), spec)
    if status == _NO_MEMORY:
        raise MemoryError("libzaya_quant could not allocate its scratch memory")
    if status != _OK:
        raise RuntimeError(f"libzaya_quant returned status {status}")


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"libzaya_quant is not available: {reason}")
    return library


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    return shared_library.load(
        "zaya_quant", zaya_quant.__path__, "zq_abi_version", _ABI_VERSION, _SIGNATURES
    )


_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES = {
    "zq_best_isa": (_I32, []),
    "zq_quantize": (_I32, [_POINTER, _I32, _POINTER]),
    "zq_quantize_blocks": (_I32, [_POINTER, _I32, _I32, _POINTER]),
    "zq_pack_blocks": (_I32, [_POINTER]),
    "zq_unpack_blocks": (None, [_POINTER]),
    "zq_pack": (_I64, [_POINTER, _POINTER, _I64, _I64, _I32]),
    "zq_unpack": (None, [_POINTER, _POINTER, _I64, _I64, _I32]),
    "zq_absmax_span": (_I64, [_POINTER, _I32, _I64, _I64, _I64, _POINTER]),
}
