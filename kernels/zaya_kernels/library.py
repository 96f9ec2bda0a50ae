"""``libzaya_kernels``: products with quantized weights on the CPU, loaded with ctypes.

``src/zaya_kernels.h`` is its interface. Where it is not there, ``load`` tells why, and the table of
kernels chooses another body.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache

import torch

import zaya_kernels
from zaya_quant import shared_library

_ABI_VERSION = 5
_ARM = platform.machine().lower() in ("aarch64", "arm64")
ISAS = ("neon", "dotprod") if _ARM else ("base", "avx2", "avx512")


class Matrix(ctypes.Structure):
    """``zk::Matrix``, field by field."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("form", ctypes.c_int32),
    )


class Source(ctypes.Structure):
    """``zk::Source``, field by field."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("outer_scales", ctypes.c_void_p),
        ("outer_offsets", ctypes.c_void_p),
        ("group", ctypes.c_int64),
        ("outer", ctypes.c_int64),
        ("bias", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Options(ctypes.Structure):
    """``zk::Options``, field by field."""

    _fields_ = (
        ("fast", ctypes.c_int32),
        ("isa", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class Region(ctypes.Structure):
    """``zk::Region``, field by field."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))


class Run(ctypes.Structure):
    """``zk::Run``, field by field."""

    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
    )


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and where it is or why it is not."""
    return shared_library.load(
        "zaya_kernels", zaya_kernels.__path__, "zk_abi_version", _ABI_VERSION, _SIGNATURES
    )


def library() -> ctypes.CDLL:
    """The library.

    Raises:
        RuntimeError: it is not there.
    """
    found, reason = load()
    if found is None:
        raise RuntimeError(f"libzaya_kernels is not available: {reason}")
    return found


@cache
def supported_isas() -> tuple[str, ...]:
    """What this machine can run, the best one last; empty without the library."""
    found, _ = load()
    return () if found is None else ISAS[: found.zk_best_isa() + 1]


def check(status: int) -> None:
    """Raise for what a call returned."""
    if status:
        raise MemoryError("libzaya_kernels could not allocate its scratch memory")


def options(fast: bool, isa: str | None = None) -> Options:
    """How a call runs, on as many threads as torch uses.

    Args:
        isa: one of ``supported_isas``; None: the best.

    Raises:
        ValueError: this machine cannot run that.
    """
    return _options(fast, isa, torch.get_num_threads())


@cache
def _options(fast: bool, isa: str | None, threads: int) -> Options:
    supported = supported_isas()
    if isa is not None and isa not in supported:
        raise ValueError(f"this machine cannot run {isa}; it can: {', '.join(supported)}")
    chosen = ISAS.index(isa or supported[-1])
    return Options(int(fast), chosen, max(1, threads), 0)


_POINTER, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES = {
    "zk_best_isa": (_I32, []),
    "zk_packed_bytes": (_I64, [_POINTER]),
    "zk_layout_version": (_I32, []),
    "zk_pack": (None, [_POINTER, _POINTER, _I32]),
    "zk_unpack_rows": (None, [_POINTER, _POINTER, _I64, _POINTER]),
    "zk_read": (ctypes.c_uint32, [_POINTER, _I64, _I32]),
    "zk_linear": (_I32, [_POINTER, _POINTER, _I64, _POINTER, _POINTER, _POINTER]),
    "zk_moe_ffn": (_I32, [_POINTER, _I64, *[_POINTER] * 5]),
    "zk_decode": (_I32, [_POINTER] * 8),
}
