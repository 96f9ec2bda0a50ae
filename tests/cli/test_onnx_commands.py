"""``quantize --format onnx`` and ``export --to onnx``."""

import json
from pathlib import Path

import pytest

from cli.running import Zaya, imported_by

pytest.importorskip("onnx")
pytest_plugins = ("cli.fixtures",)


def test_from_a_model_and_back(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = zaya("quantize", nano_hybrid, "--format", "onnx", "--method", "rtn", "--json")
    assert done.code == 0
    assert done.json()["output"] == f"{nano_hybrid.name}-onnx-int4"
    assert zaya("verify", done.json()["output"]).code == 0
    shown = zaya("inspect", done.json()["output"]).out
    assert "int4 group 32 symmetric float16" in shown
    out = tmp_path / "int4"
    options = ("--recipe", "int4", "--method", "rtn", "-o", out)
    assert zaya("quantize", nano_hybrid, "--format", "onnx", *options).code == 0
    back = tmp_path / "back"
    assert zaya("export", out, "-o", back).code == 0
    assert json.loads((back / "zaya-convert.json").read_text())["packing"] == "compressed-tensors"
    again = tmp_path / "again"
    assert zaya("export", back, "--to", "onnx", "-o", again).code == 0
    data = Path("onnx") / "model.onnx_data"
    assert (again / data).read_bytes() == (out / data).read_bytes()


@pytest.mark.parametrize(
    "options", [("--packing", "dense"), ("--dialect", "combined40")], ids=lambda found: found[0]
)
def test_options_of_other_formats(zaya: Zaya, options: tuple[str, str], nano_hybrid: Path) -> None:
    done = zaya("export", nano_hybrid, "--to", "onnx", *options)
    assert done.code == 2
    assert options[0] in done.err


def test_bits_that_operators_do_not_take(zaya: Zaya, nano_hybrid: Path) -> None:
    done = zaya("quantize", nano_hybrid, "--format", "onnx", "--bits", "3", "--dry-run")
    assert done.code == 3
    assert "the ONNX operators take 4 or 8" in done.err


def test_plans_need_no_onnx(nano_hybrid: Path) -> None:
    found = imported_by("quantize", str(nano_hybrid), "--format", "onnx", "--dry-run")
    assert not found & {"onnx", "onnxruntime"}
