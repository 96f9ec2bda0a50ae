"""GGUF on the command line: written as one file, as a folder or in parts, and read everywhere."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli.running import Run, Zaya
from gguf_files import foreign, rewrite
from nano import Nano, Stored, Surgery
from rounding import NEAREST
from zaya_convert import stats
from zaya_convert.cli.main import run
from zaya_convert.gguf_header import read_gguf
from zaya_convert.models import open_model

pytest_plugins = ("cli.fixtures",)

NO_TOKENIZER = "note: the file has no tokenizer: the model has no tokenizer.json; feed it token ids"


def types(path: Path) -> Counter[str]:
    """How many tensors there are of each type."""
    return Counter(tensor.dtype for tensor in read_gguf(path).tensors.values())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(path: Path, name: str, at: float = 0.5) -> None:
    """Change one bit of a tensor."""
    tensor = read_gguf(path).tensors[name]
    with path.open("r+b") as file:
        file.seek(tensor.begin + int((tensor.end - tensor.begin) * at))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture(scope="module")
def plain(nano: Nano) -> Path:
    """Without windows, which only one dialect has."""
    return nano("hybrid", layers=2)


@pytest.fixture(scope="module")
def made(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the plain model by type, shared and so not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    found = {kind: folder / f"{kind}.gguf" for kind in ("BF16", "Q4_0")}
    for kind, path in found.items():
        export = ["export", str(plain), "--to", "gguf", "--type", kind, "-o", str(path), "-q"]
        assert run(export) == 0
    return found


# --- writing -------------------------------------------------------------------------------------


def test_a_single_file(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = zaya("export", plain, "--to", "gguf", "-o", out)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert NO_TOKENIZER in done.err
    assert "loaders of the dialect pr23112: the skip expert is never chosen" in done.err
    assert f"prove it: zaya-convert validate {out} --reference {plain}" in done.err
    assert names(tmp_path) == ["x.gguf"]
    facts = zaya("export", plain, "--to", "gguf", "-o", tmp_path / "y.gguf", "--json").json()
    assert facts["packing"] == "gguf"
    assert facts["recipe"] is None
    assert facts["bytes"] == out.stat().st_size
    assert (tmp_path / "y.gguf").read_bytes() == out.read_bytes()
    # matrices as they were, the router and all vectors wider
    assert types(out).keys() == {"BF16", "F32"}


def test_a_folder_has_a_manifest_and_a_card(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plain, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    options = ("--type", "q8_0", "--base-model", "org/name", "-o", out)
    assert zaya("export", source, "--to", "gguf", *options).code == 0
    assert names(out) == ["README.md", "chat_template.jinja", "model.gguf", "zaya-convert.json"]
    card = (out / "README.md").read_text()
    assert 'base_model: "org/name"' in card
    assert "llama.cpp" in card
    manifest = json.loads((out / "zaya-convert.json").read_text())
    assert manifest["packing"] == "gguf"
    assert manifest["tensors"].keys() == read_gguf(out / "model.gguf").tensors.keys()
    facts = zaya("verify", out, "--json").json()
    assert (facts["verdict"], facts["layout"]) == ("ok", "gguf pr23112")
    opened = open_model(str(out))
    assert opened.manifest["source"] == manifest["source"]


def test_the_file_in_a_folder_is_the_file_alone(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    for out in ("x.gguf", "x"):
        export = ("export", plain, "--to", "gguf", "--type", "Q4_0", "-o", tmp_path / out)
        assert zaya(*export).code == 0
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "x" / "model.gguf").read_bytes()


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("combined40", "blk.0.post_attention_norm.weight"), ("yggdrasil", "blk.0.cca_conv_dw.weight")],
)
def test_dialects(zaya: Zaya, nano: Nano, tmp_path: Path, dialect: str, name: str) -> None:
    source = nano("hybrid", layers=2, router_width=256)
    out = tmp_path / "x.gguf"
    assert zaya("export", source, "--to", "gguf", "--dialect", dialect, "-o", out).code == 0
    assert name in read_gguf(out).tensors
    facts = zaya("inspect", out, "--json").json()
    assert facts["layout"] == f"gguf {dialect}"


def test_parts(zaya: Zaya, plain: Path, made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export = ("export", plain, "--to", "gguf", "--type", "Q4_0", "--shard-size", "50kB", "-o", out)
    facts = zaya(*export, "--json").json()
    parts = sorted(out.glob("*.gguf"))
    assert len(parts) > 2
    assert facts["bytes"] == sum(part.stat().st_size for part in parts)
    assert zaya("verify", out).code == 0
    assert zaya("verify", parts[1]).code == 0
    whole = open_model(str(made["Q4_0"]))
    for path in (out, parts[1]):
        opened = open_model(str(path))
        assert all(torch.equal(whole.read_float(k), opened.read_float(k)) for k in whole.infos)


def test_parts_are_no_single_file(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    done = zaya("export", plain, "--to", "gguf", "--shard-size", "50kB", "-o", out)
    assert (done.code, done.out) == (2, "")
    assert "splitting makes several files; name a folder instead" in done.err
    assert names(tmp_path) == []
    # before any calibration
    done = zaya("quantize", plain, "--format", "gguf", "--shard-size", "50kB", "-o", out)
    assert (done.code, done.out) == (2, "")
    assert "splitting makes several files" in done.err
    assert "calibrat" not in done.err
    assert names(tmp_path) == []
    # one that is large enough is no split
    assert zaya("export", plain, "--to", "gguf", "--shard-size", "5GB", "-o", out).code == 0


def test_a_dry_run_is_exact_and_writes_nothing(
    zaya: Zaya, plain: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    export = ("export", plain, "--to", "gguf", "--type", "Q4_0", "-o", tmp_path / "x.gguf")
    shown = zaya(*export, "--dry-run")
    assert "int4 group 32 symmetric" in shown.out
    plan = zaya(*export, "--dry-run", "--json").json()
    tensors = read_gguf(made["Q4_0"]).tensors.values()
    assert plan["bytes"] == sum(tensor.end - tensor.begin for tensor in tensors)
    assert not any(tmp_path.iterdir())


def test_quantizing_to_gguf(process: Callable[..., Run], nano: Nano, tmp_path: Path) -> None:
    source = nano("hybrid", layers=2, hidden=256, head_dim=64, expert_width=256, experts=2)
    done = process("quantize", source, "--format", "gguf", "--json", cwd=tmp_path)
    assert done.code == 0
    out = tmp_path / f"{source.name}-q4_k_m.gguf"
    assert done.json()["output"] == out.name
    assert done.json()["recipe"] == "q4_k_m"
    assert names(tmp_path) == [out.name]
    held = {name: tensor.dtype for name, tensor in read_gguf(out).tensors.items()}
    assert held["token_embd.weight"] == "Q6_K"
    assert held["blk.0.attn_q.weight"] == held["blk.2.cca_val_proj2.weight"] == "Q6_K"
    assert held["blk.1.ffn_gate_up_exps.weight"] == held["blk.3.ffn_down_exps.weight"] == "Q4_K"
    assert held["blk.1.ffn_gate.weight"] == "F16"
    assert held["blk.1.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize(
    ("options", "experts"),
    [
        (["--recipe", "Q5_1"], "Q5_1"),
        (["--recipe", "iq4_nl"], "IQ4_NL"),
        (["--bits", "4"], "Q4_0"),
        (["--bits", "8", "--group-size", "64"], "Q8_0"),
        (["--recipe", "int4"], "Q4_0"),
    ],
)
def test_recipes_for_gguf(
    zaya: Zaya, plain: Path, tmp_path: Path, options: list[str], experts: str
) -> None:
    out = tmp_path / "x.gguf"
    assert zaya("quantize", plain, "--format", "gguf", *options, "-o", out).code == 0
    assert read_gguf(out).tensors["blk.1.ffn_down_exps.weight"].dtype == experts
    assert zaya("verify", out).code == 0


def test_rows_that_are_no_whole_super_blocks(zaya: Zaya, nano: Nano, tmp_path: Path) -> None:
    """As llama.cpp has it: Q4_K gives way to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0."""
    source = nano("hybrid", layers=1, hidden=256, head_dim=32, expert_width=96, experts=2)
    for kind, fallback in (("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0")):
        out = tmp_path / f"{kind}.gguf"
        assert zaya("export", source, "--to", "gguf", "--type", kind, "-o", out).code == 0
        held = {name: tensor.dtype for name, tensor in read_gguf(out).tensors.items()}
        assert held["blk.1.ffn_gate_up_exps.weight"] == held["blk.0.attn_q.weight"] == kind
        assert held["blk.1.ffn_down_exps.weight"] == fallback  # rows of 96
        assert held["blk.0.attn_output.weight"] == fallback  # rows of 128


def test_calibration_is_told(
    zaya: Zaya, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NEAREST:
        monkeypatch.delenv(name)
    out, kept = tmp_path / "x.gguf", tmp_path / "kept.safetensors"
    options = ("--recipe", "Q4_0", "--tokens", 64, "--max-tokens", 64, "--stats", kept)
    done = zaya("quantize", plain, "--format", "gguf", *options, "-o", out)
    assert done.code == 0, done.err
    assert "calibrated on 64 tokens" in done.err
    header = read_gguf(out)
    assert header.metadata["zaya_convert.calibration.digest"] == stats.read(kept).digest
    data = header.metadata["zaya_convert.calibration.data"]
    assert str(data).startswith("random token ids")
    assert header.metadata["zaya_convert.calibration.tokens"] == 64
    assert header.kinds["zaya_convert.calibration.tokens"] == "u64"
    assert open_model(str(out)).manifest["calibration"]["tokens"] == 64
    again = tmp_path / "again.gguf"
    assert zaya("export", out, "--to", "gguf", "-o", again).code == 0
    assert open_model(str(again)).manifest["calibration"]["tokens"] == 64
    folder = tmp_path / "folder"
    assert zaya("export", again, "--packing", "dense", "-o", folder).code == 0
    assert "Calibrated on 64 tokens of random token ids" in (folder / "README.md").read_text()
    assert zaya("validate", folder, "--reference", plain, "--tokens", 64).code == 0


def test_modes_honour_the_umask(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert zaya("export", plain, "--to", "gguf", "-o", tmp_path / "x.gguf").code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "x.gguf").stat().st_mode & 0o777 == 0o640


# --- reading -------------------------------------------------------------------------------------


def test_verify(zaya: Zaya, made: dict[str, Path]) -> None:
    done = zaya("verify", made["Q4_0"], "--json")
    assert (done.code, done.err) == (0, "")
    facts = done.json()
    assert (facts["verdict"], facts["files"]) == ("ok", 1)
    assert facts["bytes"] == made["Q4_0"].stat().st_size
    assert facts["source"]["digest"] == open_model(str(made["Q4_0"])).manifest["source"]["digest"]
    assert zaya("verify", made["Q4_0"]).out.startswith(f"{made['Q4_0']}: ok, ")


@pytest.mark.parametrize(
    ("stored", "at", "tensor"),
    [
        ("blk.3.ffn_down_exps.weight", 0.9, "model.layers.1.mlp.experts.7.down_proj.weight"),
        ("blk.1.ffn_gate_up_exps.weight", 0.01, "model.layers.0.mlp.experts.0.gate_proj.weight"),
        ("blk.1.ffn_gate_up_exps.weight", 0.10, "model.layers.0.mlp.experts.0.up_proj.weight"),
        ("output_norm.weight", 0.5, "model.norm.weight"),
    ],
)
def test_a_flipped_bit_names_the_tensor(
    zaya: Zaya, made: dict[str, Path], tmp_path: Path, stored: str, at: float, tensor: str
) -> None:
    path = Path(shutil.copy(made["Q4_0"], tmp_path / "x.gguf"))
    flip(path, stored, at)
    done = zaya("verify", path)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith(f"error: x.gguf: '{tensor}' has changed")
    assert done.err.count("has changed") == 1


def test_a_flipped_bit_in_a_folder(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--to", "gguf", "--shard-size", "100kB", "-o", out)
    assert zaya("export", plain, *options).code == 0
    part = sorted(out.glob("*.gguf"))[1]
    name = next(iter(read_gguf(part).tensors))
    flip(part, name)
    done = zaya("verify", out)
    assert done.code == 3
    assert f"{part.name}: tensor '{name}' has changed" in done.err
    part.unlink()
    assert f"{part.name} is missing" in zaya("verify", out).err


def test_files_without_checksums_cannot_be_verified(
    zaya: Zaya, made: dict[str, Path], tmp_path: Path
) -> None:
    path = rewrite(made["Q4_0"], tmp_path / "x.gguf", keys=foreign)
    done = zaya("verify", path)
    assert done.code == 3
    assert "only files that zaya-convert wrote can be verified" in done.err
    short = rewrite(
        made["Q4_0"],
        tmp_path / "y.gguf",
        keys=lambda found: found["zaya_convert.checksums"][1].pop(),
    )
    assert "checksums for" in zaya("verify", short).err


def test_a_truncated_file(zaya: Zaya, made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(made["Q4_0"].read_bytes()[:-100])
    for command in ("verify", "inspect"):
        done = zaya(command, path)
        assert (done.code, done.out) == (3, "")
        assert "truncated" in done.err


def test_inspect(zaya: Zaya, plain: Path, made: dict[str, Path]) -> None:
    facts, original = (zaya("inspect", x, "--json").json() for x in (made["Q4_0"], plain))
    assert facts["parameters_total"] == original["parameters_total"]
    assert facts["parameters_active"] == original["parameters_active"]
    assert facts["quantized"] is True
    assert facts["files"] == ["Q4_0.gguf"]
    assert facts["tokenizer"] is False
    rows = {row["kind"]: row for row in facts["storage"]}
    assert rows["int4 group 32 symmetric float16"]["tensors"] == 2 * (8 * 3 + 5)
    assert sum(row["weights"] for row in rows.values()) == facts["parameters_total"]
    assert "no problems" in zaya("inspect", made["Q4_0"]).out


def test_validate(zaya: Zaya, plain: Path, made: dict[str, Path]) -> None:
    arguments = ("--reference", plain, "--tokens", 32, "--json")
    exact = zaya("validate", made["BF16"], *arguments, "--max-kl", "0").json()
    assert (exact["verdict"], exact["kl_mean"]) == ("pass", 0)
    rounded = zaya("validate", made["Q4_0"], *arguments)
    assert rounded.code == 0
    assert rounded.json()["kl_mean"] > 0


def test_generate_and_the_default_reference(zaya: Zaya, bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert zaya("quantize", "--format", "gguf", "--recipe", "Q8_0", "-o", out).code == 0
    report = zaya("validate", out, "--tokens", 64, "--max-kl", 0.01, "--json")
    assert report.code == 0
    assert "reference: the bundled checkpoint" in report.err
    arguments = ("--prompt", "A:1+2=", "--raw", "--max-new-tokens", 4, "--dtype", "float32", "-q")
    found, expected = (zaya("generate", model, *arguments) for model in (out, bundled))
    assert found.code == 0
    assert found.out == expected.out != ""


# --- there and back ------------------------------------------------------------------------------


def test_back_to_safetensors(zaya: Zaya, nano: Nano, tmp_path: Path) -> None:
    source = nano("hybrid", dtype=torch.float32, layers=2)
    one, two, three = tmp_path / "1", tmp_path / "2.gguf", tmp_path / "3"
    assert zaya("quantize", source, "--bits", "4", "-o", one).code == 0
    assert zaya("export", one, "--to", "gguf", "-o", two).code == 0
    assert zaya("export", two, "-o", three).code == 0
    assert (three / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    before, after = (json.loads((x / "zaya-convert.json").read_text()) for x in (one, three))
    assert after["source"] == before["source"]
    assert after["recipe"] == before["recipe"]
    assert zaya("verify", three).code == 0


def test_block_types_stay_in_gguf(zaya: Zaya, nano: Nano, tmp_path: Path) -> None:
    source = nano("hybrid", layers=1, hidden=256, head_dim=64, expert_width=256, experts=2)
    path = tmp_path / "x.gguf"
    assert zaya("export", source, "--to", "gguf", "--type", "Q4_K", "-o", path).code == 0
    for packing in ("compressed-tensors", "auto-round"):
        done = zaya("export", path, "--packing", packing, "-o", tmp_path / "out")
        assert (done.code, done.out) == (3, "")
        assert "Q4_K is a block type of GGUF" in done.err
    assert names(tmp_path) == ["x.gguf"]
    assert zaya("export", path, "--packing", "dense", "-o", tmp_path / "out").code == 0
    assert zaya("inspect", tmp_path / "out", "--json").json()["layout"] == "hybrid"


def test_quantizing_twice_is_refused(zaya: Zaya, made: dict[str, Path], tmp_path: Path) -> None:
    for format, name in (("gguf", "x.gguf"), ("safetensors", "x")):
        done = zaya("quantize", made["Q4_0"], "--format", format, "-o", tmp_path / name)
        assert done.code == 2
        assert "quantized already" in done.err
    again = ("export", made["Q4_0"], "--to", "gguf", "--type", "Q8_0", "-o", tmp_path / "x.gguf")
    assert zaya(*again).code == 2
    assert not any(tmp_path.iterdir())


def test_blocks_can_become_floats(zaya: Zaya, made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    assert zaya("export", made["Q4_0"], "--to", "gguf", "--type", "F32", "-o", out).code == 0
    assert types(out).keys() == {"F32"}
    one, two = open_model(str(made["Q4_0"])), open_model(str(out))
    assert all(torch.equal(one.read_float(k).float(), two.read_float(k)) for k in one.infos)
    # what was quantized once is not the original, whatever its type
    assert zaya("quantize", out, "--bits", "4", "-o", tmp_path / "again").code == 2


def test_floats_in_gguf_can_be_quantized(
    zaya: Zaya, plain: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    """Also those whose type was chosen: bf16 weights in BF16 are the weights."""
    for name, source in (("1", plain), ("2", made["BF16"])):
        assert zaya("quantize", source, "--bits", "4", "-o", tmp_path / name).code == 0
    one, two = (open_model(str(tmp_path / name)) for name in ("1", "2"))
    assert two.manifest["source"]["digest"] == one.manifest["source"]["digest"]
    assert all(torch.equal(one.read_float(k), two.read_float(k).to(one.read_float(k).dtype))
               for k in one.infos)  # fmt: skip


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("export", ["--to", "gguf", "--packing", "dense"], "--packing is for safetensors"),
        ("quantize", ["--format", "gguf", "--packing", "auto-round"], "GGUF has --dialect"),
        ("export", ["--dialect", "combined40", "--packing", "dense"], "--dialect is for GGUF"),
        ("quantize", ["--dialect", "yggdrasil"], "--dialect is for GGUF"),
        ("export", [], "name one, or give --to gguf"),
        ("export", ["--packing", "dense"], "is a name for GGUF; dense writes a folder"),
        ("quantize", ["--bits", "4"], "is a name for GGUF; compressed-tensors writes a folder"),
        ("export", ["--to", "gguf", "--type", "Q9_9"], "'Q9_9' is not one of"),
        ("export", ["--packing", "dense", "--type", "Q4_K"], "a type of GGUF; give --to gguf"),
        ("export", ["--to", "gguf", "--dialect", "pr1"], "'pr1' is not one of"),
    ],
)
def test_options_of_another_format(
    zaya: Zaya, plain: Path, tmp_path: Path, command: str, options: list[str], says: str
) -> None:
    done = zaya(command, plain, *options, "-o", tmp_path / "x.gguf")
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert not any(tmp_path.iterdir())


def test_rows_that_no_block_divides(zaya: Zaya, nano: Nano, tmp_path: Path) -> None:
    source, out = nano("hybrid", layers=1, hidden=80), tmp_path / "x.gguf"
    done = zaya("export", source, "--to", "gguf", "--type", "Q4_K", "-o", out)
    assert (done.code, done.out) == (3, "")
    assert "rows of 80 weights are no whole number of 32" in done.err
    assert zaya("export", source, "--to", "gguf", "--type", "F16", "-o", out).code == 0


def test_models_that_a_dialect_cannot_hold(
    zaya: Zaya, nano: Nano, nano_hybrid: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "x.gguf")
    done = zaya("export", nano_hybrid, "--to", "gguf", *out)
    assert done.code == 3
    assert "pr23112 has no sliding windows; use the dialect combined40" in done.err
    done = zaya("export", nano_hybrid, "--to", "gguf", "--dialect", "yggdrasil", *out)
    assert "its router must be 256 wide, the model's is 32" in done.err
    assert not any(tmp_path.iterdir())
    done = zaya("export", nano_hybrid, "--to", "gguf", "--dialect", "combined40", *out)
    assert done.code == 0


def test_experts_of_one_tensor_must_share_a_type(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        '[[rules]]\nmatch = "model.layers.1.mlp.experts.3.down_proj"\ntype = "Q8_0"\n'
        '[[rules]]\nmatch = "experts"\ntype = "Q4_0"\n'
    )
    out = tmp_path / "x.gguf"
    done = zaya("quantize", plain, "--format", "gguf", "--recipe", recipe, "-o", out)
    assert (done.code, done.out) == (3, "")
    assert done.err.strip().count("\n") == 0
    assert "blk.3.ffn_down_exps.weight holds several matrices" in done.err
    assert "as Q4_0 and as Q8_0" in done.err
    assert "give all its experts one type" in done.err
    assert names(tmp_path) == ["mixed.toml"]


def test_gate_and_up_must_share_a_type_but_down_need_not(
    zaya: Zaya, plain: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "mixed.toml", tmp_path / "x.gguf"
    recipe.write_text(
        '[[rules]]\nmatch = "*.up_proj"\ntype = "F16"\n'
        '[[rules]]\nmatch = "experts"\ntype = "Q4_0"\n'
    )
    arguments = ("quantize", plain, "--format", "gguf", "--recipe", recipe, "-o", out)
    assert "blk.1.ffn_gate_up_exps.weight" in zaya(*arguments).err
    recipe.write_text(recipe.read_text().replace("up_proj", "down_proj"))
    assert zaya(*arguments).code == 0
    held = read_gguf(out).tensors
    assert held["blk.1.ffn_down_exps.weight"].dtype == "F16"
    assert held["blk.1.ffn_gate_up_exps.weight"].dtype == "Q4_0"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("self_attn.o_proj.weight", ["--type", "F16"]),
        ("router_mlp.fc1.weight", ["--type", "Q8_0"]),
        ("conv_qk_grouped.weight", ["--dialect", "yggdrasil"]),
    ],
)
def test_what_f16_cannot_hold(
    zaya: Zaya, nano: Nano, tmp_path: Path, operate: Surgery, name: str, options: list[str]
) -> None:
    folder = nano("hybrid", layers=2, router_width=256)
    source = Path(shutil.copytree(folder, tmp_path / "source"))

    def enlarge(tensors: dict[str, Stored]) -> None:
        tensor = tensors[next(found for found in tensors if found.endswith(name))]
        tensor.data = struct.pack("<f", 1e5)[2:] + tensor.data[2:]  # the upper half is the bf16

    operate(source / "model.safetensors", enlarge)
    done = zaya("export", source, "--to", "gguf", *options, "-o", tmp_path / "x.gguf")
    assert (done.code, done.out) == (3, "")
    assert f"{name}': 99840 does not fit F16; use BF16 or F32" in done.err
    assert names(tmp_path) == ["source"]


def test_the_input_is_never_the_output(zaya: Zaya, made: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(made["Q4_0"], tmp_path / "x.gguf"))
    before = path.read_bytes()
    done = zaya("export", path, "--to", "gguf", "-o", path, "--overwrite")
    assert done.code == 2
    assert "never written to" in done.err
    assert path.read_bytes() == before
    assert names(tmp_path) == ["x.gguf"]


def test_overwrite_replaces_gguf_files_only(zaya: Zaya, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    export = ("export", plain, "--to", "gguf", "-o", out)
    out.write_text("my thesis, badly named")
    done = zaya(*export)
    assert done.code == 6
    assert "--overwrite" in done.err
    done = zaya(*export, "--overwrite")
    assert done.code == 6
    assert "it is no GGUF file" in done.err
    assert out.read_text() == "my thesis, badly named"
    out.unlink()
    out.mkdir()
    (out / "mine").write_text("kept")
    assert zaya(*export, "--overwrite").code == 6
    assert (out / "mine").read_text() == "kept"
    shutil.rmtree(out)
    assert zaya(*export, "--type", "Q8_0").code == 0
    before = out.read_bytes()
    assert zaya(*export).code == 6
    assert out.read_bytes() == before
    assert zaya(*export, "--overwrite").code == 0
    assert types(out).keys() == {"BF16", "F32"}
    assert names(tmp_path) == ["x.gguf"]


def test_a_folder_of_several_models_must_be_told_apart(zaya: Zaya, made: dict[str, Path]) -> None:
    done = zaya("inspect", made["Q4_0"].parent)
    assert done.code == 3
    assert "holds several models (BF16.gguf, Q4_0.gguf); name one of the files" in done.err


def test_types_are_recipes_by_name(zaya: Zaya) -> None:
    shown = zaya("recipes", "q4_k")
    assert shown.code == 0
    assert 'type = "Q4_K"' in shown.out
    facts = zaya("recipes", "Q8_0", "--json").json()
    assert [rule["type"] for rule in facts["rules"]] == ["Q8_0"] * 3
    assert "q4_k_m" in zaya("recipes").out
    assert "did you mean 'Q4_" in zaya("recipes", "Q4_9").err
