"""``calibrate``, and what ``quantize`` makes of calibrations and targets."""

import json
from pathlib import Path
from typing import Any

import pytest

from cli.running import Zaya
from zaya_convert import stats as files
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import load

pytest_plugins = ("cli.fixtures",)

FEW = ("--tokens", 256, "--max-tokens", 256, "--sequence-length", 64, "--threads", 1)
CONTRACT = (
    "output", "bytes", "digest", "seconds", "peak_memory_bytes", "description", "rounds",
    "not_finite", "tokens", "min_tokens", "skip_rate", "least", "below_minimum", "counts",
)  # fmt: skip


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- calibrate ----------------------------------------------------------------------------------


def test_json(zaya: Zaya, bundled: Path, tmp_path: Path) -> None:
    done = zaya("calibrate", bundled, *FEW, "-o", tmp_path / "s", "--json")
    assert done.code == 0
    facts = done.json()
    assert set(CONTRACT) <= set(facts)
    stats = files.read(tmp_path / "s")
    assert facts["output"] == str(tmp_path / "s")
    assert facts["digest"] == stats.digest
    assert facts["bytes"] == (tmp_path / "s").stat().st_size
    assert facts["tokens"] == stats.tokens == 256
    assert facts["counts"] == stats.counts.tolist()
    assert all(sum(row) == 256 for row in facts["counts"])
    assert facts["description"] == "bundled calibration set zaya1-tiny"
    assert (facts["rounds"], facts["not_finite"]) == (1, 0)
    below = [(row["layer"], row["expert"], row["tokens"]) for row in facts["below_minimum"]]
    assert below == stats.below(256)
    assert facts["peak_memory_bytes"] > 10_000_000
    assert names(tmp_path) == {"s"}
    files.read(tmp_path / "s").check_fits(open_model(str(bundled)))


def test_the_table_and_the_default_model(zaya: Zaya, tmp_path: Path) -> None:
    done = zaya("calibrate", *FEW, "--min-tokens", 0, "-o", tmp_path / "s")
    assert done.code == 0
    assert "bundled reference checkpoint zaya1-tiny" in done.err
    first, header, *rows = [line for line in done.out.splitlines() if line.strip("-─ ")]
    assert first == str(tmp_path / "s")
    assert header.split() == ["layer", *map(str, range(16)), "skip"]
    counts = files.read(tmp_path / "s").counts.tolist()
    assert [row.split() for row in rows] == [[str(i), *map(str, r)] for i, r in enumerate(counts)]
    assert "256 tokens of bundled calibration set zaya1-tiny in 1 round(s)" in done.err
    assert "least-served expert" in done.err
    assert "warning" not in done.err  # nothing was asked of coverage


def test_a_folder_gets_a_file_named_by_its_digest(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path
) -> None:
    facts = zaya("calibrate", nano_hybrid, *FEW, "-o", tmp_path, "--json").json()
    (path,) = tmp_path.iterdir()
    assert path.name == f"zaya-stats-{facts['digest'][:16]}.safetensors"
    assert facts["output"] == str(path)
    assert files.read(path).digest == facts["digest"]
    again = zaya("calibrate", nano_hybrid, *FEW, "-o", tmp_path, "--json")
    assert (again.code, again.json()["output"]) == (0, str(path))


def test_an_existing_file_needs_overwrite(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    done = zaya("calibrate", nano_hybrid, *FEW, "-o", path)
    assert (done.code, done.out) == (6, "")
    assert "--overwrite" in done.err
    assert path.read_text() == "mine"
    assert zaya("calibrate", nano_hybrid, *FEW, "-o", path, "--overwrite").code == 0
    assert files.read(path).tokens == 256
    assert names(tmp_path) == {"s"}


def test_uncovered_experts(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", nano_hybrid, *FEW, "--min-tokens", 10, "-o", tmp_path / "s")
    flagged = zaya(*arguments)
    assert flagged.code == 0
    stats = files.read(tmp_path / "s")
    starved = stats.below(10)
    none = sum(tokens == 0 for *_, tokens in starved)
    assert none
    assert f"warning: {len(starved)} experts have fewer than 10 calibration tokens" in flagged.err
    assert f"{none} of them have none and are rounded by weight alone" in flagged.err
    refused = zaya(*arguments, "--overwrite", "--on-uncovered", "error")
    assert refused.code == 3
    assert "experts with fewer than 10 calibration tokens" in refused.err
    for layer, expert, tokens in starved:
        assert f"layer {layer}, expert {expert}: {tokens} tokens" in refused.err


def test_traces_and_packing(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    made = [
        zaya(
            "calibrate", nano_hybrid, *FEW, "--traces", 60, "--seed", seed, "--pack",
            "-o", tmp_path / str(name), "--json",
        ).json()
        for name, seed in enumerate((5, 5, 6))
    ]  # fmt: skip
    assert made[0]["description"].startswith("self-generated traces, seed 5 + random token ids")
    assert made[0]["tokens"] == 256
    assert made[0]["digest"] == made[1]["digest"] != made[2]["digest"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["--data", "hf://datasets/org"], 3, "is not of the form hf://datasets/org/name"),
        (["--tokens", "1"], 2, "--tokens"),
        (["--on-uncovered", "ignore"], 2, "--on-uncovered"),
    ],
)
def test_refusals(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    done = zaya("calibrate", nano_hybrid, "-o", tmp_path / "s", *arguments)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    assert not any(tmp_path.iterdir())


def test_an_artifact_cannot_be_calibrated(zaya: Zaya, artifact: Path, tmp_path: Path) -> None:
    done = zaya("calibrate", artifact, *FEW, "-o", tmp_path / "s")
    assert done.code == 3
    assert "calibrate the float model" in done.err
    assert not any(tmp_path.iterdir())


# ---- quantize with statistics -------------------------------------------------------------------


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zaya-convert.json").read_text())


def test_statistics_are_made_once_and_used_again(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats.safetensors"
    first = zaya(
        "quantize", nano_hybrid, *FEW, "--method", "gptq", "--stats", stats, "-o", tmp_path / "a"
    )
    assert first.code == 0
    assert "calibrated on 256 tokens" in first.err
    made = stats.read_bytes()
    # Other calibration options do not matter any more: the file is what it is.
    second = zaya(
        "quantize", nano_hybrid, "--tokens", 64, "--method", "gptq", "--stats", stats,
        "--threads", 1, "-o", tmp_path / "b",
    )  # fmt: skip
    assert second.code == 0
    assert "calibrated on" not in second.err
    assert stats.read_bytes() == made
    digest = files.read(stats).digest
    assert manifest(tmp_path / "a")["calibration"]["digest"] == digest
    assert manifest(tmp_path / "b") == manifest(tmp_path / "a")
    # Without --stats the same calibration is made, and not kept.
    third = zaya("quantize", nano_hybrid, *FEW, "--method", "gptq", "-o", tmp_path / "c")
    assert third.code == 0
    assert manifest(tmp_path / "c") == manifest(tmp_path / "a")
    assert names(tmp_path) == {"stats.safetensors", "a", "b", "c"}


def test_statistics_of_another_model(
    zaya: Zaya, bundled: Path, nano_hybrid: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "s"
    assert zaya("calibrate", nano_hybrid, *FEW, "-o", stats).code == 0
    arguments = ("--method", "gptq", "--stats", stats, "-o", tmp_path / "out")
    done = zaya("quantize", bundled, *arguments)
    assert done.code == 3
    assert "made from another model" in done.err
    stats.write_bytes(stats.read_bytes()[:-1])
    done = zaya("quantize", nano_hybrid, *arguments)
    assert done.code == 3
    assert "truncated" in done.err
    assert names(tmp_path) == {"s"}


def test_quantize_refuses_uncovered_experts(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    done = zaya(
        "quantize", nano_hybrid, *FEW, "--min-tokens", 10, "--on-uncovered", "error",
        "--method", "gptq", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 3
    assert "layer 0, expert" in done.err
    assert not any(tmp_path.iterdir())


# ---- targets ------------------------------------------------------------------------------------


def test_a_target_is_met_and_its_recipe_means_the_same(
    zaya: Zaya, bundled: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "chosen.toml", tmp_path / "out"
    done = zaya(
        "quantize", bundled, *FEW, "--recipe", "mixed", "--target-bpw", 5.5, "--save-recipe",
        recipe, "--stats", tmp_path / "stats", "-o", out, "--json",
    )  # fmt: skip
    assert done.code == 0
    assert "chosen bits:" in done.err
    facts = done.json()
    assert 0.99 * 5.5 <= facts["bits_per_weight"] <= 5.5
    allocation = manifest(out)["allocation"]
    assert allocation["target"] == "5.5 bits per weight"
    assert sum(sum(counts.values()) for counts in allocation["chosen"].values()) == 3 * 53
    source, artifact = open_model(str(bundled)), open_model(str(out))
    plan = make_plan(source, load(str(recipe)), "compressed-tensors")
    assert plan.bits_per_weight == pytest.approx(facts["bits_per_weight"])
    assert {str(s.key): s.spec for s in plan.steps} == {
        str(key): info.spec for key, info in artifact.infos.items()
    }
    assert allocation["bytes"] == plan.bytes
    # Quantizing by the saved recipe gives the same weights.
    again = tmp_path / "again"
    done = zaya("quantize", bundled, "--recipe", recipe, "-o", again)
    assert done.code == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    # A dry run with these statistics shows the choice, and writes nothing.
    before = names(tmp_path)
    shown = zaya(
        "quantize", bundled, "--recipe", "mixed", "--target-bpw", 5.5, "--stats",
        tmp_path / "stats", "--dry-run", "-o", tmp_path / "dry", "--json",
    )  # fmt: skip
    assert shown.code == 0
    assert shown.json()["bytes"] == plan.bytes
    assert names(tmp_path) == before


def test_two_targets_are_one_too_many(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    targets = ("--target-bpw", 5, "--target-size", "300kB")
    done = zaya("quantize", nano_hybrid, *targets, "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert "not both" in done.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", [("--target-size", "50kB"), ("--target-bpw", 16)])
def test_targets_out_of_reach(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, target: tuple[Any, ...]
) -> None:
    done = zaya("quantize", nano_hybrid, *FEW, *target, "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert "this recipe can reach" in done.err
    assert not any(tmp_path.iterdir())


def budget(folder: Path, memory: str) -> Path:
    path = folder / "edge.toml"
    path.write_text(
        f'[budget]\nmemory = "{memory}"\ncontext = 1024\nruntime = "10KB"\n\n'
        '[[rules]]\nmatch = "experts"\n\n[[rules]]\nmatch = "attention"\nbits = 8\n'
    )
    return path


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        ("200KB", "which leaves nothing of 200,000 for weights; lower `context`"),
        ("600KB", "this recipe can reach"),
    ],
)
def test_a_budget_that_the_model_does_not_fit(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, memory: str, says: str
) -> None:
    recipe = budget(tmp_path, memory)
    done = zaya("quantize", nano_hybrid, *FEW, "--recipe", recipe, "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert names(tmp_path) == {"edge.toml"}


def test_a_budget_is_kept(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    recipe = budget(tmp_path, "1MB")
    arguments = ("quantize", nano_hybrid, *FEW, "--recipe", recipe, "-o", tmp_path / "out")
    done = zaya(*arguments, "--json")
    assert done.code == 0
    room = load(str(recipe)).budget
    assert room is not None
    config = open_model(str(nano_hybrid)).config
    limit = room.weights(config)
    assert limit == 1_000_000 - 10_000 - room.states(config)
    assert 0.98 * limit <= done.json()["bytes"] <= limit + 65536  # the file's header


@pytest.mark.parametrize(
    "arguments",
    [("--recipe", "mixed", "--target-bpw", 6), ("--recipe", "edge-6gb"), ("--method", "gptq")],
    ids=str,
)
def test_a_dry_run_writes_nothing(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, arguments: tuple[Any, ...]
) -> None:
    done = zaya(
        "quantize", nano_hybrid, *FEW, "--group-size", 32, *arguments, "--dry-run",
        "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.code == 0
    assert done.json()["dry_run"] is True
    assert not any(tmp_path.iterdir())
