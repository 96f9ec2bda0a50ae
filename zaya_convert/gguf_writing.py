"""Writing of GGUF headers that ``gguf_header`` reads."""

import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

from zaya_convert.gguf_format import (
    ALIGNMENT_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    GGML_TYPES,
    KIND_IDS,
    MAX_HEADER_BYTES,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NUMBERS,
    MAX_STRINGS,
    MAX_TENSORS,
    SCALARS,
    SHOWN,
    START,
    U32,
    U64,
    aligned,
    alignment_problem,
    data_bytes,
    key_problem,
    name_problem,
    shape_problem,
    type_problem,
)


def build_header(
    metadata: Sequence[tuple[str, str, Any]],
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]],
    alignment: int = DEFAULT_ALIGNMENT,
) -> bytes:
    """A header of version 3, padded to the alignment: the data follows.

    Args:
        metadata: key, kind and value. Kinds: u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 bool str, and
            arrays of them: ``[str]``, ``[f32]``. An alignment other than 32 must be among them.
        tensors: name, type, shape as torch has it, and offset from the start of the data. Each
            begins where the one before it ends, rounded up to the alignment.
        alignment: of the offsets.

    Raises:
        ValueError: anything that ``read_gguf`` would refuse, or would read back as something else.
    """
    _check_listing(metadata, tensors, alignment)
    parts = [START.pack(b"GGUF", 3, len(tensors), len(metadata))]
    parts += [_packed_entry(*entry) for entry in metadata]
    end = 0
    for name, dtype, shape, offset in tensors:
        if offset != aligned(end, alignment):
            raise ValueError(
                f"tensor {name!r} has offset {offset}; it must be {aligned(end, alignment)}"
            )
        parts.append(_packed_info(name, dtype, shape, offset))
        end = offset + data_bytes(dtype, shape)
        if end >= 1 << 63:
            raise ValueError(f"tensor {name!r} ends beyond 2^63 bytes")
    _check_limits(metadata)
    raw = b"".join(parts)
    if len(raw) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(raw)} bytes; at most {MAX_HEADER_BYTES} are read")
    return raw.ljust(aligned(len(raw), alignment), b"\0")


def _check_listing(
    metadata: Sequence[tuple[str, str, Any]],
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]],
    alignment: int,
) -> None:
    """Everything that no single entry shows."""
    for what, names, limit in (
        ("keys", [entry[0] for entry in metadata], MAX_KEYS),
        ("tensors", [entry[0] for entry in tensors], MAX_TENSORS),
    ):
        if len(names) > limit:
            raise ValueError(f"{len(names)} {what}; at most {limit} are read")
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"{twice[0]!r} is twice among the {what}")
    if sum(len(key) for key, _, _ in metadata) > MAX_KEY_BYTES:
        raise ValueError(f"more than {MAX_KEY_BYTES >> 20} MiB of keys are not read")
    if problem := alignment_problem(alignment):
        raise ValueError(f"the alignment {problem}")
    said = next((entry[1:] for entry in metadata if entry[0] == ALIGNMENT_KEY), None)
    if said != ("u32", alignment) and (said is not None or alignment != DEFAULT_ALIGNMENT):
        raise ValueError(f"alignment {alignment} needs {ALIGNMENT_KEY} of kind u32 to say so")


def _check_limits(metadata: Sequence[tuple[str, str, Any]]) -> None:
    arrays = [(kind, len(value)) for _, kind, value in metadata if kind.startswith("[")]
    strings = sum(size for kind, size in arrays if kind == "[str]")
    numbers = sum(size for kind, size in arrays if kind != "[str]")
    if strings > MAX_STRINGS or numbers > MAX_NUMBERS:
        raise ValueError(
            f"{strings} strings and {numbers} numbers in arrays; "
            f"at most {MAX_STRINGS} and {MAX_NUMBERS} are read"
        )


def _packed_entry(key: str, kind: str, value: Any) -> bytes:
    if problem := key_problem(key):
        raise ValueError(f"key {key[:SHOWN]!r} {problem}")
    element = kind[1:-1] if kind.startswith("[") and kind.endswith("]") else kind
    if element not in KIND_IDS:
        raise ValueError(f"key {key!r} has the unknown kind {kind!r}")
    head, number = _packed_text(key), U32.pack(KIND_IDS[element])
    try:
        if element == kind:
            return head + number + _packed_values(kind, [value])
        if isinstance(value, (str, bytes)):
            raise TypeError("a sequence of values is needed")
        count = U64.pack(len(value))
        return head + U32.pack(ARRAY) + number + count + _packed_values(element, value)
    except (TypeError, OverflowError, UnicodeEncodeError, struct.error) as error:
        raise ValueError(f"the value of {key!r} does not fit {kind}: {error}") from None


def _packed_values(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "str":
        return b"".join(map(_packed_text, values))
    if any(isinstance(value, bool) != (kind == "bool") for value in values):
        raise TypeError("bool is not a number, nor a number a bool")
    return struct.pack(f"<{len(values)}{SCALARS[kind][1]}", *values)


def _packed_text(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not a str")
    raw = text.encode()
    return U64.pack(len(raw)) + raw


def _packed_info(name: str, dtype: str, shape: tuple[int, ...], offset: int) -> bytes:
    problem = name_problem(name) or type_problem(dtype) or shape_problem(dtype, shape)
    if problem:
        raise ValueError(f"tensor {name!r} {problem}")
    dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    number = U32.pack(GGML_TYPES[dtype][0])
    return _packed_text(name) + U32.pack(len(shape)) + dims + number + U64.pack(offset)
