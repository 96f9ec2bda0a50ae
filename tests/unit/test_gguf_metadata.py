"""Metadata of GGUF files: keys and types that loaders ask for, provenance, and the way back."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dialects import PACKINGS
from gguf_files import Entries, foreign, rewrite, written_elsewhere
from nano import Nano
from rounding import nearest
from synthetic import nano_config
from zaya_convert import __version__
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.export.gguf.metadata import model_entries, size_label
from zaya_convert.export.gguf.names import DIALECTS
from zaya_convert.gguf_header import GgufHeader, read_gguf
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import adjusted, for_type, load

# Every dimension another number, so that none can stand for another.
DIFFERENT: dict[str, Any] = {
    "layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "experts": 5,
    "expert_width": 96, "router_width": 48, "vocab_rows": 80, "rotary_dim": 16, "eps": 2e-6,
    "max_positions": 1024,
}  # fmt: skip


def write(folder: Path, out: Path, dialect: str = "pr23112", origin: str = "") -> GgufHeader:
    """Export a checkpoint as it is."""
    execute(make_plan(open_model(str(folder)), None, PACKINGS[dialect], origin=origin), out)
    return read_gguf(out)


def entries(header: GgufHeader) -> Entries:
    return {key: (kind, value) for key, kind, value in header.entries()}


@pytest.fixture(scope="module")
def source(nano: Nano) -> Path:
    return nano("hybrid", **DIFFERENT)


@pytest.fixture(scope="module")
def file(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As another tool might have written it: nothing but the model."""
    path = tmp_path_factory.mktemp("metadata") / "model.gguf"
    write(source, path)
    return rewrite(path, path, keys=foreign)


def test_dimensions_and_their_types() -> None:
    config = nano_config(**DIFFERENT)
    expected = {
        "zaya.block_count": ("u32", 6),
        "zaya.context_length": ("u32", 1024),
        "zaya.embedding_length": ("u32", 64),
        # the trap: what is called after the experts is the router's
        "zaya.feed_forward_length": ("u32", 96),
        "zaya.expert_feed_forward_length": ("u32", 48),
        "zaya.expert_count": ("u32", 5),
        "zaya.expert_used_count": ("u32", 1),
        "zaya.attention.head_count": ("u32", 4),
        "zaya.attention.head_count_kv": ("u32", 2),
        "zaya.attention.key_length": ("u32", 32),
        "zaya.attention.value_length": ("u32", 32),
        "zaya.attention.layer_norm_rms_epsilon": ("f32", 2e-6),
        "zaya.rope.dimension_count": ("u32", 16),
        "zaya.rope.freq_base": ("f32", 5e6),
        "zaya.ssm.conv_kernel": ("u32", 2),
        "zaya.vocab_size": ("u32", 80),
        "zaya.skip_mode": ("str", "zero"),
    }
    for name, blocks in (("pr23112", 6), ("yggdrasil", 6), ("combined40", 3)):
        found = model_entries(config, DIALECTS[name])
        assert len(found) == len(expected)
        assert {key: (kind, value) for key, kind, value in found} == expected | {
            "zaya.block_count": ("u32", blocks)
        }


@pytest.mark.parametrize(
    ("windows", "full", "sliding"),
    [((0, 9, 0), 5e6, 1e4), ((9, 0, 9), 5e6, 1e4), ((9, 9, 9), 1e4, 1e4)],
)
def test_windows_and_their_rope_base(windows: tuple[int, ...], full: float, sliding: float) -> None:
    config = nano_config(**DIFFERENT, windows=windows)
    found = {
        key: (kind, value) for key, kind, value in model_entries(config, DIALECTS["combined40"])
    }
    assert found["zaya.attention.sliding_window"] == ("u32", 9)
    assert found["zaya.attention.sliding_window_pattern"] == ("[bool]", [w > 0 for w in windows])
    assert found["zaya.rope.freq_base"] == ("f32", full)
    assert found["zaya.rope.freq_base_swa"] == ("f32", sliding)


@pytest.mark.parametrize(
    ("dialect", "changes"),
    [
        ("pr23112", {}),
        ("pr23112", {"tied": False, "rotary_dim": 32}),
        ("pr23112", {"kv_heads": 4, "layers": 1}),
        ("yggdrasil", {"router_width": 256}),
        ("combined40", {"windows": (0, 9, 0)}),
        ("combined40", {"windows": (9, 0, 9), "rope_thetas": (2e4, 1e6, 2e4)}),
        ("combined40", {"windows": (9, 9, 9)}),
        ("combined40", {"eps": 1e-5, "max_positions": 131072}),
    ],
)
def test_a_configuration_comes_back(
    nano: Nano, tmp_path: Path, dialect: str, changes: dict[str, Any]
) -> None:
    folder = nano("hybrid", **{**DIFFERENT, **changes})
    write(folder, tmp_path / "x.gguf", dialect)
    expected = nano_config(**{**DIFFERENT, **changes})
    assert open_model(str(folder)).config == expected
    # special tokens are the tokenizer's, and there is none here
    found = open_model(str(tmp_path / "x.gguf")).config
    assert replace(found, bos_id=2, pad_id=0, eos_ids=(1,)) == expected


def test_special_tokens_come_back(bundled: Path, tmp_path: Path) -> None:
    write(bundled, tmp_path / "x.gguf")
    found = open_model(str(tmp_path / "x.gguf"))
    assert found.config == open_model(str(bundled)).config
    assert found.raw_config["eos_token_id"] == [5]


def test_what_the_file_is_made_of(nano: Nano, tmp_path: Path) -> None:
    folder = nano("hybrid", **{**DIFFERENT, "layers": 1, "experts": 24})
    expected = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7, "Q5_1": 9}
    for kind, number in expected.items():
        recipe = adjusted(for_type(kind), method="absmax")
        path = tmp_path / f"{kind}.gguf"
        execute(make_plan(open_model(str(folder)), recipe, "gguf"), path)
        found = entries(read_gguf(path))
        assert found["general.architecture"] == ("str", "zaya")
        assert found["general.type"] == ("str", "model")
        assert found["general.file_type"] == ("u32", number)
        version = found.get("general.quantization_version")
        assert version == (("u32", 2) if kind.startswith("Q") else None)
    mixed = adjusted(load("q4_k_m"), method="rtn")
    execute(make_plan(open_model(str(folder)), mixed, "gguf"), tmp_path / "mixed.gguf")
    assert read_gguf(tmp_path / "mixed.gguf").metadata["general.file_type"] == 15


CARD = """---
license: other
license_name: a-licence
license_link: https://example.org/licence
language: [en, de]
base_model: org/older
---
# A model
"""


def test_the_models_card_is_told(source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "README.md").write_text(CARD)
    found = entries(write(folder, tmp_path / "x.gguf", origin="org/A-Model"))
    general = {key: value for key, value in found.items() if key.startswith("general.")}
    assert (
        general.items()
        >= {
            "general.name": ("str", "A-Model"),
            "general.license": ("str", "other"),
            "general.license.name": ("str", "a-licence"),
            "general.license.link": ("str", "https://example.org/licence"),
            "general.base_model.count": ("u32", 1),
            "general.base_model.0.name": ("str", "A-Model"),
            "general.base_model.0.organization": ("str", "org"),
            "general.base_model.0.repo_url": ("str", "https://huggingface.co/org/A-Model"),
        }.items()
    )
    assert general["general.languages"] == ("[str]", ["en", "de"])
    assert "zaya" in general["general.tags"][1]
    unnamed = entries(write(folder, tmp_path / "y.gguf"))
    assert unnamed["general.base_model.0.name"] == ("str", "older")


@pytest.mark.parametrize(
    "card",
    [
        "",
        "no front matter",
        "---\nlicense: [1]\nlanguage: {a: 1}\nbase_model: 7\n---\n",
        "---\n: [",
    ],
)
def test_a_card_that_says_nothing_useful(source: Path, tmp_path: Path, card: str) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    (folder / "README.md").write_text(card)
    found = entries(write(folder, tmp_path / "x.gguf"))
    assert found["general.name"][1]
    odd = ("general.license", "general.languages", "general.base_model")
    assert not [key for key in found if key.startswith(odd)]


@pytest.mark.parametrize(
    ("single", "label"),
    [
        (999, "5x999"),
        (1_000, "5x1.0K"),
        (9_940, "5x9.9K"),
        (412_300, "5x412K"),
        (1_260_000_000, "5x1.3B"),
        (850_000_000, "5x850M"),
        (12_000_000_000_000, "5x12T"),
    ],
)
def test_size_labels(single: int, label: str) -> None:
    """Experts, and the size of a model with one: https://github.com/ggml-org/ggml docs/gguf.md."""
    config = nano_config(**DIFFERENT)
    experts = 4 * 3 * 3 * 64 * 96  # those beside the one, in each layer three matrices
    assert size_label(single + experts, config) == label


def test_provenance_is_that_of_other_artifacts(source: Path, tmp_path: Path) -> None:
    opened = open_model(str(source))
    execute(make_plan(opened, nearest(4), "compressed-tensors", origin="org/m"), tmp_path / "a")
    execute(make_plan(opened, nearest(4), "gguf", origin="org/m"), tmp_path / "b.gguf")
    manifest = json.loads((tmp_path / "a" / "zaya-convert.json").read_text())
    found = entries(read_gguf(tmp_path / "b.gguf"))
    assert found["zaya_convert.version"] == ("str", __version__)
    assert found["zaya_convert.packing"] == ("str", "gguf")
    assert found["zaya_convert.source.model"] == ("str", "org/m")
    assert found["zaya_convert.source.digest"] == ("str", manifest["source"]["digest"])
    assert json.loads(found["zaya_convert.recipe"][1]) == manifest["recipe"]
    assert not [key for key in found if "calibration" in key]
    kept = open_model(str(tmp_path / "b.gguf")).manifest
    assert kept["source"] == manifest["source"]
    assert kept["recipe"] == manifest["recipe"]
    assert kept["tool"] == manifest["tool"]


def test_provenance_is_handed_on(source: Path, tmp_path: Path) -> None:
    opened = open_model(str(source))
    execute(make_plan(opened, nearest(8), "gguf", origin="org/m"), tmp_path / "a.gguf")
    one = open_model(str(tmp_path / "a.gguf"))
    execute(make_plan(one, None, "gguf-combined40", origin="org/m"), tmp_path / "b.gguf")
    execute(make_plan(one, None, "dense", origin="org/m"), tmp_path / "c")
    two, three = open_model(str(tmp_path / "b.gguf")), open_model(str(tmp_path / "c"))
    for later in (two, three):
        assert later.manifest["source"] == one.manifest["source"]
        assert later.manifest["recipe"] == one.manifest["recipe"]


@pytest.mark.parametrize("dialect", ["pr23112", "combined40"])
def test_every_region_has_a_checksum(source: Path, tmp_path: Path, dialect: str) -> None:
    header = write(source, tmp_path / "x.gguf", dialect)
    opened = open_model(str(tmp_path / "x.gguf"))
    raw = (tmp_path / "x.gguf").read_bytes()
    pieces = [piece for info in opened.infos.values() for piece in info.pieces.values()]
    assert header.metadata["zaya_convert.checksums"] == [
        hashlib.sha256(raw[piece.begin : piece.end]).hexdigest() for piece in pieces
    ]
    taps = opened.config.layers if dialect == "combined40" else 0  # stored in two places each
    assert len(pieces) == len(opened.infos) + taps
    held = sum(tensor.end - tensor.begin for tensor in header.tensors.values())
    assert sum(piece.end - piece.begin for piece in pieces) == held


def test_a_file_without_provenance_has_no_manifest(file: Path) -> None:
    assert open_model(str(file)).manifest == {}


@pytest.mark.parametrize(
    ("key", "entry", "expected"),
    [
        ("source.digest", ("u32", 7), {}),
        ("source.model", ("[str]", ["x"]), {}),
        ("version", ("u32", 3), None),
        ("recipe", ("u32", 3), None),
        ("calibration.tokens", ("u64", 3), None),  # alone it says nothing
    ],
)
def test_odd_provenance_is_not_trusted(
    source: Path, tmp_path: Path, key: str, entry: tuple[str, Any], expected: dict[str, Any] | None
) -> None:
    write(source, tmp_path / "x.gguf", origin="org/m")
    path = rewrite(
        tmp_path / "x.gguf",
        tmp_path / "y.gguf",
        keys=lambda found: found.update({f"zaya_convert.{key}": entry}),
    )
    manifest = open_model(str(path)).manifest
    if expected is not None:
        assert manifest == expected
        return
    assert manifest["source"]["model"] == "org/m"
    assert "recipe" not in manifest
    assert "calibration" not in manifest


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"name": 1}', "has no name"),
    ],
)
def test_a_recipe_that_is_none_is_refused(
    source: Path, tmp_path: Path, recipe: str, says: str
) -> None:
    write(source, tmp_path / "x.gguf")
    path = rewrite(
        tmp_path / "x.gguf",
        tmp_path / "y.gguf",
        keys=lambda found: found.update({"zaya_convert.recipe": ("str", recipe)}),
    )
    with pytest.raises(InputError, match=rf"zaya_convert\.recipe: {says}"):
        open_model(str(path))


# --- what other tools write, and what nobody should --------------------------------------------


def test_other_tools_ways_to_say_it(nano: Nano, tmp_path: Path) -> None:
    config = nano_config(layers=2, experts=2, router_width=256)
    folder = nano("hybrid", layers=2, experts=2, router_width=256)
    keys: dict[str, Any] = {
        "attention.layer_norm_rms_epsilon": None,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.head_count": [4] * 4,
        "attention.head_count_kv": [2] * 4,
        "feed_forward_length": [64] * 4,
        "expert_feed_forward_length": None,  # one loader knows 256 only
        "attention.key_length": 32,
        "attention.value_length": None,
        "vocab_size": None,
        "ssm.conv_kernel": None,
        "ssm.state_size": 448,
    }
    path = written_elsewhere(tmp_path / "x.gguf", folder, config, "yggdrasil", keys=keys)
    found = open_model(str(path)).config
    assert replace(found, bos_id=2, pad_id=0, eos_ids=(1,)) == config


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, (9, 0, 9)),  # the loader's own default: every other layer
        (("[bool]", [False, False, True]), (0, 0, 9)),
        (("u32", 3), (9, 9, 0)),  # one full layer in so many, as llama.cpp counts
        (("u32", 1), (0, 0, 0)),
        (("u32", 0), (9, 9, 9)),
        (("[bool]", [True]), None),
        (("str", "every other"), None),
    ],
)
def test_patterns_of_windows(
    nano: Nano,
    tmp_path: Path,
    pattern: tuple[str, Any] | None,
    windows: tuple[int, ...] | None,
) -> None:
    write(nano("hybrid", **DIFFERENT, windows=(9, 9, 0)), tmp_path / "x.gguf", "combined40")

    def change(found: Entries) -> None:
        del found["zaya.attention.sliding_window_pattern"]
        if pattern is not None:
            found["zaya.attention.sliding_window_pattern"] = pattern

    path = rewrite(tmp_path / "x.gguf", tmp_path / "y.gguf", keys=change)
    if windows is not None:
        assert open_model(str(path)).config.windows == windows
        return
    with pytest.raises(InputError, match="sliding_window_pattern"):
        open_model(str(path))


def changed(file: Path, out: Path, **keys: tuple[str, Any] | None) -> Path:
    """A copy with other dimensions; None takes a key away."""

    def change(found: Entries) -> None:
        for name, entry in keys.items():
            key = "zaya." + name.replace("__", ".")
            found.pop(key, None)
            if entry is not None:
                found[key] = entry

    return rewrite(file, out, keys=change)


ABSURD: dict[str, tuple[dict[str, tuple[str, Any] | None], str]] = {
    "no blocks": ({"block_count": None}, "zaya.block_count is missing"),
    "odd blocks": ({"block_count": ("u32", 5)}, "block_count is 5, expected an even number"),
    "a million blocks": ({"block_count": ("u32", 10**6)}, "zaya.block_count is 1000000"),
    "blocks as text": ({"block_count": ("str", "6")}, "zaya.block_count is '6'"),
    "no width": ({"embedding_length": None}, "zaya.embedding_length is missing"),
    "a width of 0": ({"embedding_length": ("u32", 0)}, "zaya.embedding_length is 0"),
    "a negative width": ({"embedding_length": ("i32", -64)}, "zaya.embedding_length is -64"),
    "a width that is no whole number": (
        {"embedding_length": ("f32", 64.5)},
        "zaya.embedding_length is 64.5",
    ),
    "a width that is true": ({"embedding_length": ("bool", True)}, "embedding_length is True"),
    "no heads": ({"attention__head_count": None}, "zaya.attention.head_count is missing"),
    "heads that differ": (
        {"attention__head_count": ("[u32]", [4, 4, 4, 4, 4, 2])},
        "zaya.attention.head_count is [4, 4, 4, 4, 4, 2]",
    ),
    "no heads in a list": ({"attention__head_count": ("[u32]", [])}, "head_count is []"),
    "heads that do not divide": ({"attention__head_count_kv": ("u32", 3)}, "do not fit together"),
    "no experts": ({"expert_count": None}, "zaya.expert_count is missing"),
    "a million experts": ({"expert_count": ("u32", 10**6)}, "zaya.expert_count is 1000000"),
    "two experts at a time": ({"expert_used_count": ("u32", 2)}, "expert_used_count must be 1"),
    "no expert width": ({"feed_forward_length": None}, "zaya.feed_forward_length is missing"),
    "an odd rotary width": ({"rope__dimension_count": ("u32", 15)}, "do not fit together"),
    "too large a rotary width": ({"rope__dimension_count": ("u32", 64)}, "do not fit together"),
    "a base of 0": ({"rope__freq_base": ("f32", 0.0)}, "zaya.rope.freq_base is 0.0"),
    "a base that is no number": ({"rope__freq_base": ("f32", float("nan"))}, "freq_base is nan"),
    "an infinite base": ({"rope__freq_base": ("f32", float("inf"))}, "freq_base is inf"),
    "a negative epsilon": (
        {"attention__layer_norm_rms_epsilon": ("f32", -1.0)},
        "zaya.attention.layer_norm_rms_epsilon is -1.0",
    ),
    "no context": ({"context_length": ("u64", 0)}, "zaya.context_length is 0"),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_dimensions_are_refused(file: Path, tmp_path: Path, name: str) -> None:
    keys, says = ABSURD[name]
    path = changed(file, tmp_path / "x.gguf", **keys)
    with pytest.raises(InputError) as caught:
        open_model(str(path))
    assert says in str(caught.value)
    assert str(caught.value).startswith("x.gguf: ")


def test_an_absurd_number_of_blocks_costs_no_memory(file: Path, tmp_path: Path) -> None:
    path = changed(file, tmp_path / "x.gguf", block_count=("u32", 10**7))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"zaya\.block_count is 10000000"):
            open_model(str(path))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_all_absurdities_together(file: Path, tmp_path: Path) -> None:
    path = changed(
        file, tmp_path / "x.gguf", embedding_length=None, expert_count=("u32", 0),
        rope__freq_base=("f32", -1.0), expert_used_count=("u32", 4), context_length=("str", "long"),
    )  # fmt: skip
    with pytest.raises(InputError) as caught:
        open_model(str(path))
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    ("keys", "tensor"),
    [
        ({"embedding_length": ("u32", 32)}, "token_embd.weight"),
        ({"feed_forward_length": ("u32", 48)}, "blk.1.ffn_down_exps.weight"),
        ({"expert_feed_forward_length": ("u32", 96)}, "blk.1.ffn_gate.weight"),
        ({"expert_count": ("u32", 4)}, "blk.5.zaya_router_mlp4.weight"),
        ({"attention__key_length": ("u32", 16)}, "blk.0.attn_k.weight"),
        ({"ssm__conv_kernel": ("u32", 3)}, "blk.0.ssm_conv1d.weight"),
        ({"block_count": ("u32", 4)}, "blk.4.attn_norm.weight"),
        ({"block_count": ("u32", 8)}, "blk.6.attn_norm.weight"),
    ],
    ids=str,
)
def test_dimensions_that_are_not_the_tensors(
    file: Path, tmp_path: Path, keys: dict[str, tuple[str, Any]], tensor: str
) -> None:
    with pytest.raises(InputError) as caught:
        open_model(str(changed(file, tmp_path / "x.gguf", **keys)))
    assert any(repr(tensor) in problem for problem in caught.value.problems)


def test_token_ids_beyond_reason_are_left_out(file: Path, tmp_path: Path) -> None:
    def change(found: Entries) -> None:
        found["tokenizer.ggml.bos_token_id"] = ("u32", 2**32 - 1)
        found["tokenizer.ggml.eos_token_id"] = ("u32", 7)
        found["tokenizer.ggml.eot_token_id"] = ("u32", 9)
        found["tokenizer.ggml.eom_token_id"] = ("u32", 8)
        found["tokenizer.ggml.padding_token_id"] = ("str", "0")

    config = open_model(str(rewrite(file, tmp_path / "x.gguf", keys=change))).config
    assert (config.bos_id, config.eos_ids, config.pad_id) == (None, (7, 9, 8), None)


def test_the_embedding_decides_the_vocabulary(file: Path, tmp_path: Path) -> None:
    path = changed(file, tmp_path / "x.gguf", vocab_size=("u32", 79))
    assert open_model(str(path)).config.vocab_rows == 80


def test_floats_of_32_bits_mean_their_short_forms(file: Path) -> None:
    header = read_gguf(file)
    key = "zaya.attention.layer_norm_rms_epsilon"
    assert header.metadata[key] == torch.tensor(2e-6).item() != 2e-6
    assert open_model(str(file)).config.eps == 2e-6
