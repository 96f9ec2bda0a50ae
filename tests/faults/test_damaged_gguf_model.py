"""GGUF files whose header is sound, but which are not the model that they say they are."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.running import Zaya
from dialects import NAMES
from gguf_files import Entries, rewrite
from nano import Nano, Stored
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.export.arrays import size_of
from zaya_convert.gguf_writing import build_header
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import adjusted, for_type

pytest_plugins = ("cli.fixtures",)

Tensors = dict[str, Stored]
NORM, DOWN = "blk.1.ffn_norm.weight", "blk.3.ffn_down_exps.weight"
GATE_UP = "blk.3.ffn_gate_up_exps.weight"


@pytest.fixture(scope="module")
def files(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound file of each dialect, and one of super-blocks; not to be changed."""
    folder, made = tmp_path_factory.mktemp("sound"), {}
    narrow = nano("hybrid", layers=2, router_width=256)
    wide = nano("hybrid", layers=1, hidden=256, head_dim=64, expert_width=256, experts=2)
    for name, source, packing, kind in (
        ("pr23112", narrow, "gguf", "Q4_0"),
        ("combined40", narrow, "gguf-combined40", "Q4_0"),
        ("yggdrasil", narrow, "gguf-yggdrasil", "Q4_0"),
        ("Q4_K", wide, "gguf", "Q4_K"),
        ("Q6_K", wide, "gguf", "Q6_K"),
    ):
        made[name] = folder / f"{name}.gguf"
        recipe = adjusted(for_type(kind), method="absmax")
        execute(make_plan(open_model(str(source)), recipe, packing), made[name])
    return made


def refused(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        open_model(str(path))
    assert str(caught.value).startswith(f"{path.name}: ")
    return caught.value.problems


def store(tensors: Tensors, name: str, dtype: str, shape: list[int]) -> None:
    """A tensor of zeros, in place of another or as a new one."""
    tensors[name] = Stored(dtype, shape, bytes(size_of(dtype, shape)))


@pytest.mark.parametrize("dialect", ["pr23112", "combined40", "yggdrasil"])
def test_every_tensor_is_needed(files: dict[str, Path], tmp_path: Path, dialect: str) -> None:
    telling = {  # without these it is not told what dialect it is
        "pr23112": "blk.1.ffn_gate_inp.weight",
        "combined40": "blk.0.post_attention_norm.weight",
        "yggdrasil": "blk.0.cca_conv_dw.weight",
    }
    for name in NAMES[dialect]:
        if name == telling[dialect]:
            continue
        lacking = name.replace("gate_up", "gate") if "gate_up" in name else name
        path = rewrite(files[dialect], tmp_path / "x.gguf", tensors=lambda t, n=name: t.pop(n))
        assert f"'{lacking}' is missing" in refused(path)


@pytest.mark.parametrize("dialect", ["pr23112", "combined40", "yggdrasil"])
def test_a_file_that_does_not_tell_its_dialect(
    files: dict[str, Path], tmp_path: Path, dialect: str
) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith("blk.")]:
            tensors[name.replace("blk.", "layer.")] = tensors.pop(name)

    path = rewrite(files[dialect], tmp_path / "x.gguf", tensors=change)
    (problem,) = refused(path)
    assert "named in no dialect we know (pr23112, combined40, yggdrasil)" in problem


def _both_forms(tensors: Tensors) -> None:
    store(tensors, "blk.3.ffn_gate_exps.weight", "F32", [8, 64, 64])


def _half_a_form(tensors: Tensors) -> None:
    del tensors[GATE_UP]
    store(tensors, "blk.3.ffn_gate_exps.weight", "F32", [8, 64, 64])


def _halves_that_differ(tensors: Tensors) -> None:
    del tensors[GATE_UP]
    store(tensors, "blk.3.ffn_gate_exps.weight", "F32", [8, 64, 64])
    store(tensors, "blk.3.ffn_up_exps.weight", "F32", [8, 32, 64])


STRUCTURE: dict[str, tuple[Callable[[Tensors], object], list[str]]] = {
    "an unknown tensor": (
        lambda t: store(t, "blk.1.attn_gate.weight", "F32", [64]),
        ["'blk.1.attn_gate.weight' is unknown"],
    ),
    "a tensor of another dialect": (
        lambda t: store(t, "blk.1.res_scale_hs_mlp.weight", "F32", [64]),
        ["'blk.1.res_scale_hs_mlp.weight' is unknown"],
    ),
    "a layer too many": (
        lambda t: store(t, "blk.4.attn_norm.weight", "F32", [64]),
        ["'blk.4.attn_norm.weight' is unknown"],
    ),
    "a vector too short": (
        lambda t: store(t, NORM, "F32", [255]),
        [f"'{NORM}' has shape [255], expected [256]"],
    ),
    "a matrix on its side": (
        lambda t: store(t, "blk.0.attn_q.weight", "F32", [64, 128]),
        ["'blk.0.attn_q.weight' has shape [64, 128], expected [128, 64]"],
    ),
    "a vector as a matrix": (
        lambda t: store(t, NORM, "F32", [1, 256]),
        [f"'{NORM}' has shape [1, 256], expected [256]"],
    ),
    "too few experts": (
        lambda t: store(t, DOWN, "F32", [7, 64, 64]),
        [f"'{DOWN}' has shape [7, 64, 64], expected [8, 64, 64]"],
    ),
    "the convolution of another dialect": (
        lambda t: store(t, "blk.2.cca_conv_grp.weight", "F32", [2, 192, 32]),
        ["'blk.2.cca_conv_grp.weight' has shape [2, 192, 32], expected [192, 32, 2]"],
    ),
    "a head of another width": (
        lambda t: store(t, "output.weight", "F32", [96, 32]),
        ["'output.weight' has shape [96, 32], expected [96, 64]"],
    ),
    "a quantized norm": (
        lambda t: store(t, NORM, "Q8_0", [256]),
        [f"'{NORM}' is Q8_0, expected one of F32, F16, BF16"],
    ),
    "a quantized bias": (
        lambda t: store(t, "blk.2.cca_conv_grp.bias", "Q4_0", [192]),
        ["'blk.2.cca_conv_grp.bias' is Q4_0, expected one of F32, F16, BF16"],
    ),
    "both forms of experts": (_both_forms, ["'blk.3.ffn_gate_exps.weight' is unknown"]),
    "half a form of experts": (_half_a_form, ["'blk.3.ffn_up_exps.weight' is missing"]),
    "halves that differ": (
        _halves_that_differ,
        ["'blk.3.ffn_up_exps.weight' has shape [8, 32, 64], expected [8, 64, 64]"],
    ),
    "no embedding": (
        lambda t: t.pop("token_embd.weight"),
        ["'token_embd.weight' is missing"],
    ),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_what_does_not_fit_is_named(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    change, expected = STRUCTURE[name]
    assert refused(rewrite(files["pr23112"], tmp_path / "x.gguf", tensors=change)) == expected


def test_a_quantized_convolution(files: dict[str, Path], tmp_path: Path) -> None:
    """Tap by tap its rows are long enough for blocks."""
    name = "blk.1.cca_conv_grp.weight"
    path = rewrite(
        files["combined40"],
        tmp_path / "x.gguf",
        tensors=lambda t: store(t, name, "Q8_0", [2, 192, 32]),
    )
    assert refused(path) == [f"'{name}' is Q8_0, expected one of F32, F16, BF16"]


def test_all_problems_together(zaya: Zaya, files: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        del tensors["blk.0.attn_norm.weight"], tensors["res_scale_res.bias"]
        store(tensors, DOWN, "F32", [8, 64, 32])
        store(tensors, "zz", "F32", [1])

    path = rewrite(files["pr23112"], tmp_path / "x.gguf", tensors=change)
    assert sorted(refused(path)) == [
        "'blk.0.attn_norm.weight' is missing",
        f"'{DOWN}' has shape [8, 64, 32], expected [8, 64, 64]",
        "'res_scale_res.bias' is missing",
        "'zz' is unknown",
    ]
    for command in (["inspect"], ["verify"], ["export", "--packing", "dense"]):
        done = zaya(command[0], path, *command[1:])
        assert (done.code, done.out) == (3, "")
        assert "4 problems" in done.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


def test_promises_that_no_tensor_keeps_are_refused_at_once(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """A hundred layers of 4096 experts have a million names."""

    def change(found: Entries) -> None:
        found["zaya.block_count"], found["zaya.expert_count"] = ("u32", 200), ("u32", 4096)

    path = rewrite(files["pr23112"], tmp_path / "x.gguf", keys=change)
    started = time.monotonic()
    assert refused(path)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("architecture", ["llama", "zaya1", "ZAYA", "", None, 3])
def test_another_architecture(
    files: dict[str, Path], tmp_path: Path, architecture: str | int | None
) -> None:
    def change(found: Entries) -> None:
        del found["general.architecture"]
        if architecture is not None:
            kind = "str" if isinstance(architecture, str) else "u32"
            found["general.architecture"] = (kind, architecture)

    path = rewrite(files["pr23112"], tmp_path / "x.gguf", keys=change)
    assert refused(path) == [f"its architecture is {architecture!r}, not 'zaya'"]


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ([], "its architecture is None, not 'zaya'"),
        ([("general.type", "str", "imatrix")], "its architecture is None"),
        ([("general.architecture", "str", "zaya")], "named in no dialect"),
    ],
)
def test_files_without_tensors(
    zaya: Zaya, tmp_path: Path, metadata: list[tuple[str, str, Any]], says: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build_header(metadata, []))
    done = zaya("inspect", path)
    assert (done.code, done.out) == (3, "")
    assert says in done.err
    assert done.err.count("\n") == 1


def test_what_is_no_gguf_file(zaya: Zaya, nano: Nano, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    shutil.copy(nano("hybrid", layers=2) / "model.safetensors", path)
    for command in ("inspect", "verify", "quantize"):
        done = zaya(command, path)
        assert (done.code, done.out) == (3, "")
        assert "not a GGUF file" in done.err


# --- values --------------------------------------------------------------------------------------

NAN = b"\x00\x7e"  # fp16


def poison(path: Path, out: Path, name: str, at: int, value: bytes) -> Path:
    def change(tensors: Tensors) -> None:
        data = bytearray(tensors[name].data)
        data[at : at + len(value)] = value
        tensors[name].data = bytes(data)

    return rewrite(path, out, tensors=change)


@pytest.mark.parametrize("packing", ["gguf", "gguf-combined40", "dense"])
def test_a_scale_that_is_not_finite(files: dict[str, Path], tmp_path: Path, packing: str) -> None:
    # the first block of the third row of expert 2
    path = poison(files["pr23112"], tmp_path / "x.gguf", DOWN, (2 * 64 + 2) * 36, NAN)
    out = tmp_path / ("out.gguf" if "gguf" in packing else "out")
    with pytest.raises(InputError, match=r"x\.gguf.*experts\.2\.down_proj.* is nan"):
        execute(make_plan(open_model(str(path)), None, packing), out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.parametrize(("kind", "at"), [("Q4_K", 0), ("Q4_K", 2), ("Q6_K", 208)])
def test_a_super_block_that_is_not_finite(
    files: dict[str, Path], tmp_path: Path, kind: str, at: int
) -> None:
    path = poison(files[kind], tmp_path / "x.gguf", "blk.1.ffn_down_exps.weight", at, NAN)
    with pytest.raises(InputError, match=r"x\.gguf.*experts\.0\.down_proj.* is nan"):
        execute(make_plan(open_model(str(path)), None, "dense"), tmp_path / "out")


def test_a_float_that_is_not_finite(zaya: Zaya, files: dict[str, Path], tmp_path: Path) -> None:
    value = np.float32(np.inf).tobytes()
    path = poison(files["pr23112"], tmp_path / "x.gguf", "output_norm.weight", 8, value)
    done = zaya("export", path, "--to", "gguf", "-o", tmp_path / "out.gguf")
    assert (done.code, done.out) == (3, "")
    assert "'model.norm.weight': value 2 is inf" in done.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.gguf"]


# --- folders -------------------------------------------------------------------------------------


@pytest.fixture
def folder(nano: Nano, tmp_path: Path) -> Path:
    """An output in parts, to damage."""
    recipe = adjusted(for_type("Q4_0"), method="absmax")
    source = open_model(str(nano("hybrid", layers=2)))
    execute(make_plan(source, recipe, "gguf", 60_000), tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*.gguf")]) > 2
    return tmp_path / "out"


def test_a_missing_part(zaya: Zaya, folder: Path) -> None:
    part = sorted(folder.glob("*.gguf"))[1]
    part.unlink()
    for command in ("inspect", "verify"):
        done = zaya(command, folder)
        assert done.code == 3
        assert part.name in done.err


def test_a_missing_first_part(zaya: Zaya, folder: Path) -> None:
    first = sorted(folder.glob("*.gguf"))[0]
    first.unlink()
    done = zaya("inspect", folder)
    assert done.code == 3
    assert done.err.count("\n") == 1


def test_a_part_of_another_model(folder: Path, files: dict[str, Path]) -> None:
    part = sorted(folder.glob("*.gguf"))[1]
    shutil.copy(files["pr23112"], part)
    with pytest.raises(InputError, match=r"split\.no"):
        open_model(str(folder))


@pytest.mark.parametrize("source", [None, "x", {}, {"digest": 1, "model": ""}])
def test_a_malformed_manifest(folder: Path, source: Any) -> None:
    path = folder / "zaya-convert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
    with pytest.raises(InputError, match="damaged"):
        open_model(str(folder))


def test_a_stray_file(zaya: Zaya, folder: Path) -> None:
    (folder / "extra.gguf").write_bytes(b"")
    done = zaya("verify", folder)
    assert done.code == 3
    assert "extra.gguf is not in the manifest" in done.err
