"""Damaged checkpoints: every fault is refused at opening, with all culprits named at once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nano import Nano, Stored, Surgery
from zaya_convert.checkpoint import open_source
from zaya_convert.errors import InputError
from zaya_convert.layout import TensorKey

Tensors = dict[str, Stored]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(nano: Nano, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of one's own to damage."""

    def make(layout: str = "hybrid", **options: object) -> Path:
        source = nano(layout, **options)  # type: ignore[arg-type]
        return Path(shutil.copytree(source, tmp_path / "model"))

    return make


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        open_source(folder)
    assert caught.value.exit_code == 3
    for problem in caught.value.problems[:20]:
        assert problem[:400] in str(caught.value)
    return caught.value.problems


def mentions(problems: list[str], *words: str) -> bool:
    return any(all(word in problem for word in words) for problem in problems)


EXPERT = "model.layers.3.zaya_block.experts.local_experts.5.linear_fc1.weight"


def drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def reshape(name: str, shape: list[int], data: bytes | None = None) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = Stored(tensors[name].dtype, shape, data or tensors[name].data)

    return change


def retype(name: str, dtype: str, shape: list[int]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = Stored(dtype, shape, tensors[name].data)

    return change


def add(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: Stored("BF16", [2], b"abcd")})


# fault: (layout, surgery, one tuple of words per expected problem)
SURGERY: dict[str, tuple[str, Callable[[Tensors], None], list[tuple[str, ...]]]] = {
    "missing expert, legacy": ("legacy", drop(EXPERT), [(EXPERT, "missing")]),
    "missing experts, hybrid": (
        "hybrid",
        drop("model.layers.1.mlp.experts.down_proj"),
        [("model.layers.1.mlp.experts.down_proj", "missing")],
    ),
    "missing EDA scale, hybrid": (
        "hybrid",
        drop("model.layers.2.mlp.gate.router_states_scale"),
        [("model.layers.2.mlp.gate.router_states_scale", "missing")],
    ),
    "missing EDA scale, legacy": (
        "legacy",
        drop("model.layers.5.zaya_block.router.router_states_scale"),
        [("model.layers.5.zaya_block.router.router_states_scale", "missing")],
    ),
    "EDA scale where none belongs": (
        "hybrid",
        add("model.layers.0.mlp.gate.router_states_scale"),
        [("model.layers.0.mlp.gate.router_states_scale", "unknown", "model.safetensors")],
    ),
    "missing embedding": (
        "hybrid",
        drop("model.embed_tokens.weight"),
        [("model.embed_tokens.weight", "missing")],
    ),
    "missing last residual scale, legacy": (
        "legacy",
        drop("model.res_scale.residual_bias"),
        [("model.res_scale.residual_bias", "missing")],
    ),
    "renamed tensor": (
        "hybrid",
        rename("model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.out.weight"),
        [
            ("model.layers.1.self_attn.o_proj.weight", "missing"),
            ("model.layers.1.self_attn.out.weight", "unknown", "model.safetensors"),
        ],
    ),
    "unknown tensor": ("legacy", add("model.extra"), [("model.extra", "unknown")]),
    "one layer too many": (
        "hybrid",
        add("model.layers.3.input_layernorm.weight"),
        [("model.layers.3.input_layernorm.weight", "unknown")],
    ),
    "stray half-layer far away, legacy": (
        "legacy",
        rename("model.layers.0.self_attn.qkv.temp", "model.layers.90.self_attn.qkv.temp"),
        [
            ("model.layers.0.self_attn.qkv.temp", "missing"),
            ("model.layers.90.self_attn.qkv.temp", "unknown"),
        ],
    ),
    "shape turned": (
        "hybrid",
        reshape("model.layers.0.self_attn.o_proj.weight", [128, 64]),
        [("model.layers.0.self_attn.o_proj.weight", "[128, 64]", "[64, 128]", "model.safetensors")],
    ),
    "router of one class too few": (
        "legacy",
        reshape(
            "model.layers.1.zaya_block.router.router_mlp.4.weight", [8, 32], data=bytes(8 * 32 * 2)
        ),
        [("model.layers.1.zaya_block.router.router_mlp.4.weight", "[8, 32]", "[9, 32]")],
    ),
    "integers": (
        "hybrid",
        retype("model.layers.2.mlp.experts.gate_up_proj", "I16", [8, 128, 64]),
        [("model.layers.2.mlp.experts.gate_up_proj", "I16")],
    ),
    "I32 of half the width": ("legacy", retype(EXPERT, "I32", [128, 32]), [(EXPERT, "[128, 32]")]),
    "8-bit floats": (
        "hybrid",
        retype("model.norm.weight", "F8_E4M3", [128]),
        [("model.norm.weight", "model.safetensors")],
    ),
}


@pytest.mark.parametrize("name", SURGERY)
def test_tensors(copy: Callable[..., Path], operate: Surgery, name: str) -> None:
    layout, surgery, expected = SURGERY[name]
    folder = copy(layout)
    operate(folder / "model.safetensors", surgery)
    problems = problems_of(folder)
    assert len(problems) == len(expected), problems
    for words in expected:
        assert mentions(problems, *words), problems


def test_all_faults_of_a_checkpoint_come_at_once(
    copy: Callable[..., Path], operate: Surgery
) -> None:
    folder = copy("legacy")

    def ruin(tensors: Tensors) -> None:
        drop(EXPERT, "model.layers.0.self_attn.qkv.temp")(tensors)
        rename("model.final_norm.weight", "model.finalnorm.weight")(tensors)
        reshape("model.layers.1.input_norm.weight", [1, 64])(tensors)
        retype("model.layers.2.input_norm.weight", "I16", [64])(tensors)

    operate(folder / "model.safetensors", ruin)
    problems = problems_of(folder)
    assert len(problems) == 6
    for words in (
        (EXPERT, "missing"),
        ("layers.0.self_attn.qkv.temp", "missing"),
        ("model.final_norm.weight", "missing"),
        ("model.finalnorm.weight", "unknown"),
        ("layers.1.input_norm.weight", "[1, 64]"),
        ("layers.2.input_norm.weight", "I16"),
    ):
        assert mentions(problems, *words), words


def test_a_hundred_faults_are_summed_up(copy: Callable[..., Path], operate: Surgery) -> None:
    folder = copy()
    operate(folder / "model.safetensors", lambda ts: [add(f"extra.{i:03}")(ts) for i in range(100)])
    with pytest.raises(InputError) as caught:
        open_source(folder)
    assert len(caught.value.problems) == 100
    assert "100 problems" in str(caught.value)
    assert "extra.000" in str(caught.value)
    assert "80 more" in str(caught.value)


def test_a_head_that_cannot_equal_the_embedding(
    copy: Callable[..., Path], operate: Surgery
) -> None:
    folder = copy()
    operate(folder / "model.safetensors", add("lm_head.weight"))
    assert mentions(problems_of(folder), "lm_head.weight")


# --- files


def test_truncated_single_file(copy: Callable[..., Path]) -> None:
    folder = copy()
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert mentions(problems_of(folder), "model.safetensors", "truncated")


@pytest.mark.parametrize("size", [0, 5, 100])
def test_truncated_and_missing_shards_are_all_named(copy: Callable[..., Path], size: int) -> None:
    folder = copy(shards=4)
    shards = sorted(folder.glob("*.safetensors"))
    os.truncate(shards[0], size)
    os.truncate(shards[1], shards[1].stat().st_size - 2)
    shards[3].unlink()
    problems = problems_of(folder)
    assert len(problems) == 3
    assert mentions(problems, shards[0].name, "truncated")
    assert mentions(problems, shards[1].name, "truncated", str(shards[1].stat().st_size))
    assert mentions(problems, shards[3].name, "cannot be read")


def test_a_file_that_shrinks_after_opening(copy: Callable[..., Path]) -> None:
    folder = copy()
    model = open_source(folder)
    os.truncate(folder / "model.safetensors", 20_000)
    key = list(model.infos)[-1]
    with pytest.raises(InputError, match=r"model\.safetensors"):
        model.read(key)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        list(model.chunks(key))


def test_a_file_that_vanishes_after_opening(copy: Callable[..., Path]) -> None:
    folder = copy()
    model = open_source(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        model.read(TensorKey(-1, "norm.weight"))
    with pytest.raises(InputError, match=r"model\.safetensors"):
        list(model.chunks(TensorKey(-1, "norm.weight")))


def test_a_tensor_in_two_shards(copy: Callable[..., Path], operate: Surgery) -> None:
    folder = copy(shards=2, index=False)
    one, two = sorted(folder.glob("*.safetensors"))
    operate(two, add("model.embed_tokens.weight"))
    assert mentions(problems_of(folder), "model.embed_tokens.weight", one.name, two.name)


def test_no_weights(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    assert mentions(problems_of(folder), "safetensors")


def test_pickle_alone_is_refused_and_never_opened(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert mentions(problems_of(folder), "pickle", "convert")


def test_no_config_no_folder_and_a_file_for_a_folder(
    copy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    assert mentions(problems_of(folder), "cannot be read")
    for path in (folder, tmp_path / "nowhere", folder / "model.safetensors"):
        with pytest.raises(InputError, match=r"config\.json"):
            open_source(path)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": 1, "a": 1}', b"[" * 20_000, b"null"]
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(copy: Callable[..., Path], raw: bytes, name: str) -> None:
    folder = copy(shards=2)
    (folder / name).write_bytes(raw)
    with pytest.raises(InputError, match=name):
        open_source(folder)


def test_a_config_beyond_all_size(copy: Callable[..., Path]) -> None:
    folder = copy()
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 32)
    with pytest.raises(InputError, match=r"config\.json"):
        open_source(folder)


def test_a_pipe_for_a_config_does_not_block(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(InputError, match=r"config\.json"):
        open_source(folder)


def test_another_models_tensors(copy: Callable[..., Path], operate: Surgery) -> None:
    folder = copy()

    def llama(tensors: Tensors) -> None:
        tensors.clear()
        add("model.layers.0.mlp.gate_proj.weight")(tensors)

    operate(folder / "model.safetensors", llama)
    assert mentions(problems_of(folder), "not ZAYA1 tensors")


# --- index


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/../../outside.safetensors",
        "sub/inside.safetensors",
        "..",
        ".",
        "",
        "..\\outside.safetensors",
        "nul\0.safetensors",
        "\ud800.safetensors",
        "x" * 5000,
    ],
)
def test_index_that_leaves_the_folder(copy: Callable[..., Path], name: str) -> None:
    folder = copy(shards=2)
    shutil.copyfile(sorted(folder.glob("*.safetensors"))[0], folder.parent / "outside.safetensors")
    (folder / "sub").mkdir()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    problems = problems_of(folder)
    assert mentions(problems, name if len(name) > 1000 else repr(name))
    "\n".join(problems).encode()  # can be printed


@pytest.mark.parametrize("kind", ["relative", "absolute", "chain", "loop"])
@pytest.mark.parametrize("indexed", [True, False])
def test_links_out_of_the_folder(copy: Callable[..., Path], kind: str, indexed: bool) -> None:
    folder = copy(shards=2, index=indexed)
    shard = sorted(folder.glob("*.safetensors"))[1]
    outside = folder.parent / "outside.safetensors"
    shard.rename(outside)
    if kind == "chain":
        (folder / "hop").symlink_to(outside)
    target = {
        "relative": Path("..") / outside.name,
        "absolute": outside,
        "chain": Path("hop"),
        "loop": Path(shard.name),
    }[kind]
    shard.symlink_to(target)
    assert mentions(problems_of(folder), shard.name)


def test_a_link_within_the_folder_is_fine(copy: Callable[..., Path]) -> None:
    folder = copy(shards=2)
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.rename(folder / "other")
    shard.symlink_to("other")
    open_source(folder)


def test_blobs_beside_anything_but_a_snapshot_are_out_of_bounds(
    copy: Callable[..., Path],
) -> None:
    folder = copy(shards=2)
    shard = sorted(folder.glob("*.safetensors"))[1]
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    try:
        shard.rename(blobs / "b")
        shard.symlink_to(blobs / "b")
        assert mentions(problems_of(folder), shard.name, "link")
    finally:
        shutil.rmtree(blobs)
