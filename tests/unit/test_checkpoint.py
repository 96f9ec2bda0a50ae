"""Opening is header-only and fast; reading gives exactly the bytes that were asked for."""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nano import Nano
from relayout import hybrid_config, legacy_config, stored_groups
from synthetic import preset_config, synthetic_tensor
from zaya_convert.checkpoint import SourceDigest, open_source
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.layout import TensorKey


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def write_hollow(folder: Path, layout: str, config: ModelConfig, shards: int) -> None:
    """All headers of a model of any size, their data being holes that take no disk space."""
    folder.mkdir()
    names = list(stored_groups(layout, config).items())
    weight_map = {}
    for shard in range(shards):
        header: dict[str, Any] = {}
        position = 0
        for name, (shape, _) in names[shard::shards]:
            end = position + 2 * math.prod(shape)
            header[name] = {
                "dtype": "BF16",
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    raw_config = hybrid_config(config) if layout == "hybrid" else legacy_config(config)
    (folder / "config.json").write_text(json.dumps(raw_config))


@pytest.mark.parametrize("layout", ["hybrid", "legacy"])
def test_full_size_8b_opens_from_headers_in_under_two_seconds(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hollow(tmp_path / "8b", layout, preset_config("8b"), shards=5)
    monkeypatch.setattr(os, "preadv", None)  # any read of data would fail
    began = time.monotonic()
    model = open_source(tmp_path / "8b")
    seconds = time.monotonic() - began
    assert model.format == layout
    assert model.config == preset_config("8b")
    weights = sum(info.numel for info in model.infos.values())
    assert 8.83e9 < weights < 8.85e9
    assert sum(info.bytes for info in model.infos.values()) == 2 * weights
    assert len(model.files) == 5
    assert seconds < 2


@pytest.mark.parametrize("layout", ["hybrid", "legacy"])
def test_opening_reads_no_weights_and_reading_only_the_tensor_asked_for(
    nano: Nano, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    true_preadv = os.preadv

    def counting(*arguments: Any) -> int:
        read.append(true_preadv(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    model = open_source(nano(layout, shards=3))
    assert read == []
    key = TensorKey(1, "mlp.experts.up_proj.weight", 3)
    model.read(key)
    assert sum(read) == model.infos[key].bytes == 64 * 64 * 2


@pytest.mark.parametrize("layout", ["hybrid", "legacy"])
def test_values_are_those_that_were_written(nano: Nano, layout: str) -> None:
    model = open_source(nano(layout, seed=3, shards=2, skip_bias=0.25))
    for key, info in model.infos.items():
        expected = synthetic_tensor(key, info.shape, seed=3, skip_bias=0.25)
        if key.part != "mlp.gate.balancing_biases":
            expected = expected.to(torch.bfloat16)
        value = model.read(key)
        assert isinstance(value, torch.Tensor)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), str(key)


def test_execution_order_and_identity(nano_hybrid: Path) -> None:
    keys = list(open_source(nano_hybrid).infos)
    assert keys[0] == TensorKey(-1, "embed_tokens.weight")
    assert keys[-1] == TensorKey(-1, "norm.weight")
    layers = [key.layer for key in keys if key.layer >= 0]
    assert layers == sorted(layers)
    assert len({str(key) for key in keys}) == len(keys)
    assert str(TensorKey(2, "mlp.experts.up_proj.weight", 5)) == (
        "model.layers.2.mlp.experts.5.up_proj.weight"
    )


@pytest.mark.parametrize("size", [1, 7, 100, 1 << 20])
def test_chunks_join_to_the_raw_bytes(nano_legacy: Path, size: int) -> None:
    model = open_source(nano_legacy)
    key = TensorKey(0, "mlp.experts.down_proj.weight", 1)
    value = model.read(key)
    assert isinstance(value, torch.Tensor)
    chunks = list(model.chunks(key, size))
    assert max(map(len, chunks)) <= size
    assert b"".join(chunks) == value.view(torch.uint8).numpy().tobytes()


def test_read_float_converts(nano_hybrid: Path) -> None:
    model = open_source(nano_hybrid)
    key = TensorKey(-1, "norm.weight")
    assert model.read_float(key).dtype == torch.bfloat16
    wide = model.read_float(key, torch.float32)
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(torch.bfloat16), model.read_float(key))


def test_source_digest_depends_on_contents_alone(nano: Nano) -> None:
    def digest(folder: Path) -> str:
        model, total = open_source(folder), SourceDigest()
        for key, info in reversed(list(model.infos.items())):
            total.add(info, hashlib.sha256(b"".join(model.chunks(key))).hexdigest())
        return total.hexdigest(model.infos)

    reference = digest(nano("hybrid"))
    assert digest(nano("hybrid", shards=3)) == reference
    assert digest(nano("legacy")) == reference
    assert digest(nano("legacy", shards=2, lying=True)) == reference
    assert digest(nano("hybrid", seed=1)) != reference
    assert digest(nano("hybrid", dtype=torch.float16)) != reference


def test_side_files_are_offered_unchanged(nano_hybrid: Path, tmp_path: Path) -> None:
    folder = copied(nano_hybrid, tmp_path / "model")
    (folder / "tokenizer.json").write_bytes(b"\x00\xff")
    (folder / "LICENSE").write_text("Apache")
    (folder / "secret.txt").write_text("no part of a model")
    assert open_source(folder).side_files() == {"tokenizer.json": b"\x00\xff", "LICENSE": b"Apache"}


def add_head(operate, folder: Path, change: int = 0) -> None:
    def add(tensors: dict) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        data = bytearray(embedding.data)
        data[-1] ^= change
        tensors["lm_head.weight"] = type(embedding)(embedding.dtype, embedding.shape, bytes(data))

    operate(folder / "model.safetensors", add)


def test_a_redundant_head_equal_to_the_embedding_is_accepted(
    nano_hybrid: Path, tmp_path: Path, operate
) -> None:
    folder = copied(nano_hybrid, tmp_path / "model")
    add_head(operate, folder)
    model = open_source(folder)
    assert model.tied_copy is not None
    assert TensorKey(-1, "lm_head.weight") not in model.infos
    model.check_tied_copy()


def test_a_redundant_head_unlike_the_embedding_is_refused(
    nano_hybrid: Path, tmp_path: Path, operate
) -> None:
    folder = copied(nano_hybrid, tmp_path / "model")
    add_head(operate, folder, change=1)
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        open_source(folder).check_tied_copy()


def test_an_untied_head_is_a_tensor_like_any_other(nano: Nano) -> None:
    model = open_source(nano("hybrid", tied=False))
    head = model.read(TensorKey(-1, "lm_head.weight"))
    embedding = model.read(TensorKey(-1, "embed_tokens.weight"))
    assert isinstance(head, torch.Tensor)
    assert isinstance(embedding, torch.Tensor)
    assert head.shape == embedding.shape
    assert not torch.equal(head, embedding)
    assert model.tied_copy is None


def as_hub_cache(source: Path, root: Path) -> Path:
    """Lay a model out as huggingface_hub does: snapshots of links into a folder of blobs."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


@pytest.mark.parametrize("shards", [1, 3])
def test_the_hub_cache_with_its_links_is_accepted(nano: Nano, tmp_path: Path, shards: int) -> None:
    snapshot = as_hub_cache(nano("hybrid", shards=shards), tmp_path / "models--x--y")
    model = open_source(snapshot)
    assert len(model.files) == shards
    for key in model.infos:
        model.read(key)


def test_a_folder_reached_through_a_link_is_accepted(nano_sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(nano_sharded)
    assert open_source(tmp_path / "link").config == open_source(nano_sharded).config


def test_stamp_tells_a_changed_file(nano_sharded: Path, tmp_path: Path) -> None:
    model = open_source(copied(nano_sharded, tmp_path / "model"))
    before = model.stamp()
    assert len(before) == 3
    assert model.stamp() == before
    os.utime(model.files[1], ns=(1, 1))
    assert model.stamp() != before


INDEX = "model.safetensors.index.json"


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        open_source(folder)
    return caught.value.problems


def mentions(problems: list[str], *words: str) -> bool:
    return any(all(word in problem for word in words) for problem in problems)


def test_index_disagreeing_with_its_shards(nano: Nano, tmp_path: Path) -> None:
    folder = copied(nano("hybrid", shards=2), tmp_path / "model")
    one, two = (path.name for path in sorted(folder.glob("*.safetensors")))

    index = json.loads((folder / INDEX).read_text())
    table = index["weight_map"]
    table["model.embed_tokens.weight"] = two  # it is in the first
    table["model.ghost"] = one
    del table["model.norm.weight"]

    (folder / INDEX).write_text(json.dumps(index))
    problems = problems_of(folder)
    assert len(problems) == 3
    assert mentions(problems, "model.embed_tokens.weight", two)
    assert mentions(problems, "model.ghost", one)
    assert mentions(problems, "model.norm.weight", "not in the index")


@pytest.mark.parametrize("table", [None, [], "x", {"a": 1}, {"a": None}])
def test_index_of_another_form(nano: Nano, tmp_path: Path, table: object) -> None:
    folder = copied(nano("hybrid", shards=2), tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    assert mentions(problems_of(folder), "weight_map")


@settings(
    max_examples=100, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(), max_size=3))
def test_any_index_at_all(nano_sharded: Path, tmp_path: Path, table: dict[str, object]) -> None:
    shutil.copyfile(nano_sharded / "config.json", tmp_path / "config.json")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": table}))
    problems_of(tmp_path)


def test_empty_index(nano: Nano, tmp_path: Path) -> None:
    folder = copied(nano("hybrid", shards=2), tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
    assert mentions(problems_of(folder), "weight_map")
