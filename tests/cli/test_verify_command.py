"""``verify``: an artifact is what was written, or every difference is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.running import Run, Zaya
from zaya_convert.headers import read_header

pytest_plugins = ("cli.fixtures",)


def test_a_good_artifact(process: Callable[..., Run], artifact: Path) -> None:
    done = process("verify", artifact, "--json")
    assert (done.code, done.err) == (0, "")
    facts = done.json()
    assert facts["verdict"] == "ok"
    assert facts["files"] == len(list(artifact.iterdir())) - 1  # the manifest vouches, unvouched


@pytest.mark.parametrize("name", ["experts.3.down_proj.weight_packed", "norm.weight"])
def test_a_flipped_bit_names_the_tensor(zaya: Zaya, copied: Path, name: str) -> None:
    weights = copied / "model.safetensors"
    tensor = next(t for n, t in read_header(weights)[0].items() if n.endswith(name))
    with weights.open("r+b") as file:
        file.seek((tensor.begin + tensor.end) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    done = zaya("verify", copied)
    assert (done.code, done.out) == (3, "")
    assert "model.safetensors" in done.err
    assert tensor.name in done.err
    assert done.err.count("has changed") == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_a_missing_file(zaya: Zaya, copied: Path, name: str) -> None:
    (copied / name).unlink()
    done = zaya("verify", copied)
    assert done.code == 3
    assert f"{name} is missing" in done.err


def test_a_stray_file(zaya: Zaya, copied: Path) -> None:
    (copied / "extra.safetensors").write_bytes(b"")
    done = zaya("verify", copied)
    assert done.code == 3
    assert "extra.safetensors is not in the manifest" in done.err


def test_a_changed_config(zaya: Zaya, copied: Path) -> None:
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config.replace("1e-05", "2e-05"))
    done = zaya("verify", copied)
    assert done.code == 3
    assert "config.json: has changed" in done.err


def test_a_truncated_file(zaya: Zaya, copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    done = zaya("verify", copied)
    assert done.code == 3
    assert "expected" in done.err


def test_a_checkpoint_without_manifest(zaya: Zaya, nano_hybrid: Path) -> None:
    done = zaya("verify", nano_hybrid)
    assert done.code == 3
    assert "only artifacts that zaya-convert wrote" in done.err


def test_no_such_folder(zaya: Zaya) -> None:
    assert zaya("verify", "/nonexistent").code == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 99),
        ("files", []),
        ("files", {"model.safetensors": 3}),
        ("files", {"model.safetensors": {"bytes": "many", "sha256": None}}),
        ("files", {"../x": {"bytes": 1, "sha256": ""}}),
        ("tensors", {}),
        ("tensors", 7),
        ("tensors", {"model.norm.weight": None}),
    ],
)
def test_a_damaged_manifest_is_bad_input(
    zaya: Zaya, copied: Path, field: str, value: object
) -> None:
    path = copied / "zaya-convert.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    weights = copied / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    done = zaya("verify", copied)
    assert (done.code, done.out) == (3, ""), done.err
