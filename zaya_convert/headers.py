"""Strict reading of safetensors headers: names, dtypes, shapes and byte ranges, no weights.

A safetensors file is ``u64 header_length (little endian) · JSON header · data``. Every tensor has
``{"dtype", "shape", "data_offsets": [begin, end]}`` relative to the data section, which the
tensors must cover without holes or overlaps (https://github.com/huggingface/safetensors#format).

Headers are read here, and not through the library, because a converter must name the file and the
tensor at fault, refuse duplicate names, and work on files that are larger than memory without
mapping them. Everything a hostile header can lie about is checked before it is used.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zaya_convert.errors import InputError

DTYPE_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
# Two to a byte. Nothing reads them, but whoever refuses them should be able to name the tensor.
_NIBBLES = ("F4",)
FLOAT_DTYPES = ("F32", "F16", "BF16")

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_DIM = 1 << 40


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor as a file declares it. ``begin``/``end`` are absolute byte offsets."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Read and check one safetensors header.

    Returns:
        The tensors by name in file order, and the ``__metadata__`` strings.

    Raises:
        InputError: the file is truncated, oversized, malformed, or lies about its contents.
    """
    size, raw = _header_bytes(path)
    table = parse_json_object(raw, path.name)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError("__metadata__ must map strings to strings", path.name)
    data_start = 8 + len(raw)
    tensors = {name: _entry(path, name, entry, data_start) for name, entry in table.items()}
    _check_coverage(path, tensors, data_start, size)
    return tensors, metadata


def parse_json_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object, refusing duplicate keys and absurd nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            name = next(k for k, _ in pairs if k in seen or seen.add(k))
            raise InputError(f"{name!r} is listed twice", where)
        return result

    try:
        value = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where) from None
    if not isinstance(value, dict):
        raise InputError("expected a JSON object", where)
    return value


def _header_bytes(path: Path) -> tuple[int, bytes]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block for ever
            raise InputError("not a regular file", path.name)
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(status.st_size - 8, MAX_HEADER_BYTES):
                raise InputError(
                    f"truncated or not a safetensors file: {status.st_size} bytes on disk, "
                    f"header of {length if len(prefix) == 8 else '?'} bytes promised",
                    path.name,
                )
            return status.st_size, file.read(length)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path.name) from None


def _entry(path: Path, name: str, entry: object, data_start: int) -> RawTensor:
    where = f"{path.name}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError("needs exactly dtype, shape and data_offsets", where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in (*DTYPE_BYTES, *_NIBBLES):
        raise InputError(f"unknown dtype {dtype!r}", where)
    if not _naturals(shape) or max(shape, default=0) > _MAX_DIM or len(shape) > 8:
        raise InputError(f"bad shape {shape!r}", where)
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"bad data_offsets {offsets!r}", where)
    count = 1
    for dim in shape:
        count *= dim
    size = -(-count // 2) if dtype in _NIBBLES else count * DTYPE_BYTES[dtype]
    if size != offsets[1] - offsets[0]:
        raise InputError(
            f"shape {shape} as {dtype} is {size} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}",
            where,
        )
    return RawTensor(
        name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1]
    )


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_coverage(path: Path, tensors: dict[str, RawTensor], start: int, size: int) -> None:
    """The tensors must tile the data section exactly: truncation, holes and overlaps all show."""
    position = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != position:
            kind = "overlaps the tensor before it" if tensor.begin < position else "follows a hole"
            raise InputError(f"{kind} at byte {tensor.begin}", f"{path.name}: {tensor.name!r}")
        position = tensor.end
        if position > size:
            raise InputError(
                f"truncated: tensor {tensor.name!r} ends at byte {position}, "
                f"the file has {size}; fetch it again",
                path.name,
            )
    if position != size:
        raise InputError(f"{size - position} stray bytes after the last tensor", path.name)
