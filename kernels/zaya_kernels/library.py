"""``libzaya_kernels``: products with quantized weights on the CPU, loaded with ctypes.

It has a plain C interface (``src/zaya_kernels.h``) and is optional: ``load`` tells why it is not
there, and the table of kernels then chooses another body.
"""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import zaya_kernels

_ABI_VERSION = 3
_NAMES = ("libzaya_kernels.so", "libzaya_kernels.dylib")
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


class Run(ctypes.Structure):
    """``zk::Run``, field by field."""

    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
    )


@cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and where it is or why it is not."""
    # An editable install has two folders: the sources, and site-packages with what was built.
    folders = [Path(folder) / "_native" for folder in zaya_kernels.__path__]
    candidates = [folder / name for folder in folders for name in _NAMES]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return None, f"no library in {', '.join(map(str, folders))}"
    try:
        library = ctypes.CDLL(str(path))
        version = library.zk_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load: {error}"
    if version != _ABI_VERSION:
        return None, f"{path} has interface version {version}; this package needs {_ABI_VERSION}"
    _declare(library)
    return library, str(path)


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


def _declare(library: ctypes.CDLL) -> None:
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures = {
        "zk_best_isa": (i32, []),
        "zk_packed_bytes": (i64, [pointer]),
        "zk_layout_version": (i32, []),
        "zk_pack": (None, [pointer, pointer, i32]),
        "zk_unpack_rows": (None, [pointer, pointer, i64, pointer]),
        "zk_read": (ctypes.c_uint64, [pointer, i64, i32]),
        "zk_linear": (i32, [pointer, pointer, i64, pointer, pointer, pointer]),
        "zk_moe_ffn": (i32, [pointer, i64, pointer, pointer, pointer, pointer, pointer]),
        "zk_decode": (i32, [pointer] * 8),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
