"""GGUF headers: what is written is read back, by us and by the gguf package, and vice versa."""

import math
import os
import re
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zaya_convert.errors import InputError
from zaya_convert.export.arrays import size_of
from zaya_convert.gguf_format import (
    GGML_TYPES,
    KIND_NAMES,
    MAX_HEADER_BYTES,
    MAX_NUMBERS,
    MAX_STRINGS,
    OTHER_TYPES,
    aligned,
)
from zaya_convert.gguf_header import GgufHeader, read_gguf
from zaya_convert.gguf_parts import read_gguf_set
from zaya_convert.gguf_writing import build_header

Entry = tuple[str, str, Any]
Listing = list[tuple[str, str, tuple[int, ...], int]]

RANGES = {
    "u8": (0, 2**8 - 1), "i8": (-(2**7), 2**7 - 1), "u16": (0, 2**16 - 1),
    "i16": (-(2**15), 2**15 - 1), "u32": (0, 2**32 - 1), "i32": (-(2**31), 2**31 - 1),
    "u64": (0, 2**64 - 1), "i64": (-(2**63), 2**63 - 1),
}  # fmt: skip
EVERY_KIND: list[Entry] = [
    ("general.architecture", "str", "zaya"),
    *[(f"least.{kind}", kind, least) for kind, (least, _) in RANGES.items()],
    *[(f"most.{kind}", kind, most) for kind, (_, most) in RANGES.items()],
    *[(f"array.{kind}", f"[{kind}]", [*pair, 7]) for kind, pair in RANGES.items()],
    ("a.f32", "f32", 0.5),
    ("a.f64", "f64", 1e300),
    ("a.true", "bool", True),
    ("a.false", "bool", False),
    ("a.text", "str", "Wörter, 日本語\n\0 and 👍"),
    ("a.empty", "str", ""),
    ("array.f32", "[f32]", [0.0, -1.5, math.inf]),
    ("array.f64", "[f64]", [0.1, 2.0]),
    ("array.bool", "[bool]", [True, False, True]),
    ("array.str", "[str]", ["", "▁the", "x" * 500, "é"]),
]
EMPTY_ARRAYS: list[Entry] = [
    (f"empty.{kind}", f"[{kind}]", []) for kind in (*RANGES, "f32", "f64", "bool", "str")
]


def listed(*tensors: tuple[str, str, tuple[int, ...]], alignment: int = 32) -> Listing:
    """Tensors one after the other."""
    listing: Listing = []
    end = 0
    for name, dtype, shape in tensors:
        listing.append((name, dtype, shape, aligned(end, alignment)))
        end = listing[-1][3] + size_of(dtype, shape)
    return listing


def write(path: Path, metadata: list[Entry], tensors: Listing, alignment: int = 32) -> bytes:
    """A whole file, its data bytes counting up, padded at the end as well."""
    last = tensors[-1] if tensors else ("", "F32", (1,), -4)
    size = aligned(last[3] + size_of(last[1], last[2]), alignment)
    data = bytes(i % 251 for i in range(size))
    path.write_bytes(build_header(metadata, tensors, alignment) + data)
    return data


ALL_TYPES = listed(
    *[(f"blk.{i}.weight", dtype, (3, 2, 256)) for i, dtype in enumerate(GGML_TYPES)],
    ("odd", "F16", (7,)),
    ("four", "F32", (2, 3, 1, 5)),
)


def test_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    theirs = {
        kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType
    }
    assert {name: theirs[name] for name in GGML_TYPES} == GGML_TYPES
    others = {number: name for name, (number, *_) in theirs.items() if name not in GGML_TYPES}
    assert others.items() <= OTHER_TYPES.items()
    assert not {number for number, *_ in GGML_TYPES.values()} & set(OTHER_TYPES)


def test_everything_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = EVERY_KIND + EMPTY_ARRAYS
    write(path, metadata, ALL_TYPES)
    header = read_gguf(path)
    assert header.version == 3
    assert header.alignment == 32
    assert header.entries() == metadata
    for key, _, value in metadata:
        assert type(header.metadata[key]) is type(value)
    start = len(build_header(metadata, ALL_TYPES))
    found = [(t.name, t.dtype, t.shape, t.begin - start) for t in header.tensors.values()]
    assert found == ALL_TYPES
    for name, tensor in header.tensors.items():
        assert (tensor.name, tensor.file) == (name, path)
        assert tensor.end - tensor.begin == size_of(tensor.dtype, tensor.shape)


def test_writing_what_was_read_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, EVERY_KIND, ALL_TYPES)
    header = read_gguf(path)
    again = build_header(header.entries(), ALL_TYPES)
    assert path.read_bytes().startswith(again)
    assert len(again) == next(iter(header.tensors.values())).begin


def test_the_gguf_package_reads_ours(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    metadata = [*EVERY_KIND, ("general.alignment", "u32", 64)]
    tensors = listed(*[entry[:3] for entry in ALL_TYPES], alignment=64)
    data = write(path, metadata, tensors, alignment=64)
    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.contents() for key, field in fields.items()} == {
        key: value for key, _, value in metadata
    }
    names = {gguf.GGUFValueType(number).name: kind for number, kind in KIND_NAMES.items()}
    for key, kind, _ in metadata:
        assert names[fields[key].types[-1].name] == kind.strip("[]")
    for theirs, (name, dtype, shape, offset) in zip(reader.tensors, tensors, strict=True):
        assert (theirs.name, theirs.tensor_type.name) == (name, dtype)
        assert tuple(reversed(theirs.shape.tolist())) == shape
        size = size_of(dtype, shape)
        assert theirs.data.tobytes() == data[offset : offset + size]


def add_all(writer: Any, gguf: Any, metadata: list[Entry]) -> None:
    types = {kind: gguf.GGUFValueType(number) for number, kind in KIND_NAMES.items()}
    for key, kind, value in metadata:
        if kind.startswith("["):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, types[kind[1:-1]])
        elif key != "general.architecture":  # which the writer adds itself
            writer.add_key_value(key, value, types[kind])


def write_theirs(path: Path, metadata: list[Entry], arrays: dict[str, Any], **split: Any) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "zaya", **split)
    add_all(writer, gguf, metadata)
    for name, array in arrays.items():
        raw = gguf.GGMLQuantizationType.Q8_0 if array.dtype == np.uint8 else None
        writer.add_tensor(name, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    arrays = {
        "a": np.arange(21, dtype=np.float32).reshape(3, 7),
        "b": np.arange(5, dtype=np.float16),
        "q": np.arange(2 * 68, dtype=np.uint8).reshape(2, 68),  # 2 rows of 2 blocks
    }
    write_theirs(path, EVERY_KIND, arrays)
    header = read_gguf(path)
    assert header.entries() == EVERY_KIND
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "a": ("F32", (3, 7)),
        "b": ("F16", (5,)),
        "q": ("Q8_0", (2, 64)),
    }
    raw = path.read_bytes()
    for name, tensor in header.tensors.items():
        assert raw[tensor.begin : tensor.end] == arrays[name].tobytes()


def test_version_2_differs_in_nothing_but_the_number(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, EVERY_KIND, ALL_TYPES)
    newer = read_gguf(path)
    path.write_bytes(b"GGUF\x02" + path.read_bytes()[5:])
    older = read_gguf(path)
    assert older.version == 2
    assert (older.entries(), older.tensors) == (newer.entries(), newer.tensors)


@pytest.mark.parametrize("missing", [0, 1, 15, 16])
def test_the_padding_at_the_end_may_be_missing(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "model.gguf"
    write(path, [], listed(("a", "F32", (4,))))
    path.write_bytes(path.read_bytes()[: -missing or None])
    assert list(read_gguf(path).tensors) == ["a"]


@pytest.mark.parametrize("missing", [0, 1, 7])
def test_a_file_without_tensors(tmp_path: Path, missing: int) -> None:
    path = tmp_path / "vocab.gguf"
    header = build_header([("k", "u8", 1)], [])
    assert header.endswith(b"\0" * 7)
    path.write_bytes(header[: -missing or None])
    assert read_gguf(path) == GgufHeader(3, {"k": 1}, {"k": "u8"}, {}, 32)


def test_tensors_may_be_listed_in_another_order_than_they_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path, [], listed(("a", "F32", (8,)), ("b", "F32", (8,))))
    swapped = bytearray(path.read_bytes())
    first, second = 24 + 8 + 1 + 4 + 8 + 4, 24 + 33 + 8 + 1 + 4 + 8 + 4  # of the offsets
    swapped[first], swapped[second] = 32, 0
    path.write_bytes(swapped)
    tensors = read_gguf(path).tensors
    assert list(tensors) == ["a", "b"]
    assert tensors["a"].begin == tensors["b"].end


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A file larger than memory: all of it a hole, but for the header."""
    path = tmp_path / "large.gguf"
    tensors = listed(("a", "F32", (1 << 20, 1 << 20)))
    path.write_bytes(build_header([], tensors))
    os.truncate(path, len(build_header([], tensors)) + (4 << 40))
    began = time.monotonic()
    assert read_gguf(path).tensors["a"].shape == (1 << 20, 1 << 20)
    assert time.monotonic() - began < 1


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    tokens = [f"▁tök{i}" for i in range(262_144)]
    metadata: list[Entry] = [
        ("tokenizer.ggml.tokens", "[str]", tokens),
        ("tokenizer.ggml.scores", "[f32]", [-float(i) for i in range(262_144)]),
        ("tokenizer.ggml.token_type", "[i32]", [1] * 262_144),
        ("tokenizer.ggml.merges", "[str]", [f"▁a{i} é{i}" for i in range(520_000)]),
    ]
    path = tmp_path / "vocab.gguf"
    path.write_bytes(build_header(metadata, []))
    began = time.process_time()
    header = read_gguf(path)
    assert time.process_time() - began < 2  # 0.5 s where nothing else runs
    assert header.entries() == metadata


def test_limits_leave_a_large_vocabulary_room() -> None:
    assert MAX_STRINGS >= 2 * (262_144 + 520_000) * 0.99
    assert MAX_NUMBERS >= 4 * 2 * 262_144
    assert MAX_HEADER_BYTES >= 3 * (18 << 20)


# --- made-up headers ---

keys = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
scalars: dict[str, st.SearchStrategy[Any]] = {
    **{kind: st.integers(*pair) for kind, pair in RANGES.items()},
    "f32": st.floats(width=32, allow_nan=False),
    "f64": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "str": texts,
}


@st.composite
def entries(draw: st.DrawFn) -> list[Entry]:
    made: list[Entry] = []
    for key in draw(st.lists(keys, max_size=6, unique=True)):
        kind = draw(st.sampled_from(sorted(scalars)))
        if draw(st.booleans()):
            made.append((key, f"[{kind}]", draw(st.lists(scalars[kind], max_size=6))))
        else:
            made.append((key, kind, draw(scalars[kind])))
    return [entry for entry in made if entry[0] != "general.alignment"]


names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=15)


@st.composite
def listings(draw: st.DrawFn) -> tuple[int, Listing]:
    alignment = draw(st.sampled_from([8, 32, 128]))
    made = []
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(sorted(GGML_TYPES)))
        outer = draw(st.lists(st.integers(1, 3), max_size=3))
        row = draw(st.integers(1, 3)) * GGML_TYPES[dtype][1]
        made.append((name, dtype, (*outer, row)))
    return alignment, listed(*made, alignment=alignment)


@settings(
    max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(entries(), listings())
def test_made_up_headers(tmp_path: Path, metadata: list[Entry], made: tuple[int, Listing]) -> None:
    alignment, tensors = made
    metadata = [*metadata, ("general.alignment", "u32", alignment)]
    path = tmp_path / "made-up.gguf"
    write(path, metadata, tensors, alignment)
    header = read_gguf(path)
    assert header.entries() == metadata
    assert header.alignment == alignment
    start = len(build_header(metadata, tensors, alignment))
    assert start % alignment == 0
    assert tensors == [(t.name, t.dtype, t.shape, t.begin - start) for t in header.tensors.values()]


# --- what is not written ---

F32: Listing = listed(("a", "F32", (8,)))
REFUSED: dict[str, tuple[list[Entry], Listing, int, str]] = {
    "no key": ([("", "u8", 1)], [], 32, "0 bytes"),
    "long key": ([("k" * 65_536, "u8", 1)], [], 32, "65536 bytes"),
    "key not ASCII": ([("schlüssel", "u8", 1)], [], 32, "not printable ASCII"),
    "key not printable": ([("a\nb", "u8", 1)], [], 32, "not printable ASCII"),
    "key twice": ([("k", "u8", 1), ("k", "u8", 2)], [], 32, "'k' is twice"),
    "unknown kind": ([("k", "u128", 1)], [], 32, "unknown kind 'u128'"),
    "half an array": ([("k", "[u8", [1])], [], 32, "unknown kind"),
    "array of arrays": ([("k", "[[u8]]", [[1]])], [], 32, "unknown kind"),
    "too large": ([("k", "u8", 256)], [], 32, "does not fit u8"),
    "negative": ([("k", "u64", -1)], [], 32, "does not fit u64"),
    "float for int": ([("k", "i32", 1.0)], [], 32, "does not fit i32"),
    "bool for int": ([("k", "u8", True)], [], 32, "does not fit u8"),
    "int for bool": ([("k", "bool", 1)], [], 32, "does not fit bool"),
    "text for float": ([("k", "f32", "1")], [], 32, "does not fit f32"),
    "float too large for f32": ([("k", "f32", 1e300)], [], 32, "does not fit f32"),
    "int for text": ([("k", "str", 1)], [], 32, "does not fit str"),
    "lone surrogate": ([("k", "str", "\ud800")], [], 32, "does not fit str"),
    "surrogate in an array": ([("k", "[str]", ["a", "\udfff"])], [], 32, "does not fit"),
    "text for texts": ([("k", "[str]", "abc")], [], 32, "sequence"),
    "number for numbers": ([("k", "[u8]", 1)], [], 32, "does not fit [u8]"),
    "one bad element": ([("k", "[u8]", [1, 256])], [], 32, "does not fit [u8]"),
    "bool among numbers": ([("k", "[u8]", [1, True])], [], 32, "does not fit [u8]"),
    "no tensor name": ([], [("", "F32", (8,), 0)], 32, "name of 0 bytes"),
    "long tensor name": ([], [("ä" * 32, "F32", (8,), 0)], 32, "name of 64 bytes"),
    "NUL in a name": ([], [("a\0", "F32", (8,), 0)], 32, "unprintable"),
    "surrogate in a name": ([], [("\ud800", "F32", (8,), 0)], 32, "unprintable"),
    "tensor twice": ([], [*F32, ("a", "F32", (8,), 32)], 32, "'a' is twice"),
    "type not supported": ([], [("a", "Q2_K", (256,), 0)], 32, "Q2_K, which is not supported"),
    "scalar": ([], [("a", "F32", (), 0)], 32, "0 dimensions"),
    "five dimensions": ([], [("a", "F32", (1,) * 5, 0)], 32, "5 dimensions"),
    "empty": ([], [("a", "F32", (0, 8), 0)], 32, "empty dimension"),
    "negative dimension": ([], [("a", "F32", (-1, -8), 0)], 32, "empty dimension"),
    "too many elements": ([], [("a", "F32", (1 << 32, 1 << 31), 0)], 32, "too many elements"),
    "too many bytes": (
        [],
        listed(*[(str(i), "F32", (1 << 60,)) for i in range(3)]),
        32,
        "'1' ends beyond 2^63",
    ),
    "part of a block": ([], [("a", "Q4_K", (2, 128), 0)], 32, "multiple of 256"),
    "hole": ([], [("a", "F32", (8,), 32)], 32, "has offset 32; it must be 0"),
    "overlap": ([], [*F32, ("b", "F32", (8,), 0)], 32, "has offset 0; it must be 32"),
    "unaligned": ([], [("a", "F32", (1,), 0), ("b", "F32", (1,), 4)], 32, "must be 32"),
    "alignment not a power of two": ([], [], 24, "the alignment is 24"),
    "alignment too small": ([], [], 4, "the alignment is 4"),
    "alignment too large": ([], [], 1 << 17, "the alignment is 131072"),
    "alignment unsaid": ([], [], 64, "needs general.alignment"),
    "alignment said otherwise": ([("general.alignment", "u32", 64)], [], 32, "needs general"),
    "alignment of another kind": ([("general.alignment", "u64", 32)], [], 32, "of kind u32"),
    "too many keys": ([(str(i), "u8", 1) for i in range(16_385)], [], 32, "16385 keys"),
    "too many bytes of keys": (
        [(f"{i:060000}", "u8", 1) for i in range(70)], [], 32, "4 MiB of keys",
    ),
    "too many tensors": ([], [("a", "F32", (8,), 0)] * 32_769, 32, "32769 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_strict_reader_refuses_is_not_written(name: str) -> None:
    metadata, tensors, alignment, expected = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(expected)):
        build_header(metadata, tensors, alignment)


@pytest.mark.parametrize(
    ("kind", "value", "times", "expected"),
    [
        ("[str]", [""], 1_572_865, "1572865 strings"),
        ("[u8]", [0], 4_194_305, "4194305 numbers"),
        ("str", "x", 64 << 20, "a header of 671"),
    ],
)
def test_more_than_a_strict_reader_reads_is_not_written(
    kind: str, value: Any, times: int, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        build_header([("k", kind, value * times)], [])


def test_numpy_values_and_tuples_are_taken() -> None:
    plain = build_header([("a", "[f32]", [1.0, 2.0]), ("b", "[u8]", [1, 2])], [])
    scores, codes = np.array([1.0, 2.0], np.float32), np.array([1, 2], np.uint8)
    assert build_header([("a", "[f32]", scores), ("b", "[u8]", codes)], []) == plain
    assert build_header([("a", "[f32]", (1.0, 2.0)), ("b", "[u8]", (1, 2))], []) == plain


# --- models in several files ---


def write_parts(folder: Path, parts: int = 3, **changes: Any) -> list[Path]:
    """``parts`` files of two tensors each; ``changes`` may overwrite metadata of one part."""
    paths = []
    for i in range(parts):
        metadata: dict[str, Entry] = {
            key: (key, kind, value)
            for key, kind, value in [
                ("general.architecture", "str", "zaya"),
                ("split.no", "u16", i),
                ("split.count", "u16", parts),
                ("split.tensors.count", "i32", 2 * parts),
            ]
            if i == 0 or key.startswith("split.")
        }
        for key, kind, value in changes.get(f"part{i + 1}", []):
            metadata.pop(key, None)
            if kind:
                metadata[key] = (key, kind, value)
        first = changes.get("names", {}).get(i + 1, f"t.{i}.a")
        tensors = listed((first, "F32", (3, 4)), (f"t.{i}.b", "Q8_0", (2, 32)))
        paths.append(folder / f"model-{i + 1:05}-of-{parts:05}.gguf")
        write(paths[-1], list(metadata.values()), tensors)
    return paths


def test_any_part_stands_for_all(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    for path in paths:
        header, found = read_gguf_set(path)
        assert found == tuple(paths)
        assert list(header.tensors) == [f"t.{i}.{x}" for i in range(3) for x in "ab"]
        assert {t.file for t in header.tensors.values()} == set(paths)
        assert header.metadata["general.architecture"] == "zaya"
        assert header.kinds == read_gguf(paths[0]).kinds


def test_parts_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_parts(tmp_path)
    monkeypatch.chdir(tmp_path)
    _, found = read_gguf_set(Path(paths[1].name))
    assert found == tuple(Path(path.name) for path in paths)


def test_one_file_stands_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for count in (None, 0, 1):  # 0 is what llama-gguf-split --merge leaves
        extra = [] if count is None else [("split.count", "u16", count), ("split.no", "u16", 0)]
        write(path, extra, F32)
        assert read_gguf_set(path) == (read_gguf(path), (path,))


def test_parts_the_gguf_package_writes(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full((4, 8), i, np.float32) for i in range(5)}
    write_theirs(tmp_path / "model.gguf", EVERY_KIND, arrays, split_max_tensors=2)
    header, paths = read_gguf_set(tmp_path / "model-00002-of-00003.gguf")
    assert sorted(tmp_path.iterdir()) == list(paths)
    assert [entry for entry in header.entries() if "split" not in entry[0]] == EVERY_KIND
    for name, tensor in header.tensors.items():
        raw = tensor.file.read_bytes()[tensor.begin : tensor.end]
        assert raw == arrays[name].tobytes()


def test_a_first_part_without_tensors(tmp_path: Path) -> None:
    gguf_like = [("split.count", "u16", 2), ("split.tensors.count", "i32", 1)]
    first, second = (tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2))
    write(first, [("split.no", "u16", 0), ("general.name", "str", "m"), *gguf_like], [])
    write(second, [("split.no", "u16", 1), *gguf_like], F32)
    header, _ = read_gguf_set(second)
    assert list(header.tensors) == ["a"]
    assert header.metadata["general.name"] == "m"


@pytest.mark.parametrize("inner", ["", "Q8_0"])
def test_parts_in_the_hub_cache_are_links(tmp_path: Path, inner: str) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc" / inner, tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in write_parts(snapshot):
        blob = blobs / path.name.encode().hex()
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, snapshot))
    header, _ = read_gguf_set(snapshot / "model-00002-of-00003.gguf")
    assert len(header.tensors) == 6


def problems_of(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        read_gguf_set(path)
    return caught.value.problems


def test_all_missing_and_damaged_parts_are_listed(tmp_path: Path) -> None:
    paths = write_parts(tmp_path, 5)
    paths[1].unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:-40])
    problems = problems_of(paths[2])
    assert len(problems) == 2
    assert paths[1].name in problems[0]
    assert "No such file" in problems[0]
    assert paths[3].name in problems[1]
    assert "truncated" in problems[1]


def test_a_part_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    paths = write_parts(folder)
    paths[1].rename(tmp_path / "elsewhere.gguf")
    paths[1].symlink_to("../elsewhere.gguf")
    assert "leaves the folder" in problems_of(paths[0])[0]
    paths[1].unlink()
    paths[1].symlink_to(paths[1].name)  # to itself
    assert paths[1].name in problems_of(paths[0])[0]


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "number of another": ({"part2": [("split.no", "u16", 2)]}, "are 2 and 3"),
    "another count": ({"part2": [("split.count", "u16", 4)]}, "are 1 and 4"),
    "no number": ({"part2": [("split.no", "", 0)]}, "split.no is missing"),
    "not split": ({"part2": [("split.count", "", 0)]}, "split.count is missing"),
    "number as text": ({"part2": [("split.no", "str", "1")]}, "split.no is not a whole number"),
    "no total": ({"part2": [("split.tensors.count", "", 0)]}, "split.tensors.count is missing"),
    "other total": ({"part2": [("split.tensors.count", "i32", 7)]}, "split.tensors.count differs"),
    "wrong total": (
        {f"part{i}": [("split.tensors.count", "i32", 7)] for i in (1, 2, 3)},
        "6 tensors in all parts, split.tensors.count is 7",
    ),
    "tensor twice": (
        {"names": {2: "t.0.a"}},
        "'t.0.a' is in model-00001-of-00003.gguf and in model-00002-of-00003.gguf",
    ),
    "of another model": (
        {"part2": [("general.architecture", "str", "llama")]},
        "general.architecture differs",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_parts_that_do_not_belong_together(tmp_path: Path, name: str) -> None:
    changes, expected = CONTRADICTIONS[name]
    paths = write_parts(tmp_path, **changes)
    problems = problems_of(paths[0])
    assert len(problems) == 1
    assert expected in problems[0]


def test_names_that_contradict_the_part(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    odd = tmp_path / "model.gguf"
    odd.write_bytes(paths[1].read_bytes())
    assert "the other parts cannot be found" in problems_of(odd)[0]
    swapped = tmp_path / "model-00002-of-00004.gguf"
    swapped.write_bytes(paths[1].read_bytes())
    assert "by its name they should be 1 and 4" in problems_of(swapped)[0]
    alone = tmp_path / "alone-00001-of-00002.gguf"
    write(alone, [], F32)
    assert "does not say so" in problems_of(alone)[0]


def test_a_set_of_too_many_parts_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-65535.gguf"
    said = [("split.no", "u16", 0), ("split.count", "u16", 65_535)]
    write(path, [*said, ("split.tensors.count", "i32", 1)], F32)
    assert "at most 1024" in problems_of(path)[0]


def test_parts_are_not_all_held_in_memory(tmp_path: Path) -> None:
    """Tools that repeat the whole metadata in each part must not cost it several times over."""
    text = [("general.description", "str", "x" * (4 << 20))]
    paths = write_parts(tmp_path, 16, **{f"part{i}": text for i in range(1, 17)})
    tracemalloc.start()
    read_gguf_set(paths[5])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (4 << 20)  # those of the named and of the first part, and one in the making


def test_the_start_is_what_the_format_says() -> None:
    header = build_header([("k", "u16", 515)], [("t", "Q4_0", (3, 64), 0)])
    expected = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    expected += struct.pack("<Q1sIH", 1, b"k", 2, 515)
    expected += struct.pack("<Q1sIQQIQ", 1, b"t", 2, 64, 3, 2, 0)
    assert header == expected.ljust(96, b"\0")
