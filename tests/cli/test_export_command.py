"""``export``: another packing, the same codes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from cli.running import Run, Zaya
from nano import Nano
from zaya_convert.models import open_model
from zaya_quant.qtensor import QuantTensor

pytest_plugins = ("cli.fixtures",)


def test_codes_and_scales_survive_every_packing(zaya: Zaya, artifact: Path, tmp_path: Path) -> None:
    original = open_model(str(artifact))
    arguments = ("--to", "safetensors", "--packing", "auto-round", "-o")
    assert zaya("export", artifact, *arguments, tmp_path / "rounded").code == 0
    other = open_model(str(tmp_path / "rounded"))
    dense = tmp_path / "dense"
    assert zaya("export", tmp_path / "rounded", "--packing", "dense", "-o", dense).code == 0
    twin = open_model(str(dense))
    for key, info in original.infos.items():
        if info.spec is None:
            continue
        a, b = original.read(key), other.read(key)
        assert isinstance(a, QuantTensor)
        assert isinstance(b, QuantTensor)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scales, b.scales)
        assert torch.equal(twin.read(key), a.dequantize(torch.bfloat16))


def test_provenance_is_handed_on(zaya: Zaya, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "dense"
    zaya("export", artifact, "--packing", "dense", "-o", out)
    before, after = (json.loads((f / "zaya-convert.json").read_text()) for f in (artifact, out))
    assert after["source"]["digest"] == before["source"]["digest"]
    assert after["recipe"] == before["recipe"]


def test_legacy_to_hybrid(zaya: Zaya, nano: Nano, tmp_path: Path) -> None:
    out = tmp_path / "hybrid"
    facts = zaya("export", nano("legacy"), "--packing", "dense", "-o", out, "--json").json()
    assert facts["output"] == str(out)
    source, written = open_model(str(nano("legacy"))), open_model(str(out))
    assert written.format == "hybrid"
    for key in source.infos:
        assert torch.equal(source.read_float(key), written.read_float(key))


def test_floats_have_no_quantized_packing(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    done = zaya("export", nano_hybrid, "-o", tmp_path / "out")
    assert done.code == 2
    assert "dense" in done.err


def test_as_a_process_with_the_default_name(
    process: Callable[..., Run], artifact: Path, tmp_path: Path
) -> None:
    done = process("export", artifact, "--packing", "dense", "-q", cwd=tmp_path)
    assert (done.code, done.out, done.err) == (0, "nano-int4-dense\n", "")


def test_what_overrules_a_config_is_noted(zaya: Zaya, nano: Nano, tmp_path: Path) -> None:
    lying = nano("legacy", lying=True)
    out = ("--packing", "dense", "-o", tmp_path / "out", "--dry-run")
    assert "num_hidden_layers" in zaya("export", lying, *out).err
    assert zaya("export", lying, *out, "-q").err == ""
    assert "num_hidden_layers" in zaya("quantize", lying, "--dry-run").err
    assert zaya("inspect", lying).err == ""  # there they are part of the result
