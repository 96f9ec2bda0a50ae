"""``inspect``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.running import Run, Zaya, imported_by
from nano import Nano, Stored, Surgery
from zaya_convert.checkpoint import open_source
from zaya_convert.inspect import active_parameters
from zaya_convert.models import open_model

pytest_plugins = ("cli.fixtures",)

CONTRACT = ("layout", "layers", "experts", "parameters_total", "parameters_active", "bytes",
            "problems")  # fmt: skip


@pytest.mark.parametrize("layout", ["hybrid", "legacy"])
def test_figures(zaya: Zaya, nano: Nano, layout: str) -> None:
    path = nano(layout)
    facts = zaya("inspect", path, "--json").json()
    assert set(CONTRACT) <= set(facts)
    assert (facts["layout"], facts["layers"], facts["experts"]) == (layout, 3, 8)
    assert facts["problems"] == []
    assert facts["tokenizer"] is False
    weights = path / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    assert facts["bytes"] == weights.stat().st_size - header
    assert facts["parameters_total"] == sum(row["weights"] for row in facts["storage"])


def test_text_is_a_table_on_stdout(process: Callable[..., Run], nano_hybrid: Path) -> None:
    done = process("inspect", nano_hybrid)
    assert (done.code, done.err) == (0, "")
    assert "active per token" in done.out
    assert "no problems" in done.out


def test_lies_of_a_legacy_config_are_noted(zaya: Zaya, nano: Nano) -> None:
    facts = zaya("inspect", nano("legacy", lying=True), "--json").json()
    assert any("num_hidden_layers" in note for note in facts["notes"])


def test_active_parameters_count_one_expert_a_layer(nano_hybrid: Path, nano: Nano) -> None:
    checkpoint = open_source(nano_hybrid)
    expected = sum(i.numel for k, i in checkpoint.infos.items() if k.expert in (-1, 0))
    assert active_parameters(checkpoint) == expected
    untied = open_source(nano(tied=False))
    config = untied.config
    head_once = expected + config.hidden  # a head as large as the embedding, and one row of that
    assert active_parameters(untied) == head_once


def test_an_artifact(zaya: Zaya, artifact: Path) -> None:
    facts = zaya("inspect", artifact, "--json").json()
    assert facts["layout"] == "compressed-tensors"
    assert facts["quantized"] is True
    assert {row["kind"].partition(" ")[0] for row in facts["storage"]} == {
        "BF16", "F32", "int4", "int8",
    }  # fmt: skip
    assert len(facts["source"]["digest"]) == 64


def test_no_torch_is_needed(nano_hybrid: Path, nano_legacy: Path, artifact: Path) -> None:
    for path in (nano_hybrid, nano_legacy, artifact):
        assert "torch" not in imported_by("inspect", str(path))


def test_a_damaged_checkpoint_lists_every_problem(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, operate: Surgery
) -> None:
    folder = Path(shutil.copytree(nano_hybrid, tmp_path / "damaged"))

    def rename(tensors: dict[str, Stored]) -> None:
        for name in list(tensors):
            if ".mlp.gate." in name:
                tensors[name + "_x"] = tensors.pop(name)

    operate(folder / "model.safetensors", rename)
    done = zaya("inspect", folder, "--json")
    assert (done.code, done.out) == (3, "")
    checkpoint = open_source(nano_hybrid)
    gates = [str(key) for key in checkpoint.infos if ".mlp.gate." in str(key)]
    assert len(gates) > 20
    for name in gates:
        assert name in done.err


@pytest.mark.parametrize("value", [None, "int4", {"quant_method": "gguf"}, []])
def test_foreign_quantization_is_named_not_crashed_on(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, value: object
) -> None:
    folder = Path(shutil.copytree(nano_hybrid, tmp_path / "foreign"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
    assert zaya("inspect", folder).code == (0 if value is None else 3)


def test_a_file_in_the_folder_will_do(nano_hybrid: Path) -> None:
    assert open_model(str(nano_hybrid / "model.safetensors")).path == nano_hybrid
