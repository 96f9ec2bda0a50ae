"""Strict reading of GGUF headers: metadata, tensor names, types and byte ranges.

**What a hostile header can do.** Every count and length is bounded by the bytes that follow it
before it is used. A header is read in pieces and checked, with nothing kept but where the values
are; they are decoded when they are asked for. So a file that is refused, at whichever byte or for
whatever it says, costs its header's bytes and no more. ``MAX_...`` bound what an accepted one
costs; the vocabulary and merges of a tokenizer with 262,144 tokens need half of them at most.
"""

import codecs
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from zaya_convert.errors import InputError
from zaya_convert.gguf_format import (
    ALIGNMENT_KEY,
    ARRAY,
    DEFAULT_ALIGNMENT,
    KIND_NAMES,
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_KEY,
    MAX_KEY_BYTES,
    MAX_KEYS,
    MAX_NAME,
    MAX_NUMBERS,
    MAX_STRINGS,
    MAX_TENSORS,
    OTHER_TYPES,
    SCALARS,
    SHOWN,
    START,
    TYPE_NAMES,
    U32,
    U64,
    Value,
    aligned,
    alignment_problem,
    data_bytes,
    key_problem,
    name_problem,
    shape_problem,
    type_problem,
)
from zaya_convert.headers import RawTensor

_CHUNK = 1 << 18  # bytes fetched, or checked, at a time
_SHORT = 1 << 20  # bytes of a value that is neither a vocabulary nor the like
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


class _Cursor:
    """A position in a header, whose bytes are fetched from the file when they are first needed."""

    def __init__(self, file: BinaryIO, where: str, size: int) -> None:
        self.where = where
        self.size = size
        self.pos = 0
        self.buffer = bytearray()
        self.strings = MAX_STRINGS  # that arrays may still hold
        self.numbers = MAX_NUMBERS
        self.key_bytes = MAX_KEY_BYTES
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
        length = self.number(U64, f"the length of {what}")
        begin, self.pos = self.pos, self.pos + length
        if length <= limit:  # else no need to fetch it: it is refused
            self.need(self.pos, what)
            return bytes(self.buffer[begin : self.pos])
        self.need(begin + limit + 1, what)
        return bytes(self.buffer[begin : begin + limit + 1])

    def spans(self, count: int, what: str) -> Iterator[tuple[int, int]]:
        """Where the strings of an array begin and end. The hot loop: half a million merges."""
        buffer, unpack, have = self.buffer, U64.unpack_from, len(self.buffer)
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
        code = SCALARS[kind.strip("[]")][1]
        numbers = struct.unpack_from(f"<{count}{code}", self._buffer, begin)
        return list(numbers) if kind.startswith("[") else numbers[0]

    def bytes(self, key: str) -> int:
        """Bytes that a value has in the file, 0 when there is none."""
        entry = self._entries.get(key)
        return entry.end - entry.begin if entry else 0

    def _texts(self, begin: int, count: int) -> Iterator[str]:
        buffer, unpack = self._buffer, U64.unpack_from
        for _ in range(count):
            start = begin + U64.size
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
        limit = f"{MAX_KEY_BYTES >> 20} MiB of keys"
        cursor.key_bytes = _spend(cursor, cursor.key_bytes, len(key), limit)
        entries[key] = _entry(cursor, f"key {key!r}")
    infos: dict[str, _Info] = {}
    for index in range(tensor_count):
        info = _info(cursor, index)
        if info.name in infos:
            raise cursor.error(f"tensor {info.name!r} is listed twice")
        infos[info.name] = info
    alignment = _alignment(cursor, entries.get(ALIGNMENT_KEY))
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
    cursor.need(min(cursor.size, START.size), "the magic number")
    if cursor.buffer[:4] != b"GGUF":
        raise cursor.error(
            f"not a GGUF file: it begins with {bytes(cursor.buffer[:4])!r}, not b'GGUF'"
        )
    cursor.need(START.size, "the start of the header")
    _, version, tensors, keys = START.unpack_from(cursor.buffer)
    if version and version & 0xFFFF == 0:
        raise cursor.error("a big-endian GGUF file; only little-endian ones are supported")
    if version not in (2, 3):
        hint = ": convert the model again with a current converter" if version == 1 else ""
        raise cursor.error(f"GGUF version {version} is not supported, 2 and 3 are{hint}")
    cursor.pos = START.size
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
    raw = cursor.text(what, MAX_KEY)
    key = raw.decode("latin-1")  # what is not ASCII is refused next
    if problem := key_problem(key):
        shown = f"{raw[:SHOWN]!r}" + ("..." if len(raw) > SHOWN else "")
        raise cursor.error(f"key {shown} at byte {begin} {problem}")
    return key


def _entry(cursor: _Cursor, what: str) -> _Entry:
    """Check a value and pass over it."""
    number = cursor.number(U32, f"the value type of {what}")
    if number == ARRAY:
        return _array(cursor, what)
    kind = _kind(cursor, number, what)
    begin = cursor.pos
    if kind == "str":
        cursor.check_strings(1, what)
    else:
        _check_numbers(cursor, kind, 1, what)
    return _Entry(kind, begin, cursor.pos, 1)


def _array(cursor: _Cursor, what: str) -> _Entry:
    number = cursor.number(U32, f"the element type of {what}")
    if number == ARRAY:
        raise cursor.error(f"{what} is an array of arrays, which is not supported")
    kind = _kind(cursor, number, what)
    count = cursor.number(U64, f"the element count of {what}")
    least = 8 if kind == "str" else struct.calcsize("<" + SCALARS[kind][1])
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
    if number not in KIND_NAMES:
        raise cursor.error(f"{what} has the unknown value type {number} before byte {cursor.pos}")
    return KIND_NAMES[number]


def _spend(cursor: _Cursor, left: int, count: int, limit: str) -> int:
    if count > left:
        raise cursor.error(f"more than {limit}: so large a header is not read")
    return left - count


def _check_numbers(cursor: _Cursor, kind: str, count: int, what: str) -> None:
    begin = cursor.pos
    cursor.pos += count * struct.calcsize("<" + SCALARS[kind][1])
    cursor.need(cursor.pos, what)
    if kind != "bool":
        return
    rest = cursor.buffer[begin : cursor.pos].translate(None, b"\x00\x01")
    if rest:
        raise cursor.error(f"{what} has {rest[0]} for a bool; only 0 and 1 are allowed")


def _info(cursor: _Cursor, index: int) -> _Info:
    """One tensor's entry, with a type and a shape that are possible."""
    begin, what = cursor.pos, f"tensor {index}"
    name = _tensor_name(cursor, cursor.text(f"the name of {what}", MAX_NAME), begin, index)
    what = f"tensor {name!r}"
    count = cursor.number(U32, f"the number of dimensions of {what}")
    if not 1 <= count <= MAX_DIMS:  # before it is used
        raise cursor.error(f"{what} has {count} dimensions; 1 to {MAX_DIMS} are allowed")
    dims = [cursor.number(U64, f"the shape of {what}") for _ in range(count)]
    shape = tuple(reversed(dims))
    number = cursor.number(U32, f"the type of {what}")
    dtype = TYPE_NAMES.get(number) or OTHER_TYPES.get(number, f"of the unknown type {number}")
    offset = cursor.number(U64, f"the offset of {what}")
    if problem := type_problem(dtype) or shape_problem(dtype, shape):
        raise cursor.error(f"{what} {problem}")
    return _Info(name, dtype, shape, offset)


def _tensor_name(cursor: _Cursor, raw: bytes, begin: int, index: int) -> str:
    at = f"tensor {index} at byte {begin}"
    if len(raw) > MAX_NAME:
        raise cursor.error(f"{at} has a name of more than {MAX_NAME} bytes: {raw!r}...")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        raise cursor.error(f"{at} has a name that is not UTF-8: {raw!r}") from None
    if problem := name_problem(name):
        raise cursor.error(f"{at} {problem}: {name!r}")
    return name


def _alignment(cursor: _Cursor, entry: _Entry | None) -> int:
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.kind != "u32":
        raise cursor.error(f"{ALIGNMENT_KEY} is of type {entry.kind}; it must be u32")
    alignment = U32.unpack_from(cursor.buffer, entry.begin)[0]
    if problem := alignment_problem(alignment):
        raise cursor.error(f"{ALIGNMENT_KEY} {problem}")
    return alignment


def _placed(
    path: Path, cursor: _Cursor, infos: list[_Info], alignment: int
) -> dict[str, RawTensor]:
    """The tensors with absolute byte ranges, which tile the data but for the padding."""
    start = aligned(cursor.pos, alignment)
    places = {
        info.name: RawTensor(
            info.name, info.dtype, info.shape, path,
            start + info.offset, start + info.offset + data_bytes(info.dtype, info.shape),
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
