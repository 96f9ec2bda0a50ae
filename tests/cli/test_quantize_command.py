"""``quantize``: results, plans, refusals. What interrupts it is in ``tests/faults``."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.running import Run, Zaya
from nano import Nano
from rounding import NEAREST
from zaya_convert.cli.params import parse_size
from zaya_convert.models import open_model

pytest_plugins = ("cli.fixtures",)

CONTRACT = ("output", "bytes", "bits_per_weight", "seconds", "peak_memory_bytes", "resumed_steps",
            "bf16_scales", "source_digest")  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_as_a_process(process: Callable[..., Run], nano_hybrid: Path, tmp_path: Path) -> None:
    done = process("quantize", nano_hybrid, "--bits", "4", cwd=tmp_path)
    assert done.code == 0
    name = f"{nano_hybrid.name}-int4"
    assert done.out == f"{name}\n"
    assert f"prove it: zaya-convert validate {name} --reference {nano_hybrid}" in done.err
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_json(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    facts = zaya("quantize", nano_hybrid, "--bits", "4", "-o", out, "--json").json()
    assert set(CONTRACT) <= set(facts)
    assert facts["output"] == str(out)
    assert facts["bytes"] == (out / "model.safetensors").stat().st_size
    assert facts["resumed_steps"] == 0
    assert facts["peak_memory_bytes"] > 10_000_000
    manifest = json.loads((out / "zaya-convert.json").read_text())
    assert manifest["source"]["digest"] == facts["source_digest"]


def test_the_default_recipe_calibrates(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NEAREST:
        monkeypatch.delenv(name)
    out = tmp_path / "out"
    done = zaya("quantize", nano_hybrid, "--tokens", 64, "--max-tokens", 64, "-o", out)
    assert done.code == 0
    assert "calibrated on 64 tokens of random token ids" in done.err
    manifest = json.loads((out / "zaya-convert.json").read_text())
    assert manifest["calibration"]["tokens"] == 64
    assert {rule["method"] for rule in manifest["recipe"]["rules"]} == {"gptaq"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_dry_run_plans_exactly_and_writes_nothing(
    zaya: Zaya, nano_hybrid: Path, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shown = zaya("quantize", nano_hybrid, "--dry-run", "-o", out)
    assert "int4 group 32 symmetric" in shown.out
    assert "are free there" in shown.out
    plan = zaya("quantize", nano_hybrid, "--dry-run", "-o", out, "--json").json()
    assert not any(tmp_path.iterdir())
    written = sum(info.bytes for info in open_model(str(artifact)).infos.values())
    assert plan["bytes"] == written
    assert plan["free_bytes"] > 0


def test_same_bytes_at_any_thread_count_and_from_either_layout(
    zaya: Zaya, nano: Nano, artifact: Path, tmp_path: Path
) -> None:
    made = {"given": digests(artifact)}
    for layout in ("hybrid", "legacy"):
        for threads in (1, 2):
            out = tmp_path / f"{layout}{threads}"
            done = zaya("quantize", nano(layout), "--threads", threads, "-o", out, "-q")
            assert done.code == 0
            made[out.name] = digests(out)
    assert len({json.dumps(found, sort_keys=True) for found in made.values()}) == 1


def test_shards(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert zaya("quantize", nano_hybrid, "--shard-size", "100kB", "-o", out).code == 0
    shards = list(out.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    assert (out / "model.safetensors.index.json").is_file()
    assert zaya("verify", out).code == 0


@pytest.mark.parametrize("packing", ["auto-round", "dense"])
def test_other_packings(zaya: Zaya, nano_hybrid: Path, tmp_path: Path, packing: str) -> None:
    out = tmp_path / "out"
    assert zaya("quantize", nano_hybrid, "--packing", packing, "-o", out).code == 0
    assert zaya("inspect", out).code == 0


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 8])
def test_every_width(zaya: Zaya, nano_hybrid: Path, tmp_path: Path, bits: int) -> None:
    out = tmp_path / "out"
    arguments = ("--bits", bits, "--group-size", -1, "-o", out, "-q")
    assert zaya("quantize", nano_hybrid, *arguments).code == 0
    kinds = {row["kind"] for row in zaya("inspect", out, "--json").json()["storage"]}
    assert f"int{bits} per channel symmetric float16" in kinds


def test_base_model_reaches_card_and_manifest(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    zaya("quantize", nano_hybrid, "--base-model", "org/name", "-o", out)
    assert 'base_model: "org/name"' in (out / "README.md").read_text()
    assert json.loads((out / "zaya-convert.json").read_text())["source"]["model"] == "org/name"


def test_modes_honour_the_umask(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert zaya("quantize", nano_hybrid, "-o", tmp_path / "out").code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--bits", "7"], 2, "allowed: 2, 3, 4"),
        (["--group-size", "24"], 2, "multiple of 16"),
        (["--recipe", "int5"], 2, "did you mean"),
        (["--group-size", "48"], 3, "does not divide"),
        (["--bits", "3", "--packing", "auto-round"], 3, "3 bits do not fit"),
    ],
)
def test_plans_that_cannot_be(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    done = zaya("quantize", nano_hybrid, "-o", tmp_path / "out", *arguments)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    assert not any(tmp_path.iterdir())


def test_an_unknown_recipe_key_names_the_nearest(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[rules]]\nmatch = "experts"\nbist = 4\ngroup-size = 32\n')
    done = zaya("quantize", nano_hybrid, "--recipe", recipe, "-o", tmp_path / "out")
    assert done.code == 3
    assert "'bist' (did you mean 'bits'?)" in done.err
    assert "'group-size' (did you mean 'group_size'?)" in done.err


def test_a_recipe_that_quantizes_nothing_is_refused(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "keep.toml"
    recipe.write_text('[[rules]]\nmatch = "experts"\nkeep = true\n')
    done = zaya("quantize", nano_hybrid, "--recipe", recipe, "-o", tmp_path / "out")
    assert done.code == 2
    assert "nothing in this plan is quantized" in done.err


def test_quantizing_twice_is_refused(zaya: Zaya, artifact: Path, tmp_path: Path) -> None:
    done = zaya("quantize", artifact, "-o", tmp_path / "out")
    assert done.code == 2
    assert "export" in done.err


def test_the_input_is_never_the_output(zaya: Zaya, nano_hybrid: Path) -> None:
    assert zaya("quantize", nano_hybrid, "-o", nano_hybrid, "--overwrite").code == 2


def test_an_existing_output_needs_overwrite(
    zaya: Zaya, nano_hybrid: Path, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    done = zaya("quantize", nano_hybrid, "-o", out)
    assert done.code == 6
    assert "--overwrite" in done.err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    refused = zaya("quantize", nano_hybrid, "-o", out, "--overwrite")  # of what it never wrote
    assert refused.code == 6
    assert "not an artifact" in refused.err
    assert (out / "mine").read_text() == "kept"
    shutil.rmtree(out)
    assert zaya("quantize", nano_hybrid, "-o", out, "--bits", "8").code == 0
    assert digests(out) != digests(artifact)
    assert zaya("quantize", nano_hybrid, "-o", out).code == 6
    assert zaya("quantize", nano_hybrid, "-o", out, "--overwrite").code == 0
    assert digests(out) == digests(artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_bundled_checkpoint_is_the_default(
    zaya: Zaya, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = zaya("quantize", "--bits", "4")
    assert (done.code, done.out) == (0, "zaya1-tiny-int4\n")
    assert "bundled reference checkpoint zaya1-tiny" in done.err
    shutil.rmtree(tmp_path / "zaya1-tiny-int4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GB", 2_000_000_000), ("4.6GiB", 4_939_212_390), ("512", 512), ("1 kb", 1000),
     ("0.5MiB", 1 << 19)],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "2XB", "0", "0.1", "1e9", "٣GB x", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_statistics_that_could_not_be_kept_are_refused_before_the_work(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path
) -> None:
    plan = ("quantize", nano_hybrid, "-o", tmp_path / "out", "--method", "gptq", "--stats")
    done = zaya(*plan, tmp_path)
    assert (done.code, "is a directory" in done.err) == (2, True)
    (tmp_path / "file").touch()
    done = zaya(*plan, tmp_path / "file" / "stats")
    assert (done.code, "is no folder" in done.err) == (5, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
