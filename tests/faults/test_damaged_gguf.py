"""Damaged and hostile GGUF files: each is refused at once, in little memory, with its reason.

Files are put together byte by byte, and not by our own writer, which refuses most of them.
"""

import os
import random
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from zaya_convert.errors import InputError
from zaya_convert.gguf_header import read_gguf
from zaya_convert.gguf_parts import read_gguf_set

U8, BOOL, STR, ARRAY = 0, 7, 8, 9
F32, F16, Q4_0, Q2_K, Q4_K, IQ2_XS, MXFP4 = 0, 1, 2, 10, 12, 17, 39
HUGE = (1 << 64) - 1
ROOT = Path(__file__).resolve().parents[2]
SECONDS, MEMORY = 1, 100 << 20


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def text(value: bytes | str, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def key(name: bytes | str, kind: int = U8, value: bytes = b"\7") -> bytes:
    return text(name) + u32(kind) + value


def array(name: str, kind: int, count: int, elements: bytes = b"") -> bytes:
    return key(name, ARRAY, u32(kind) + u64(count) + elements)


def tensor(
    name: bytes | str, dims: list[int], kind: int = F32, offset: int = 0, count: int | None = None
) -> bytes:
    n = len(dims) if count is None else count
    return text(name) + u32(n) + u64(*dims) + u32(kind) + u64(offset)


def gguf(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 0,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    magic: bytes = b"GGUF",
    alignment: int = 32,
) -> bytes:
    """A file with so many bytes of data; the tensor and key counts may lie."""
    keys, tensors = keys or [], tensors or []
    head = magic + u32(version) + u64(*(counts or (len(tensors), len(keys))))
    raw = head + b"".join(keys) + b"".join(tensors)
    return raw + bytes(-len(raw) % alignment) + bytes(data) if data else raw


BAD_UTF8 = b"ok\xc3"
DEEP = b"".join(u32(ARRAY) + u64(1) for _ in range(20_000))
# of a name cut off: what comes after it
TAIL = bytes(200)

HOSTILE: dict[str, tuple[bytes, str]] = {
    # the start
    "zero length": (b"", "not a GGUF file"),
    "two bytes": (b"GG", "not a GGUF file"),
    "only the magic": (b"GGUF", "truncated: the start of the header would end at byte 24"),
    "counts cut off": (gguf()[:20], "truncated: the start of the header would end at byte 24"),
    "safetensors": ((120).to_bytes(8, "little") + b"{}" + TAIL, "not a GGUF file"),
    "older format": (b"tjgg" + TAIL, "it begins with b'tjgg'"),
    "magic backwards": (gguf(magic=b"FUGG"), "it begins with b'FUGG'"),
    "version 0": (gguf(version=0), "GGUF version 0 is not supported, 2 and 3 are"),
    "version 1": (gguf(version=1), "GGUF version 1 is not supported, 2 and 3 are: convert"),
    "version 4": (gguf(version=4), "GGUF version 4 is not supported"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "a web page": (b"<!DOCTYPE html><html>", "it begins with b'<!DO'"),
    # counts
    "2^64 - 1 tensors": (gguf(counts=(HUGE, 0)) + TAIL, f"{HUGE} tensors and 0 keys promised"),
    "2^64 - 1 keys": (gguf(counts=(0, HUGE)) + TAIL, f"0 tensors and {HUGE} keys promised"),
    "counts that overflow together": (
        gguf(counts=(1 << 63, 1 << 63)) + TAIL,
        "which the 200 bytes that follow cannot hold",
    ),
    "one key too many": (gguf([key("a")], counts=(0, 2)), "cannot hold"),
    "a key where a tensor should be": (
        gguf([key("a"), key("b"), key("c", STR, text("x" * 40))], counts=(1, 2)),
        "tensor 'c' has 8 dimensions",
    ),
    # keys
    "empty key": (gguf([key("")]) + TAIL, "key b'' at byte 24 has 0 bytes"),
    "key of 65536 bytes": (gguf([key("k" * 65_536)]), "has 65536 bytes; 1 to 65535"),
    "key length of 2^64 - 1": (gguf([text("k", HUGE) + TAIL]), "truncated: the name of key 0"),
    "key length beyond the file": (gguf([text("k", 300) + TAIL]), "the name of key 0 would end"),
    "key not ASCII": (gguf([key("ключ")]), "at byte 24 is not printable ASCII"),
    "key not UTF-8": (gguf([key(b"k\xff")]), r"key b'k\xff' at byte 24 is not printable ASCII"),
    "NUL in a key": (gguf([key("a\0b")]), r"key b'a\x00b' at byte 24 is not printable"),
    "newline in a key": (gguf([key("a\nb")]), "is not printable ASCII"),
    "key twice": (gguf([key("twin"), key("other"), key("twin")]), "key 'twin' is listed twice"),
    # values
    "unknown value type": (gguf([key("a", 13)]), "key 'a' has the unknown value type 13"),
    "value type of 2^32 - 1": (gguf([key("a", (1 << 32) - 1)]), "unknown value type 4294967295"),
    "value cut off": (gguf([key("a", 12, b"1234567")]), "truncated: key 'a' would end at byte 45"),
    "bool of 2": (gguf([key("a", BOOL, b"\2")]), "key 'a' has 2 for a bool"),
    "text not UTF-8": (gguf([key("a", STR, text(BAD_UTF8))]), "key 'a' is not UTF-8 at byte 47"),
    "long text not UTF-8": (
        gguf([key("a", STR, text("é" * 300_001 + "\0" + "é" * 9) + b"")])[:-2] + b"\xff\0",
        "key 'a' is not UTF-8 at byte 600064",
    ),
    "text with a surrogate": (
        gguf([key("a", STR, text(b"\xed\xa0\x80"))]),
        "key 'a' is not UTF-8 at byte 45",
    ),
    "text length of 2^64 - 1": (
        gguf([key("a", STR, text("x", HUGE))]) + TAIL,
        "truncated: key 'a' would end at byte 18446744073709551660",
    ),
    "text length beyond the file": (gguf([key("a", STR, text("x", 2))]), "key 'a' would end"),
    # arrays
    "array of 2^64 - 1 numbers": (
        gguf([array("a", U8, HUGE)]) + TAIL,
        f"key 'a' promises {HUGE} elements at byte 49, which the 200 bytes",
    ),
    "array of 2^61 u64: 2^64 bytes": (gguf([array("a", 10, 1 << 61)]) + TAIL, "cannot hold"),
    "array of 10^8 bytes": (gguf([array("a", U8, 10**8)]) + TAIL, "promises 100000000 elements"),
    "array of 2^64 - 1 strings": (gguf([array("a", STR, HUGE)]) + TAIL, "cannot hold"),
    "one element too many": (gguf([array("a", 4, 3, u32(1, 2))]), "promises 3 elements"),
    "unknown element type": (gguf([array("a", 77, 1)]) + TAIL, "unknown value type 77"),
    "array of arrays": (gguf([array("a", ARRAY, 1, u32(U8) + u64(0))]), "is an array of arrays"),
    "20,000 nested arrays": (gguf([key("a", ARRAY, DEEP)]), "key 'a' is an array of arrays"),
    "array with a bad bool": (gguf([array("a", BOOL, 4, b"\0\1\x80\1")]), "has 128 for a bool"),
    "string length that lies, in an array": (
        gguf([array("a", STR, 3, text("x") + text("y", 1 << 40) + TAIL)]),
        "truncated: string 1 of key 'a' would end at byte",
    ),
    "string lengths cut off": (
        gguf([array("a", STR, 3, text("x" * 20) + b"1234")]),
        "the length of string 1 of key 'a'",
    ),
    "string not UTF-8, in an array": (
        gguf([array("a", STR, 3, text("x") + text(BAD_UTF8) + text("y"))]),
        "key 'a' is not UTF-8 at byte 68",
    ),
    "long string not UTF-8, in an array": (
        gguf([array("a", STR, 2, text("x") + text(b"y" * 300 + b"\x80"))]),
        "key 'a' is not UTF-8 at byte 366",
    ),
    # half a character each, which would be a whole one but for the length between them
    "character across two strings": (
        gguf([array("a", STR, 2, text(b"\xc3") + text(b"\xa9" * 0xA9))]),
        "key 'a' is not UTF-8 at byte 57",
    ),
    "length that completes a character": (
        gguf([array("a", STR, 2, text(b"ab\xc3") + text(b"x" * 0xA9))]),
        "key 'a' is not UTF-8 at byte 59",
    ),
    # alignment
    "alignment 0": (gguf([key("general.alignment", 4, u32(0))]), "general.alignment is 0"),
    "alignment 4": (gguf([key("general.alignment", 4, u32(4))]), "general.alignment is 4"),
    "alignment 48": (gguf([key("general.alignment", 4, u32(48))]), "a power of two from 8"),
    "alignment 2^31": (gguf([key("general.alignment", 4, u32(1 << 31))]), "is 2147483648"),
    "alignment as u64": (gguf([key("general.alignment", 10, u64(32))]), "is of type u64"),
    "alignment as text": (gguf([key("general.alignment", STR, text("32"))]), "is of type str"),
    # tensor entries
    "empty tensor name": (gguf([], [tensor("", [8])], 32), "at byte 24 has a name of 0 bytes"),
    "tensor name of 64 bytes": (gguf([], [tensor("n" * 64, [8])], 32), "more than 63 bytes"),
    "tensor name of 1 MB": (gguf([], [tensor("n" * 10**6, [8])], 32), "more than 63 bytes"),
    "tensor name of 2^64 - 1 bytes": (
        gguf([], [text("n", HUGE)]) + TAIL,
        "tensor 0 at byte 24 has a name of more than 63 bytes",
    ),
    "tensor name not UTF-8": (gguf([], [tensor(b"n\xff", [8])], 32), "name that is not UTF-8"),
    "NUL in a tensor name": (gguf([], [tensor("a\0", [8])], 32), "unprintable characters"),
    "escape codes in a tensor name": (gguf([], [tensor("\x1b[2J", [8])], 32), r"'\x1b[2J'"),
    "right-to-left in a tensor name": (gguf([], [tensor("a\u202e", [8])], 32), r"'a\u202e'"),
    "tensor twice": (
        gguf([], [tensor("a", [8]), tensor("a", [8], offset=32)], 64),
        "tensor 'a' is listed twice",
    ),
    "no dimensions": (gguf([], [tensor("a", [])], 32), "tensor 'a' has 0 dimensions"),
    "five dimensions": (gguf([], [tensor("a", [1] * 5)], 32), "tensor 'a' has 5 dimensions"),
    "2^32 - 1 dimensions": (
        gguf([], [tensor("a", [8], count=(1 << 32) - 1)], 32),
        "tensor 'a' has 4294967295 dimensions; 1 to 4 are allowed",
    ),
    "dimension of 0": (gguf([], [tensor("a", [8, 0])], 32), "empty dimension in its shape [0, 8]"),
    "dimension of 2^64 - 1": (gguf([], [tensor("a", [HUGE])], 32), "too many elements"),
    # in 64 bits this product is 0, in ours it is what it is
    "product of 2^64": (gguf([], [tensor("a", [1 << 32, 1 << 32])], 32), "too many elements"),
    "product just over 2^64": (
        gguf([], [tensor("a", [(1 << 32) + 1, (1 << 32) + 1])], 32),
        "too many elements",
    ),
    "bytes overflow, elements do not": (
        gguf([], [tensor("a", [1 << 31, 1 << 31])], 32),
        "too many elements",
    ),
    "part of a block": (
        gguf([], [tensor("a", [48, 2], Q4_0)], 64),
        "tensor 'a' has rows of 48 values; Q4_0 needs a multiple of 32",
    ),
    "part of a super-block": (gguf([], [tensor("a", [128, 2], Q4_K)], 144), "multiple of 256"),
    "Q2_K": (
        gguf([], [tensor("a", [256], Q2_K)], 84),
        "tensor 'a' is Q2_K, which is not supported; supported: F32, F16, Q4_0",
    ),
    "IQ2_XS": (gguf([], [tensor("a", [256], IQ2_XS)], 74), "tensor 'a' is IQ2_XS, which is not"),
    "MXFP4": (gguf([], [tensor("a", [32], MXFP4)], 17), "tensor 'a' is MXFP4, which is not"),
    "type removed from the format": (gguf([], [tensor("a", [32], 4)], 20), "'a' is Q4_2, which"),
    "unknown type": (gguf([], [tensor("a", [32], 4242)], 32), "is of the unknown type 4242"),
    "entry cut off": (
        gguf([], [tensor("a", [8]), tensor("b", [8, 1, 1])[:-1]]),
        "truncated: the offset of tensor 'b' would end at byte",
    ),
    # where the tensors are
    "unaligned": (
        gguf([], [tensor("a", [1]), tensor("b", [1], offset=4)], 64),
        "tensor 'b' begins at byte 100, which is not on a multiple of 32",
    ),
    "overlap": (
        gguf([], [tensor("a", [16]), tensor("b", [16], offset=32)], 128),
        "tensor 'b' at byte 128 overlaps tensor 'a', which ends at byte 160",
    ),
    "same place": (
        gguf([], [tensor("a", [16]), tensor("b", [16])], 64),
        "tensor 'b' begins at byte 96, and so does tensor 'a'",
    ),
    "inside another": (
        gguf([], [tensor("a", [64]), tensor("b", [8], offset=64)], 256),
        "tensor 'b' at byte 160 overlaps tensor 'a'",
    ),
    "hole": (
        gguf([], [tensor("a", [8]), tensor("b", [8], offset=96)], 128),
        "tensor 'b' at byte 192 follows a hole of 64 bytes",
    ),
    "hole at the start": (
        gguf([], [tensor("a", [8], offset=32)], 64),
        "tensor 'a' at byte 96 follows a hole of 32 bytes",
    ),
    "offset of 2^64 - 32": (
        gguf([], [tensor("a", [8], offset=HUGE - 31)], 32),
        "tensor 'a' at byte 18446744073709551648 follows a hole",
    ),
    "end wraps round to 0": (
        gguf([], [tensor("a", [8]), tensor("b", [16], offset=HUGE - 31)], 32),
        "tensor 'b' at byte",
    ),
    "no data": (gguf([], [tensor("a", [8])]), "truncated: tensor 'a' ends at byte 96"),
    "truncated data": (
        gguf([], [tensor("a", [8]), tensor("b", [8], offset=32)], 63),
        "truncated: tensor 'b' ends at byte 160, the file has 159",
    ),
    "data of a terabyte promised": (
        gguf([], [tensor("a", [1 << 20, 1 << 18])], 64),
        "truncated: tensor 'a' ends at byte 1099511627872",
    ),
    "bytes beyond the padding": (
        gguf([], [tensor("a", [8])], 33),
        "1 stray bytes after the end of tensor 'a' at byte 96",
    ),
    "another file behind": (
        gguf([], [tensor("a", [4])], 32) + gguf([], [tensor("a", [4])], 32),
        "stray bytes after the end of tensor 'a' at byte 80",
    ),
    "no tensors but data": (gguf([key("a")], [], 64), "stray bytes after the end of the header"),
    "larger alignment than the data has": (
        gguf([key("general.alignment", 4, u32(4096))], [tensor("a", [8])], 64),
        "truncated: tensor 'a' ends at byte 4128",
    ),
}


def checked(message: str, path: Path, seconds: float, peak: int) -> str:
    assert path.name in message
    assert len(message) < 2_000
    assert message.replace("\n", "").isprintable()
    assert seconds < SECONDS
    assert peak < MEMORY
    return message


def refused(path: Path) -> str:
    """The message, after seeing that it comes fast and costs little."""
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        read_gguf(path)
    seconds = time.monotonic() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return checked(str(caught.value), path, seconds, peak)


CHILD = """
import sys, time
from pathlib import Path
from zaya_convert.errors import InputError
from zaya_convert.export.gguf.read import open_gguf
from zaya_convert.gguf_header import read_gguf

def peak():  # and not ru_maxrss, which begins at the parent's
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

before, began, message = peak(), time.process_time(), "accepted"
try:
    {"read": read_gguf, "open": open_gguf}[sys.argv[2]](Path(sys.argv[1]))
except InputError as error:
    message = str(error)
print(time.process_time() - began, peak() - before, message)
"""


def read_elsewhere(path: Path, how: str = "read") -> tuple[str, float, int]:
    """Message, seconds and bytes of a process of its own: tracing would take far longer.

    Seconds are those it worked, for others may be using the processor.
    """
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), how],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'quant'}"},
    )
    seconds, peak, message = done.stdout.rstrip("\n").split(" ", 2)
    return message, float(seconds), int(peak)


def test_the_memory_of_another_process_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(gguf([key("a", STR, text("x" * (20 << 20)))]))
    message, _, peak = read_elsewhere(path)
    assert message == "accepted"
    assert 20 << 20 < peak < 3 * (20 << 20)  # the header; the text is not decoded


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_fast_and_small(tmp_path: Path, name: str) -> None:
    raw, expected = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    assert expected in refused(path)


def test_there_are_enough_of_them_and_none_is_alike() -> None:
    assert len(HOSTILE) >= 40
    assert len({raw for raw, _ in HOSTILE.values()}) == len(HOSTILE)


# --- as large as a file can be without being refused before its end, where the fault is ---

FAULT = key("fault", STR, text(b"\xff"))
ROOM = 63 << 20
LARGE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a text": (
        lambda: gguf([key("a", STR, text("日".encode() * (ROOM // 3))), FAULT]),
        "key 'fault' is not UTF-8",
    ),
    "empty strings": (
        lambda: gguf([array("a", STR, 3 << 19, bytes(8 * (3 << 19))), FAULT]),
        "key 'fault' is not UTF-8",
    ),
    "strings of 33 bytes": (
        lambda: gguf([array("a", STR, 3 << 19, text("x" * 33) * (3 << 19)), FAULT]),
        "key 'fault' is not UTF-8",
    ),
    "short and long strings in turn": (
        lambda: gguf(
            [array("a", STR, ROOM // 144 * 2, (u64(0) + text("é" * 64)) * (ROOM // 144)), FAULT]
        ),
        "key 'fault' is not UTF-8",
    ),
    "numbers": (
        lambda: gguf([array("a", 12, 1 << 22, bytes(8 << 22)), FAULT]),
        "key 'fault' is not UTF-8",
    ),
    "bools": (
        lambda: gguf([array("a", BOOL, 1 << 22, bytes((1 << 22) - 1) + b"\2")]),
        "has 2 for a bool",
    ),
    "keys": (
        lambda: gguf([*(key(f"{i:0200}") for i in range((1 << 14) - 1)), FAULT]),
        "key 'fault' is not UTF-8",
    ),
    "tensors, and a text": (
        lambda: gguf(
            [key("a", STR, text("x" * (60 << 20)))],
            [tensor(f"{i:063}", [32, 1, 1, 1], Q4_0, 32 * i) for i in range(1 << 15)],
            1 << 20,
        )[:-32],
        "truncated: tensor '0",
    ),
    # one more than the limits allow
    "too many keys": (lambda: gguf([key(str(i)) for i in range(16_385)]), "32768 and 16384"),
    "too many tensors": (lambda: gguf(counts=(32_769, 0)) + bytes(33 * 32_769), "at most 32768"),
    "keys too long": (lambda: gguf([key(f"{i:060000}") for i in range(70)]), "more than 4 MiB of"),
    "too many strings": (
        lambda: gguf([array(k, STR, 1 << 20, bytes(8 << 20)) for k in "ab"]),
        "more than 1572864 strings",
    ),
    "too many numbers": (
        lambda: gguf([array(k, U8, 3 << 20, bytes(3 << 20)) for k in "ab"]),
        "more than 4194304 numbers",
    ),
    "too large": (
        lambda: gguf([key(k, STR, text("x" * (33 << 20))) for k in "ab"]),
        "headers of more than 64 MiB are not read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGE)
def test_large_hostile_files_are_refused_fast_and_small(tmp_path: Path, name: str) -> None:
    make, expected = LARGE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(make())
    message, seconds, peak = read_elsewhere(path)
    path.unlink()  # not to fill the disk: pytest keeps folders
    assert expected in checked(message, path, seconds, peak)


# --- headers without a fault, of files that are no model: it costs no more to say so ---

FLOATS = array("tokenizer.ggml.scores", 6, 1 << 22, bytes(4 << 22))
TEXTS = array("tokenizer.ggml.tokens", STR, 3 << 19, text("0123456789") * (3 << 19))
ZAYA = key("general.architecture", STR, text("zaya"))
NO_MODEL: dict[str, tuple[Callable[[], bytes], str]] = {
    "of another architecture": (
        lambda: gguf([key("general.architecture", STR, text("llama")), FLOATS, TEXTS]),
        "its architecture is 'llama'",
    ),
    "of no dialect": (lambda: gguf([ZAYA, FLOATS, TEXTS]), "in no dialect we know"),
    "a long architecture": (
        lambda: gguf([key("general.architecture", STR, text("x" * ROOM))]),
        f"its architecture is 'a value of {ROOM + 8} bytes'",
    ),
    "architectures": (
        lambda: gguf([array("general.architecture", STR, 3 << 19, text("ab") * (3 << 19))]),
        "its architecture is 'a value of 15728640 bytes'",
    ),
    "numbers for all that is one number": (
        lambda: gguf(
            [ZAYA, *(array(f"zaya.{name}", U8, 1 << 20, bytes(1 << 20)) for name in (
                "block_count", "expert_count", "embedding_length",
            )), array("zaya.context_length", 6, 1 << 19, bytes(4 << 19))],
            [tensor("token_embd.weight", [1, 1]), tensor("blk.1.ffn_gate_inp.weight", [1], 0, 32)],
            36,
        ),
        "zaya.context_length is 'a value of 2097152 bytes'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_MODEL)
def test_what_is_no_model_is_refused_fast_and_small(tmp_path: Path, name: str) -> None:
    make, expected = NO_MODEL[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(make())
    message, seconds, peak = read_elsewhere(path, "open")
    path.unlink()
    assert expected in checked(message, path, seconds, peak)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (gguf([text("k", 1 << 40)]), "has 65536 bytes; 1 to 65535 are allowed"),
        (gguf([key("a", STR, u64(1 << 40))]), "headers of more than 64 MiB are not read"),
        (gguf([array("a", U8, 1 << 40)]), "more than 4194304 numbers"),
        (gguf([array("a", STR, 1 << 36)]), "more than 1572864 strings"),
        (gguf([array("a", STR, 2, u64(1 << 40))]), "string 0 of key 'a' would end"),
        (gguf(counts=(1 << 34, 1 << 34)), "at most 32768 and 16384 are read"),
        (gguf([], [text("n", 1 << 40)]), "more than 63 bytes"),
        (gguf(), "stray bytes after the end of the header at byte 24"),
    ],
)
def test_lies_that_a_sparse_file_of_two_terabytes_has_room_for(
    tmp_path: Path, start: bytes, expected: str
) -> None:
    path = tmp_path / "sparse.gguf"
    path.write_bytes(start)
    os.truncate(path, 2 << 40)
    assert expected in refused(path)


def test_what_is_no_regular_file_is_refused_without_blocking(tmp_path: Path) -> None:
    pipe, folder, loop = (tmp_path / f"{name}.gguf" for name in ("pipe", "folder", "loop"))
    os.mkfifo(pipe)
    folder.mkdir()
    loop.symlink_to(loop.name)
    for path in (pipe, folder, loop, tmp_path / "absent.gguf"):
        for read in (read_gguf, read_gguf_set):
            with pytest.raises(InputError, match=path.name):
                read(path)


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shrinking.gguf"
    path.write_bytes(gguf([key("a", STR, text("x" * 10**6))]))
    status = path.stat()
    os.truncate(path, 1000)
    monkeypatch.setattr(os, "fstat", lambda _: status)
    with pytest.raises(InputError, match="truncated while it was read, at byte 1000"):
        read_gguf(path)


# --- any damage whatever ---

SMALL = gguf(
    [
        key("general.architecture", STR, text("zaya")),
        key("general.alignment", 4, u32(32)),
        key("a.flag", BOOL, b"\1"),
        key("a.number", 12, struct.pack("<d", 0.5)),
        array("a.names", STR, 4, text("ein") + text("Wörter" * 30) + text("") + text("日本")),
        array("a.scores", 6, 3, struct.pack("<3f", 0, 1, 2)),
        array("a.flags", BOOL, 3, b"\0\1\0"),
        key("split.count", 2, b"\0\0"),
    ],
    [
        tensor("a.weight", [64, 3], Q4_0),
        tensor("b.weight", [256, 1, 2], Q4_K, 128),
        tensor("c.bias", [7], F16, 128 + 288),
    ],
    128 + 288 + 32,
)


def survives(path: Path, raw: bytes) -> bool:
    """Whether it is read; nothing but InputError may come, and a read file must make sense."""
    path.write_bytes(raw)
    try:
        header, _ = read_gguf_set(path)
    except InputError:
        return False
    assert header.metadata.keys() == header.kinds.keys()
    assert all(0 < t.begin < t.end <= len(raw) for t in header.tensors.values())
    return True


def test_truncations(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.gguf"
    assert survives(path, SMALL)
    padding = 32 - 14  # after the last tensor, which may be missing
    for end in range(0, len(SMALL) - padding, 7):
        path.write_bytes(SMALL[:end])
        with pytest.raises(InputError, match=r"truncated|not a GGUF|cannot hold"):
            read_gguf(path)


def test_every_byte_of_the_header_changed(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.gguf"
    source = random.Random(11)
    for position in range(len(SMALL) - (128 + 288 + 32)):
        value = source.choice([0, 1, 0x7F, 0x80, 0xFF, SMALL[position] ^ 0x20])
        survives(path, SMALL[:position] + bytes([value]) + SMALL[position + 1 :])


def test_random_damage(tmp_path: Path) -> None:
    path = tmp_path / "fuzz.gguf"
    source = random.Random(7)
    for _ in range(500):
        raw = bytearray(SMALL)
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(raw))
            if source.random() < 0.6:
                raw[at] ^= 1 << source.randrange(8)
            elif source.random() < 0.5:
                raw[at : at + 8] = u64(source.choice([0, 1, 255, 1 << 31, 1 << 62, HUGE]))
            else:
                raw[at : at + source.randint(0, 40)] = source.randbytes(source.randint(0, 40))
        survives(path, bytes(raw))
