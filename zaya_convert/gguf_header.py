"""Strict reading and writing of GGUF headers: metadata, tensor names, types and byte ranges.

A GGUF file is, in little-endian order and without gaps::

    "GGUF" · u32 version · u64 tensor count · u64 metadata count
    metadata   key: string · u32 value type · value
    tensors    name: string · u32 n · n x u64 dimension, innermost first · u32 type · u64 offset
    zeros up to a multiple of general.alignment (32 where it is not given)
    data       every tensor at its offset from here, which is a multiple of the alignment

A string is a u64 length and UTF-8; an array is a u32 element type, a u64 count and the elements
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

**What a hostile header can do.** Every count and length is bounded by the bytes that follow it
before it is used. A header is read in pieces and checked, with nothing kept but where the values
are; they are decoded when they are asked for. So a file that is refused, at whichever byte or for
whatever it says, costs its header's bytes and no more. ``MAX_...`` bound what an accepted one
costs; the vocabulary and merges of a tokenizer with 262,144 tokens need half of them at most.
"""

import codecs
import math
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zaya_convert.errors import InputError
from zaya_convert.files import contained
from zaya_convert.headers import RawTensor
from zaya_quant.spec import BLOCK_TYPES

_FLOAT_TYPES = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}
_TYPE_IDS = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q3_K": 11,
    "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30,
}  # fmt: skip
# Type name: type id, weights per block, bytes per block.
GGML_TYPES: dict[str, tuple[int, int, int]] = {
    name: (number, *(_FLOAT_TYPES | BLOCK_TYPES)[name]) for name, number in _TYPE_IDS.items()
}
_TYPE_NAMES = {number: name for name, (number, _, _) in GGML_TYPES.items()}
# Types that exist, or once did, and are not read here: an error should call them by their name.
_OTHER_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

MAX_HEADER_BYTES = 64 << 20  # held while reading; the largest tokenizers need a quarter of it
MAX_TENSORS = 1 << 15
MAX_KEYS = 1 << 14
_MAX_KEY_BYTES = 4 << 20  # of all keys together
MAX_STRINGS = 3 << 19  # in all arrays of a file together; each costs some 80 bytes in memory
MAX_NUMBERS = 1 << 22  # likewise; 8 to 32 bytes
_MAX_PARTS = 1024
_MAX_NAME = 63  # ggml keeps names in 64 bytes, the last of them 0
_MAX_KEY = (1 << 16) - 1
_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_CHUNK = 1 << 18  # bytes fetched, or checked, at a time
_SHOWN = 80  # bytes of a refused key
_SHORT = 1 << 20  # bytes of a value that is neither a vocabulary nor the like

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_STRING, _ARRAY = 8, 9
# Kind of a scalar: type id, struct code. The kind of an array is its elements' in brackets.
_SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"),
    "f64": (12, "d"),
}  # fmt: skip
_KIND_IDS = {kind: number for kind, (number, _) in _SCALARS.items()} | {"str": _STRING}
_KIND_NAMES = {number: kind for kind, number in _KIND_IDS.items()}
_INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_START = struct.Struct("<4sIQQ")
_LEAST_KEY = 8 + 1 + 4 + 1  # bytes of the shortest metadata entry: a key of one letter, a u8
_LEAST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8  # and of the shortest tensor


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself.

    Attributes:
        version: of the format, 2 or 3.
        metadata: plain values by key, in file order; each access decodes anew.
        kinds: by key the exact type of each value, ``u32``, ``str`` or ``[f32]`` for instance.
        tensors: by name in file order; shapes as torch has them, outermost first; byte ranges
            without the padding.
        alignment: of the tensors' offsets.
    """

    version: int
    metadata: Mapping[str, Value]
    kinds: Mapping[str, str]
    tensors: Mapping[str, RawTensor]
    alignment: int

    def short(self, key: str, default: Any = None) -> Any:
        """A value that ought to be a number, a line, or something for each layer.

        Returns:
            The default when there is none, and words instead of a value of more than a MiB, which
            would only cost memory to find out that it is not what it ought to be.
        """
        values = self.metadata
        if isinstance(values, _Values) and values.bytes(key) > _SHORT:
            return f"a value of {values.bytes(key)} bytes"
        return values.get(key, default)

    def entries(self) -> list[tuple[str, str, Value]]:
        """The metadata as ``build_header`` takes it."""
        return [(key, self.kinds[key], value) for key, value in self.metadata.items()]


def aligned(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment


def read_gguf(path: Path) -> GgufHeader:
    """Read and check one file's header; of the data, only the size is looked at.

    Raises:
        InputError: the file is truncated, oversized, malformed, of a version or with a tensor type
            that is not supported, or lies about its contents.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: a pipe would block for ever
            raise InputError("not a regular file", path.name)
        with path.open("rb") as file:
            return _read(path, _Cursor(file, path.name, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path.name) from None


# --- What is allowed: shared by reading and writing, which word the problem differently ---


def _type_problem(dtype: str) -> str:
    if dtype in GGML_TYPES:
        return ""
    return f"is {dtype}, which is not supported; supported: {', '.join(GGML_TYPES)}"


def _shape_problem(dtype: str, shape: Sequence[int]) -> str:
    if not 1 <= len(shape) <= _MAX_DIMS:
        return f"has {len(shape)} dimensions; 1 to {_MAX_DIMS} are allowed"
    if min(shape) < 1:
        return f"has an empty dimension in its shape {list(shape)}"
    _, per_block, block_bytes = GGML_TYPES[dtype]
    if math.prod(shape) * block_bytes >= 1 << 63:  # bounds the bytes as well
        return f"has too many elements: shape {list(shape)}"
    if shape[-1] % per_block:
        return f"has rows of {shape[-1]} values; {dtype} needs a multiple of {per_block}"
    return ""


def _data_bytes(dtype: str, shape: Sequence[int]) -> int:
    _, per_block, block_bytes = GGML_TYPES[dtype]
    return math.prod(shape) // per_block * block_bytes


def _name_problem(name: str) -> str:
    size = len(name.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= _MAX_NAME:
        return f"has a name of {size} bytes; 1 to {_MAX_NAME} are allowed"
    # not only NUL and control characters, but also those that turn a terminal's text around
    return "" if name.isprintable() else "has unprintable characters in its name"


def _key_problem(key: str) -> str:
    if not 1 <= len(key) <= _MAX_KEY:
        return f"has {len(key)} bytes; 1 to {_MAX_KEY} are allowed"
    return "" if key.isascii() and key.isprintable() else "is not printable ASCII"


def _alignment_problem(alignment: int) -> str:
    if 8 <= alignment <= 1 << 16 and alignment & (alignment - 1) == 0:
        return ""
    return f"is {alignment}; a power of two from 8 to 65536 is allowed"


# --- Reading ---


class _Cursor:
    """A position in a header, whose bytes are fetched from the file when they are first needed."""

    def __init__(self, file: BinaryIO, where: str, size: int) -> None:
        self.where = where
        self.size = size
        self.pos = 0
        self.buffer = bytearray()
        self.strings = MAX_STRINGS  # that arrays may still hold
        self.numbers = MAX_NUMBERS
        self.key_bytes = _MAX_KEY_BYTES
        self._file = file

    def error(self, problem: str) -> InputError:
        """One that names the file."""
        return InputError(problem, self.where)

    def need(self, end: int, what: str) -> int:
        """Have all bytes before ``end``; how many there are now."""
        if end > self.size:
            raise self.error(
                f"truncated: {what} would end at byte {end}, the file has {self.size}; "
                "fetch it again"
            )
        if end > MAX_HEADER_BYTES:
            raise self.error(
                f"{what} would end at byte {end}: "
                f"headers of more than {MAX_HEADER_BYTES >> 20} MiB are not read"
            )
        while len(self.buffer) < end:  # in pieces: one large read would take the memory twice
            piece = self._file.read(min(_CHUNK, self.size - len(self.buffer)))
            if not piece:
                raise self.error(f"truncated while it was read, at byte {len(self.buffer)}")
            self.buffer += piece
        return len(self.buffer)

    def number(self, form: struct.Struct, what: str) -> int:
        """A whole number."""
        begin, self.pos = self.pos, self.pos + form.size
        self.need(self.pos, what)
        return form.unpack_from(self.buffer, begin)[0]

    def text(self, what: str, limit: int) -> bytes:
        """A string's bytes. A longer one than allowed is cut off, one byte past the limit."""
        length = self.number(_U64, f"the length of {what}")
        begin, self.pos = self.pos, self.pos + length
        if length <= limit:  # else no need to fetch it: it is refused
            self.need(self.pos, what)
            return bytes(self.buffer[begin : self.pos])
        self.need(begin + limit + 1, what)
        return bytes(self.buffer[begin : begin + limit + 1])

    def spans(self, count: int, what: str) -> Iterator[tuple[int, int]]:
        """Where the strings of an array begin and end. The hot loop: half a million merges."""
        buffer, unpack, have = self.buffer, _U64.unpack_from, len(self.buffer)
        pos = self.pos
        for index in range(count):
            begin = pos + 8
            if begin > have:
                have = self.need(begin, f"the length of {_element(what, index, count)}")
            pos = begin + unpack(buffer, pos)[0]
            if pos > have:
                have = self.need(pos, _element(what, index, count))
            yield begin, pos
        self.pos = pos

    def check_strings(self, count: int, what: str) -> None:
        """Pass over strings, seeing that each is UTF-8.

        Short ones in a row are checked in one go, with the lengths between them: eight bytes of
        ASCII each, which no character can reach across.
        """
        row, check = self.pos, self._check_utf8
        for begin, end in self.spans(count, what):
            if end - begin > 127:
                if row < begin - 8:
                    check(row, begin - 8, what)
                check(begin, end, what)
                row = end
        check(row, self.pos, what)

    def _check_utf8(self, begin: int, end: int, what: str) -> None:
        """In pieces: decoded whole, a long string may take four times its size."""
        try:
            if end - begin <= _CHUNK:
                self.buffer[begin:end].decode()
                return
            decoder = codecs.getincrementaldecoder("utf-8")()
            for at in range(begin, end, _CHUNK):
                begin = at - len(decoder.getstate()[0])  # of a character cut in two
                stop = min(end, at + _CHUNK)
                decoder.decode(self.buffer[at:stop], final=stop == end)
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 at byte {begin + error.start}") from None


def _element(what: str, index: int, count: int) -> str:
    return f"string {index} of {what}" if count > 1 else what


class _Entry(NamedTuple):
    """Where a metadata value is: its first byte, or its first element's, and its end."""

    kind: str
    begin: int
    end: int
    elements: int


class _Values(Mapping[str, Value]):
    """The values of a header that was checked, decoded when they are asked for."""

    def __init__(self, buffer: bytearray, entries: Mapping[str, _Entry]) -> None:
        self._buffer = buffer
        self._entries = entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, key: str) -> Value:
        kind, begin, _, count = self._entries[key]
        if "str" in kind:
            texts = list(self._texts(begin, count))
            return texts if kind == "[str]" else texts[0]
        code = _SCALARS[kind.strip("[]")][1]
        numbers = struct.unpack_from(f"<{count}{code}", self._buffer, begin)
        return list(numbers) if kind.startswith("[") else numbers[0]

    def bytes(self, key: str) -> int:
        """Bytes that a value has in the file, 0 when there is none."""
        entry = self._entries.get(key)
        return entry.end - entry.begin if entry else 0

    def _texts(self, begin: int, count: int) -> Iterator[str]:
        buffer, unpack = self._buffer, _U64.unpack_from
        for _ in range(count):
            start = begin + _U64.size
            begin = start + unpack(buffer, begin)[0]
            yield buffer[start:begin].decode()


class _Info(NamedTuple):
    """A tensor's entry; ``offset`` from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


def _read(path: Path, cursor: _Cursor) -> GgufHeader:
    version, tensor_count, key_count = _start(cursor)
    entries: dict[str, _Entry] = {}
    for index in range(key_count):
        key = _key(cursor, index)
        if key in entries:
            raise cursor.error(f"key {key!r} is listed twice")
        limit = f"{_MAX_KEY_BYTES >> 20} MiB of keys"
        cursor.key_bytes = _spend(cursor, cursor.key_bytes, len(key), limit)
        entries[key] = _entry(cursor, f"key {key!r}")
    infos: dict[str, _Info] = {}
    for index in range(tensor_count):
        info = _info(cursor, index)
        if info.name in infos:
            raise cursor.error(f"tensor {info.name!r} is listed twice")
        infos[info.name] = info
    alignment = _alignment(cursor, entries.get(_ALIGNMENT_KEY))
    tensors = _placed(path, cursor, list(infos.values()), alignment)
    return GgufHeader(
        version,
        _Values(cursor.buffer, entries),
        {key: entry.kind for key, entry in entries.items()},
        tensors,
        alignment,
    )


def _start(cursor: _Cursor) -> tuple[int, int, int]:
    """Version and the two counts, which the bytes that follow can hold."""
    cursor.need(min(cursor.size, _START.size), "the magic number")
    if cursor.buffer[:4] != b"GGUF":
        raise cursor.error(
            f"not a GGUF file: it begins with {bytes(cursor.buffer[:4])!r}, not b'GGUF'"
        )
    cursor.need(_START.size, "the start of the header")
    _, version, tensors, keys = _START.unpack_from(cursor.buffer)
    if version and version & 0xFFFF == 0:
        raise cursor.error("a big-endian GGUF file; only little-endian ones are supported")
    if version not in (2, 3):
        hint = ": convert the model again with a current converter" if version == 1 else ""
        raise cursor.error(f"GGUF version {version} is not supported, 2 and 3 are{hint}")
    cursor.pos = _START.size
    room = cursor.size - cursor.pos
    if tensors * _LEAST_TENSOR + keys * _LEAST_KEY > room:
        raise cursor.error(
            f"truncated or damaged: {tensors} tensors and {keys} keys promised at byte 8, "
            f"which the {room} bytes that follow cannot hold"
        )
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise cursor.error(
            f"{tensors} tensors and {keys} keys promised; "
            f"at most {MAX_TENSORS} and {MAX_KEYS} are read"
        )
    return version, tensors, keys


def _key(cursor: _Cursor, index: int) -> str:
    begin, what = cursor.pos, f"the name of key {index}"
    raw = cursor.text(what, _MAX_KEY)
    key = raw.decode("latin-1")  # what is not ASCII is refused next
    if problem := _key_problem(key):
        shown = f"{raw[:_SHOWN]!r}" + ("..." if len(raw) > _SHOWN else "")
        raise cursor.error(f"key {shown} at byte {begin} {problem}")
    return key


def _entry(cursor: _Cursor, what: str) -> _Entry:
    """Check a value and pass over it."""
    number = cursor.number(_U32, f"the value type of {what}")
    if number == _ARRAY:
        return _array(cursor, what)
    kind = _kind(cursor, number, what)
    begin = cursor.pos
    if kind == "str":
        cursor.check_strings(1, what)
    else:
        _check_numbers(cursor, kind, 1, what)
    return _Entry(kind, begin, cursor.pos, 1)


def _array(cursor: _Cursor, what: str) -> _Entry:
    number = cursor.number(_U32, f"the element type of {what}")
    if number == _ARRAY:
        raise cursor.error(f"{what} is an array of arrays, which is not supported")
    kind = _kind(cursor, number, what)
    count = cursor.number(_U64, f"the element count of {what}")
    least = 8 if kind == "str" else struct.calcsize("<" + _SCALARS[kind][1])
    room = cursor.size - cursor.pos
    if count * least > room:
        raise cursor.error(
            f"truncated or damaged: {what} promises {count} elements at byte {cursor.pos}, "
            f"which the {room} bytes that follow cannot hold"
        )
    begin = cursor.pos
    if kind == "str":
        cursor.strings = _spend(cursor, cursor.strings, count, f"{MAX_STRINGS} strings in arrays")
        cursor.check_strings(count, what)
    else:
        cursor.numbers = _spend(cursor, cursor.numbers, count, f"{MAX_NUMBERS} numbers in arrays")
        _check_numbers(cursor, kind, count, what)
    return _Entry(f"[{kind}]", begin, cursor.pos, count)


def _kind(cursor: _Cursor, number: int, what: str) -> str:
    if number not in _KIND_NAMES:
        raise cursor.error(f"{what} has the unknown value type {number} before byte {cursor.pos}")
    return _KIND_NAMES[number]


def _spend(cursor: _Cursor, left: int, count: int, limit: str) -> int:
    if count > left:
        raise cursor.error(f"more than {limit}: so large a header is not read")
    return left - count


def _check_numbers(cursor: _Cursor, kind: str, count: int, what: str) -> None:
    begin = cursor.pos
    cursor.pos += count * struct.calcsize("<" + _SCALARS[kind][1])
    cursor.need(cursor.pos, what)
    if kind != "bool":
        return
    rest = cursor.buffer[begin : cursor.pos].translate(None, b"\x00\x01")
    if rest:
        raise cursor.error(f"{what} has {rest[0]} for a bool; only 0 and 1 are allowed")


def _info(cursor: _Cursor, index: int) -> _Info:
    """One tensor's entry, with a type and a shape that are possible."""
    begin, what = cursor.pos, f"tensor {index}"
    name = _tensor_name(cursor, cursor.text(f"the name of {what}", _MAX_NAME), begin, index)
    what = f"tensor {name!r}"
    count = cursor.number(_U32, f"the number of dimensions of {what}")
    if not 1 <= count <= _MAX_DIMS:  # before it is used
        raise cursor.error(f"{what} has {count} dimensions; 1 to {_MAX_DIMS} are allowed")
    dims = [cursor.number(_U64, f"the shape of {what}") for _ in range(count)]
    shape = tuple(reversed(dims))
    number = cursor.number(_U32, f"the type of {what}")
    dtype = _TYPE_NAMES.get(number) or _OTHER_TYPES.get(number, f"of the unknown type {number}")
    offset = cursor.number(_U64, f"the offset of {what}")
    if problem := _type_problem(dtype) or _shape_problem(dtype, shape):
        raise cursor.error(f"{what} {problem}")
    return _Info(name, dtype, shape, offset)


def _tensor_name(cursor: _Cursor, raw: bytes, begin: int, index: int) -> str:
    at = f"tensor {index} at byte {begin}"
    if len(raw) > _MAX_NAME:
        raise cursor.error(f"{at} has a name of more than {_MAX_NAME} bytes: {raw!r}...")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise cursor.error(f"{at} has a name that is not UTF-8: {raw!r}") from None
    if problem := _name_problem(name):
        raise cursor.error(f"{at} {problem}: {name!r}")
    return name


def _alignment(cursor: _Cursor, entry: _Entry | None) -> int:
    if entry is None:
        return _DEFAULT_ALIGNMENT
    if entry.kind != "u32":
        raise cursor.error(f"{_ALIGNMENT_KEY} is of type {entry.kind}; it must be u32")
    alignment = _U32.unpack_from(cursor.buffer, entry.begin)[0]
    if problem := _alignment_problem(alignment):
        raise cursor.error(f"{_ALIGNMENT_KEY} {problem}")
    return alignment


def _placed(
    path: Path, cursor: _Cursor, infos: list[_Info], alignment: int
) -> dict[str, RawTensor]:
    """The tensors with absolute byte ranges, which tile the data but for the padding."""
    start = aligned(cursor.pos, alignment)
    places = {
        info.name: RawTensor(
            info.name, info.dtype, info.shape, path,
            start + info.offset, start + info.offset + _data_bytes(info.dtype, info.shape),
        )
        for info in infos
    }  # fmt: skip
    end, before = cursor.pos, ""
    for tensor in sorted(places.values(), key=lambda place: place.begin):
        if (tensor.begin - start) % alignment:
            raise cursor.error(
                f"tensor {tensor.name!r} begins at byte {tensor.begin}, which is not on a "
                f"multiple of {alignment} from the start of the data at byte {start}"
            )
        if tensor.begin != aligned(end, alignment):
            raise cursor.error(_misplaced(tensor, places.get(before), end, alignment))
        end, before = tensor.end, tensor.name
        if end > cursor.size:
            raise cursor.error(
                f"truncated: tensor {tensor.name!r} ends at byte {end}, "
                f"the file has {cursor.size}; fetch it again"
            )
    # the padding after the last tensor may be there, in part or not at all: writers differ
    if cursor.size > aligned(end, alignment):
        last = f"tensor {before!r}" if before else "the header"
        raise cursor.error(f"{cursor.size - end} stray bytes after the end of {last} at byte {end}")
    return places


def _misplaced(tensor: RawTensor, before: RawTensor | None, end: int, alignment: int) -> str:
    what = f"tensor {tensor.name!r}"
    if before and tensor.begin == before.begin:
        return f"{what} begins at byte {tensor.begin}, and so does tensor {before.name!r}"
    if before and tensor.begin < end:
        return (
            f"{what} at byte {tensor.begin} overlaps tensor {before.name!r}, "
            f"which ends at byte {end}"
        )
    hole = aligned(end, alignment)
    return f"{what} at byte {tensor.begin} follows a hole of {tensor.begin - hole} bytes"


# --- Models in several files ---

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
_NUMBER_KEY, _COUNT_KEY, _TOTAL_KEY = "split.no", "split.count", "split.tensors.count"
# What parts of one model need not share.
_OF_ONE_PART = (_NUMBER_KEY, _COUNT_KEY, _ALIGNMENT_KEY)


def read_gguf_set(path: Path) -> tuple[GgufHeader, tuple[Path, ...]]:
    """Read a model in one file or, given any of its parts, in several.

    Returns:
        The tensors of all parts with the metadata of the first, which has all of it; and the
        files in order.

    Raises:
        InputError: a file ``read_gguf`` refuses, missing parts, parts that do not belong together.
    """
    header = read_gguf(path)
    named = _PART_NAME.fullmatch(path.name)
    count = header.short(_COUNT_KEY, 0)
    # 1 is a split into one; 0 is what merging the parts into one file leaves behind
    if header.kinds.get(_COUNT_KEY, "u16") in _INTEGERS and count in (0, 1):
        if named and int(named["count"]) > 1:
            raise InputError(
                f"is named as one part of several, but {_COUNT_KEY} does not say so", path.name
            )
        return header, (path,)
    if not named:
        raise InputError(
            f"{_COUNT_KEY} is {count!r}, but the name is not like NAME-00001-of-00002.gguf, "
            "so the other parts cannot be found",
            path.name,
        )
    number, count = int(named["number"]), int(named["count"])
    if problem := _part_problem(header, number, count):
        raise InputError(problem, path.name)
    return _read_parts(header, path, named["stem"], count)


def _read_parts(
    header: GgufHeader, path: Path, stem: str, count: int
) -> tuple[GgufHeader, tuple[Path, ...]]:
    """All parts; the metadata of all but the first is let go as soon as it is compared."""
    first: GgufHeader | None = None
    tensors: dict[str, RawTensor] = {}
    paths: list[Path] = []
    problems: list[str] = []
    for number in range(1, count + 1):
        name = f"{stem}-{number:05}-of-{count:05}.gguf"
        try:
            paths.append(contained(path.parent, name))
            part = header if name == path.name else read_gguf(paths[-1])
        except InputError as error:
            problems.append(str(error))
            continue
        first = part if number == 1 else first
        found = (_part_problem(part, number, count), *_disagreements(first, part))
        problems += [f"{name}: {problem}" for problem in found if problem]
        problems += _add_tensors(tensors, part)
    total = header.metadata[_TOTAL_KEY]
    if not problems and len(tensors) != total:
        problems.append(f"{len(tensors)} tensors in all parts, {_TOTAL_KEY} is {total}")
    if problems or first is None:
        raise InputError(problems, stem)
    whole = GgufHeader(first.version, first.metadata, first.kinds, tensors, first.alignment)
    return whole, tuple(paths)


def _add_tensors(tensors: dict[str, RawTensor], part: GgufHeader) -> list[str]:
    others = [tensors.setdefault(name, tensor) for name, tensor in part.tensors.items()]
    return [
        f"tensor {own.name!r} is in {other.file.name} and in {own.file.name}"
        for own, other in zip(part.tensors.values(), others, strict=True)
        if own is not other
    ]


def _part_problem(header: GgufHeader, number: int, count: int) -> str:
    """What is wrong with the numbers of the part that is named ``number`` of ``count``."""
    for key in (_NUMBER_KEY, _COUNT_KEY, _TOTAL_KEY):
        if header.kinds.get(key) not in _INTEGERS:
            return f"{key} is {'not a whole number' if key in header.kinds else 'missing'}"
    said = (header.metadata[_NUMBER_KEY], header.metadata[_COUNT_KEY])
    if said != (number - 1, count):
        return (
            f"{_NUMBER_KEY} and {_COUNT_KEY} are {said[0]} and {said[1]}, "
            f"by its name they should be {number - 1} and {count}"
        )
    return f"{count} parts; at most {_MAX_PARTS} are read" if count > _MAX_PARTS else ""


def _disagreements(first: GgufHeader | None, part: GgufHeader) -> list[str]:
    """Where a part contradicts the first one: it is of another model, or another split of it."""
    if first is None:
        return []
    return [
        f"{key} differs from that of the first part"
        for key, kind in part.kinds.items()
        if key in first.kinds and key not in _OF_ONE_PART
        and (first.kinds[key] != kind or first.metadata[key] != part.metadata[key])
    ]  # fmt: skip


# --- Writing ---


def build_header(
    metadata: Sequence[tuple[str, str, Any]],
    tensors: Sequence[tuple[str, str, tuple[int, ...], int]],
    alignment: int = _DEFAULT_ALIGNMENT,
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
    parts = [_START.pack(b"GGUF", 3, len(tensors), len(metadata))]
    parts += [_packed_entry(*entry) for entry in metadata]
    end = 0
    for name, dtype, shape, offset in tensors:
        if offset != aligned(end, alignment):
            raise ValueError(
                f"tensor {name!r} has offset {offset}; it must be {aligned(end, alignment)}"
            )
        parts.append(_packed_info(name, dtype, shape, offset))
        end = offset + _data_bytes(dtype, shape)
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
    if sum(len(key) for key, _, _ in metadata) > _MAX_KEY_BYTES:
        raise ValueError(f"more than {_MAX_KEY_BYTES >> 20} MiB of keys are not read")
    if problem := _alignment_problem(alignment):
        raise ValueError(f"the alignment {problem}")
    said = next((entry[1:] for entry in metadata if entry[0] == _ALIGNMENT_KEY), None)
    if said != ("u32", alignment) and (said is not None or alignment != _DEFAULT_ALIGNMENT):
        raise ValueError(f"alignment {alignment} needs {_ALIGNMENT_KEY} of kind u32 to say so")


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
    if problem := _key_problem(key):
        raise ValueError(f"key {key[:_SHOWN]!r} {problem}")
    element = kind[1:-1] if kind.startswith("[") and kind.endswith("]") else kind
    if element not in _KIND_IDS:
        raise ValueError(f"key {key!r} has the unknown kind {kind!r}")
    head, number = _packed_text(key), _U32.pack(_KIND_IDS[element])
    try:
        if element == kind:
            return head + number + _packed_values(kind, [value])
        if isinstance(value, (str, bytes)):
            raise TypeError("a sequence of values is needed")
        count = _U64.pack(len(value))
        return head + _U32.pack(_ARRAY) + number + count + _packed_values(element, value)
    except (TypeError, OverflowError, UnicodeEncodeError, struct.error) as error:
        raise ValueError(f"the value of {key!r} does not fit {kind}: {error}") from None


def _packed_values(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "str":
        return b"".join(map(_packed_text, values))
    if any(isinstance(value, bool) != (kind == "bool") for value in values):
        raise TypeError("bool is not a number, nor a number a bool")
    return struct.pack(f"<{len(values)}{_SCALARS[kind][1]}", *values)


def _packed_text(text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not a str")
    raw = text.encode()
    return _U64.pack(len(raw)) + raw


def _packed_info(name: str, dtype: str, shape: tuple[int, ...], offset: int) -> bytes:
    problem = _name_problem(name) or _type_problem(dtype) or _shape_problem(dtype, shape)
    if problem:
        raise ValueError(f"tensor {name!r} {problem}")
    dims = struct.pack(f"<{len(shape)}Q", *reversed(shape))
    number = _U32.pack(GGML_TYPES[dtype][0])
    return _packed_text(name) + _U32.pack(len(shape)) + dims + number + _U64.pack(offset)
