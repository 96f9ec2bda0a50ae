"""Artifacts and outputs that are not what they seem: refused, and nothing of a person's is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nano import Nano
from rounding import nearest
from synthetic import nano_config, synthetic_tensor, write_checkpoint
from zaya_convert import manifest
from zaya_convert.convert import execute
from zaya_convert.errors import InputError, OutputExistsError, UsageError
from zaya_convert.headers import read_header
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan


@pytest.fixture
def artifact(nano_hybrid: Path, tmp_path: Path) -> Path:
    execute(
        make_plan(open_model(str(nano_hybrid)), nearest(4), "compressed-tensors"), tmp_path / "a"
    )
    return tmp_path / "a"


@pytest.mark.parametrize("packing", ["compressed-tensors", "auto-round", "dense"])
def test_a_scale_that_is_not_finite(packing: str, artifact: Path, tmp_path: Path) -> None:
    file = artifact / "model.safetensors"
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    tensor = read_header(file)[0][name]
    with file.open("r+b") as opened:
        opened.seek(tensor.begin + 6)
        opened.write(b"\x00\x7e")  # fp16 NaN
    plan = make_plan(open_model(str(artifact)), None, packing)
    with pytest.raises(
        InputError, match=r"model\.safetensors.*experts\.2\.up_proj.*value 3 is nan"
    ):
        execute(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("source", [None, "x", {}, {"digest": 1, "model": ""}])
def test_a_malformed_manifest(source: Any, artifact: Path) -> None:
    path = artifact / manifest.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source": source}))
    with pytest.raises(InputError, match="damaged"):
        open_model(str(artifact))


def _drop(found: dict[str, Any]) -> None:
    found["tensors"].popitem()


def _rename(found: dict[str, Any]) -> None:
    found["tensors"]["ghost"] = next(iter(found["tensors"].values()))


def _rehash(found: dict[str, Any]) -> None:
    next(iter(found["tensors"].values()))["sha256"] = "0" * 64


@pytest.mark.parametrize("change", [_drop, _rename, _rehash])
def test_verify_compares_every_tensor(
    change: Callable[[dict[str, Any]], None], artifact: Path
) -> None:
    manifest.verify(artifact)
    path = artifact / manifest.NAME
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match="manifest"):
        manifest.verify(artifact)


@pytest.mark.parametrize("name", ["modeling_zaya.py", "pytorch_model.bin", "evil.jinja"])
def test_verify_finds_strays(name: str, artifact: Path) -> None:
    (artifact / name).write_text("x")
    with pytest.raises(InputError, match=name):
        manifest.verify(artifact)


def test_the_dense_twin_keeps_its_provenance(nano: Nano, artifact: Path, tmp_path: Path) -> None:
    execute(make_plan(open_model(str(artifact)), None, "dense"), tmp_path / "d")
    twin, original = open_model(str(tmp_path / "d")), open_model(str(artifact))
    assert twin.manifest["source"] == original.manifest["source"]
    with pytest.raises(UsageError, match="quantized already"):
        make_plan(twin, nearest(4), "compressed-tensors")
    execute(make_plan(twin, None, "dense"), tmp_path / "d2")
    assert open_model(str(tmp_path / "d2")).manifest["source"] == original.manifest["source"]


@pytest.mark.parametrize("out", ["", "..", "../.."])
def test_overwrite_never_touches_the_input(out: str, nano_hybrid: Path, tmp_path: Path) -> None:
    source = tmp_path / "models" / "mine" / "src"
    shutil.copytree(nano_hybrid, source)
    plan = make_plan(open_model(str(source)), nearest(4), "compressed-tensors")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="never written to"):
        execute(plan, source / out, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_artifacts_only(nano_hybrid: Path, tmp_path: Path) -> None:
    plan = make_plan(open_model(str(nano_hybrid)), nearest(4), "compressed-tensors")
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="is not an artifact"):
        execute(plan, mine, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "years of work"
    execute(plan, tmp_path / "a")
    execute(plan, tmp_path / "a", overwrite=True)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    execute(plan, link, overwrite=True)
    assert not link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "link", "thesis"]


def test_scales_that_auto_round_holds_badly_are_named(tmp_path: Path) -> None:
    def tiny(key: TensorKey, shape: tuple[int, ...]) -> torch.Tensor:
        value = synthetic_tensor(key, shape, 0)
        return value * 1e-6 if key.part.endswith("experts.down_proj.weight") else value

    folder = write_checkpoint(
        tmp_path / "src", nano_config(), layout="hybrid", seed=0, tensors=tiny
    )
    plan = make_plan(open_model(str(folder)), nearest(4), "auto-round")
    result = execute(plan, tmp_path / "out")
    assert not result.widened
    assert len(result.narrow) == 3 * 8  # layers, experts
    assert all("down_proj" in name for name in result.narrow)


def test_layers_missing_at_the_end_of_a_legacy_model(nano: Nano, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for lying in (False, True):
        folder = tmp_path / str(lying)
        shutil.copytree(nano("legacy", lying=lying), folder)
        tensors = load_file(folder / "model.safetensors")
        kept = {n: t for n, t in tensors.items() if ".layers.4." not in n and ".layers.5." not in n}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(InputError, match="speaks of 6 half-layers, the tensors hold 4"):
            open_model(str(folder))


def test_windows_of_different_sizes(nano: Nano) -> None:
    source = open_model(str(nano("legacy", windows=(0, 9, 17))))
    with pytest.raises(InputError, match="windows of different sizes"):
        make_plan(source, nearest(4), "compressed-tensors")
