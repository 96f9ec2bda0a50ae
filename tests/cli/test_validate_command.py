"""``validate``: the verdict is the exit code, the report goes wherever it was asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cli.running import Run, Zaya

pytest_plugins = ("cli.fixtures",)

CONTRACT = (
    "kl_mean", "kl_p99", "kl_max", "top1_agreement", "perplexity_reference",
    "perplexity_candidate", "router_agreement", "skip_rate", "bits_per_weight", "bytes", "tokens",
    "verdict",
)  # fmt: skip
FEW = ("--tokens", 64, "--sequence-length", 32)


def test_pass(zaya: Zaya, artifact: Path, nano_hybrid: Path) -> None:
    done = zaya("validate", artifact, "--reference", nano_hybrid, *FEW, "--json")
    assert done.code == 0, done.err
    facts = done.json()
    assert set(CONTRACT) <= set(facts)
    assert facts["verdict"] == "pass"
    assert facts["tokens"] == 64
    assert facts["reference_digest_matches"] is True


def test_a_model_against_itself(zaya: Zaya, nano_hybrid: Path, nano_legacy: Path) -> None:
    limits = ("--max-kl", 0, "--min-top1", 1, "--min-router", 1, "--max-perplexity-ratio", 1)
    done = zaya("validate", nano_legacy, "--reference", nano_hybrid, *FEW, *limits, "--json")
    assert done.code == 0, done.err
    assert done.json()["kl_max"] == 0


def test_outside_its_bounds_exits_4_and_still_reports(
    process: Callable[..., Run], artifact: Path, nano_hybrid: Path, tmp_path: Path
) -> None:
    html, junit = tmp_path / "new" / "report.html", tmp_path / "report.xml"
    files = ("--report", html, "--junit", junit)
    limits = ("--max-kl", "1e-9", "--min-top1", "0")
    arguments = ("--reference", nano_hybrid, *FEW, *limits, *files, "--json")
    done = process("validate", artifact, *arguments)
    assert done.code == 4
    assert done.json()["verdict"] == "fail"
    assert done.err.startswith("error: validation failed: FAIL KL divergence, mean")
    suite = ElementTree.fromstring(junit.read_text())
    assert suite.get("failures") == "1"
    assert "fail" in html.read_text()


@pytest.mark.parametrize("flag", ["--report", "--junit"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    zaya: Zaya, artifact: Path, nano_hybrid: Path, tmp_path: Path, flag: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    done = zaya("validate", artifact, "--reference", nano_hybrid, flag, file / "report")
    assert (done.code, done.out) == (5, "")
    assert f"{file}" in done.err


def test_text(zaya: Zaya, artifact: Path, nano_hybrid: Path) -> None:
    done = zaya("validate", artifact, "--reference", nano_hybrid, *FEW, "--dtype", "bfloat16")
    assert done.code == 0
    assert "verdict: pass" in done.out
    assert "\x1b" not in done.out


def test_token_ids_from_a_file(
    zaya: Zaya, artifact: Path, nano_hybrid: Path, tmp_path: Path
) -> None:
    data = tmp_path / "ids [bold] :smile:.jsonl"
    data.write_text(json.dumps({"ids": [1, 2, 3, 4, 5]}))
    arguments = ("--reference", nano_hybrid, "--data", data, "--json")
    assert zaya("validate", artifact, *arguments).json()["tokens"] == 5
    text = zaya("validate", artifact, *arguments[:-1], "--max-kl", 1).out
    assert f"5 tokens of {data.name}, float32" in text
    (line,) = (line for line in text.splitlines() if line.startswith("ok   KL"))
    assert line.endswith("(limit 1)")


def test_a_wrong_reference_fails(zaya: Zaya, artifact: Path, nano: Callable[..., Path]) -> None:
    done = zaya("validate", artifact, "--reference", nano("hybrid", seed=1), *FEW)
    assert done.code == 4
    assert "NOT the model this artifact was made from" in done.out


@pytest.mark.parametrize("which", ["artifact", "nano_hybrid"])
def test_no_reference_to_be_guessed(zaya: Zaya, request: pytest.FixtureRequest, which: str) -> None:
    done = zaya("validate", request.getfixturevalue(which))
    assert (done.code, done.out) == (2, "")
    assert "--reference" in done.err


def test_another_architecture_is_bad_input(
    zaya: Zaya, artifact: Path, nano: Callable[..., Path]
) -> None:
    done = zaya("validate", artifact, "--reference", nano("hybrid", tied=False), *FEW)
    assert done.code == 3
    assert "tied" in done.err


def test_missing_data_is_bad_input(zaya: Zaya, artifact: Path, nano_hybrid: Path) -> None:
    done = zaya("validate", artifact, "--reference", nano_hybrid, "--data", "/nonexistent.txt")
    assert done.code == 3


def test_the_bundled_reference_is_found(zaya: Zaya, bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert zaya("quantize", "--bits", "8", "-o", out).code == 0
    done = zaya("validate", out, "--tokens", "64", "--json")
    assert done.code == 0
    assert "reference: the bundled checkpoint" in done.err
    assert done.json()["reference_digest_matches"] is True
