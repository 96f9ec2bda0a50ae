"""Strict header reading: whatever a file claims, we get its true tensors or an ``InputError``."""

import contextlib
import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zaya_convert.errors import InputError
from zaya_convert.headers import MAX_HEADER_BYTES, parse_json_object, read_header


def file_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


VALID = file_bytes(
    {
        "__metadata__": {"format": "pt"},
        "a.weight": entry([2, 3], 0, 24),
        "b": entry([5], 24, 34, "BF16"),
        "scalar": entry([], 34, 38),
        "empty": entry([0, 7], 38, 38),
    },
    bytes(range(38)),
)


@pytest.fixture
def write(tmp_path: Path):
    def run(raw: bytes) -> Path:
        path = tmp_path / "shard.safetensors"
        path.write_bytes(raw)
        return path

    return run


def test_a_valid_file_reads_as_declared(write) -> None:
    path = write(VALID)
    tensors, metadata = read_header(path)
    start = 8 + int.from_bytes(VALID[:8], "little")
    assert metadata == {"format": "pt"}
    assert {n: (t.dtype, t.shape, t.begin - start, t.end - start) for n, t in tensors.items()} == {
        "a.weight": ("F32", (2, 3), 0, 24),
        "b": ("BF16", (5,), 24, 34),
        "scalar": ("F32", (), 34, 38),
        "empty": ("F32", (0, 7), 38, 38),
    }
    assert all(tensor.file == path and tensor.name == name for name, tensor in tensors.items())


ABUSE: dict[str, tuple[bytes, str]] = {
    "zero length": (b"", "truncated"),
    "seven bytes": (b"\x01" * 7, "truncated"),
    "only a length": ((10).to_bytes(8, "little"), "truncated"),
    "empty header": (file_bytes(b""), "not valid JSON"),
    "length beyond the file": (file_bytes({}, length=500), "truncated"),
    "length of 2^64 - 1": (b"\xff" * 8 + b"{}", "truncated"),
    "length short by one": (file_bytes({"a": entry([1], 0, 4)}, b"1234", 50), "not valid JSON"),
    "not JSON": (file_bytes(b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff\xfe": 1}'), "not valid JSON"),
    "an array": (file_bytes([1, 2]), "expected a JSON object"),
    "a number": (file_bytes(7), "expected a JSON object"),
    "20,000 nested arrays": (file_bytes(b"[" * 20_000 + b"]" * 20_000), "not valid JSON"),
    "20,000 nested objects": (
        file_bytes(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
        "not valid JSON",
    ),
    "a million digits": (file_bytes(b'{"a": ' + b"9" * 1_000_000 + b"}"), "not valid JSON"),
    "duplicate tensor": (
        file_bytes(b'{"twin":%b,"twin":%b}' % (b"{}", b"{}")),
        "'twin' is listed twice",
    ),
    "duplicate field": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"),
        "'dtype' is listed twice",
    ),
    "metadata not strings": (file_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata not an object": (file_bytes({"__metadata__": []}), "__metadata__"),
    "entry not an object": (file_bytes({"a": [1]}), "'a'"),
    "entry incomplete": (file_bytes({"a": {"dtype": "F32", "shape": []}}), "'a'"),
    "entry with an extra field": (
        file_bytes({"a": entry([1], 0, 4) | {"strides": [1]}}, b"1234"),
        "'a'",
    ),
    "unknown dtype": (file_bytes({"a": entry([1], 0, 4, "F33")}, b"1234"), "unknown dtype 'F33'"),
    "dtype not a string": (file_bytes({"a": entry([1], 0, 4, ["F32"])}, b"1234"), "unknown dtype"),
    "negative dimension": (file_bytes({"a": entry([-1], 0, 4)}, b"1234"), "bad shape"),
    "float dimension": (file_bytes({"a": entry([1.0], 0, 4)}, b"1234"), "bad shape"),
    "boolean dimension": (file_bytes({"a": entry([True], 0, 4)}, b"1234"), "bad shape"),
    "shape not a list": (file_bytes({"a": entry(1, 0, 4)}, b"1234"), "bad shape"),
    "dimension of 2^62": (file_bytes({"a": entry([1 << 62], 0, 4)}, b"1234"), "bad shape"),
    # in 64 bits this product is 0, in ours it is what it is
    "product overflows": (file_bytes({"a": entry([1 << 32, 1 << 32], 0, 0)}), "bytes"),
    "dimensions without end": (file_bytes({"a": entry([1] * 100_000, 0, 4)}, b"1234"), "bad shape"),
    "negative offset": (file_bytes({"a": entry([1], -4, 0)}, b"1234"), "bad data_offsets"),
    "offsets reversed": (file_bytes({"a": entry([1], 4, 0)}, b"1234"), "bad data_offsets"),
    "three offsets": (
        file_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
        "bad data_offsets",
    ),
    "shape disagrees with offsets": (file_bytes({"a": entry([2], 0, 4)}, b"1234"), "8 bytes"),
    "overlap": (
        file_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
        "'b': overlaps",
    ),
    "same range twice": (
        file_bytes({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
        "overlaps",
    ),
    "hole": (file_bytes({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "hole"),
    "hole at the start": (file_bytes({"a": entry([1], 4, 8)}, bytes(8)), "hole"),
    "truncated data": (file_bytes({"a": entry([4], 0, 16)}, bytes(15)), "truncated: tensor 'a'"),
    "trailing bytes": (file_bytes({"a": entry([1], 0, 4)}, bytes(5)), "1 stray bytes"),
    "no tensors but data": (file_bytes({}, b"x"), "1 stray bytes"),
}


@pytest.mark.parametrize("name", ABUSE)
def test_abuse_is_refused_fast_and_small_naming_file(write, name: str) -> None:
    raw, expected = ABUSE[name]
    path = write(raw)
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        read_header(path)
    seconds = time.monotonic() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "shard.safetensors" in str(caught.value)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 2_000
    assert seconds < 1
    assert peak < 100 << 20


def test_a_header_length_beyond_the_cap_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(1 << 31)
    with pytest.raises(InputError, match="sparse"):
        read_header(path)


def test_what_is_no_regular_file_is_refused_without_blocking(tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe.safetensors", tmp_path / "folder.safetensors"
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (pipe, folder, tmp_path / "absent.safetensors"):
        with pytest.raises(InputError, match=path.name):
            read_header(path)


def test_odd_tensor_names_are_kept_and_shown_escaped(write) -> None:
    name = "../\x00\n\ud800\u202e" + "x" * 300
    tensors, _ = read_header(write(file_bytes({name: entry([1], 0, 4)}, b"1234")))
    assert list(tensors) == [name]
    with pytest.raises(InputError) as caught:
        read_header(write(file_bytes({name: entry([1], 0, 4)}, b"123")))
    str(caught.value).encode()  # printable on any terminal
    assert "\n" not in str(caught.value)


def check_against_library(path: Path, raw: bytes) -> None:
    """Ours may be stricter than the safetensors library, never more lenient, never another type."""
    safetensors = pytest.importorskip("safetensors")
    path.write_bytes(raw)
    try:
        tensors, _ = read_header(path)
    except InputError:
        return
    theirs = dict(safetensors.deserialize(raw))
    assert set(tensors) == set(theirs)
    for name, tensor in tensors.items():
        assert list(tensor.shape) == theirs[name]["shape"]
        assert tensor.dtype == theirs[name]["dtype"]
        assert raw[tensor.begin : tensor.end] == bytes(theirs[name]["data"])


fuzzing = settings(
    max_examples=400,
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@fuzzing
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_changed_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for position, value in changes:
        raw[position] = value
    check_against_library(tmp_path / "fuzz.safetensors", bytes(raw))


@fuzzing
@given(st.integers(0, len(VALID)), st.integers(0, 40), st.binary(max_size=40))
def test_spliced_bytes(tmp_path: Path, at: int, cut: int, paste: bytes) -> None:
    check_against_library(tmp_path / "fuzz.safetensors", VALID[:at] + paste + VALID[at + cut :])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
fields = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | json_values,
    }
)


@fuzzing
@given(st.dictionaries(st.text(max_size=8), fields | json_values, max_size=4), st.binary())
def test_made_up_headers(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    check_against_library(tmp_path / "fuzz.safetensors", file_bytes(header, data))


@given(st.binary(max_size=200))
def test_side_file_parser_raises_nothing_else(raw: bytes) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(parse_json_object(raw, "config.json"), dict)
