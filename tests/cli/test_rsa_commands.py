"""``rsa`` and ``rsa-parity``: settings by name, files, resuming, exit codes, reports."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cli.running import Zaya, imported_by
from zaya_convert.cli import rsa, rsa_parity
from zaya_convert.rsa.settings import PRESETS, Settings
from zaya_convert.rsa.sizes import SIZES

pytest_plugins = ("cli.fixtures",)

QUESTION = "Start with 14. Add 5. Multiply by 2. What is the result? Count modulo 100."
SMALL = ("-N", 2, "-C", 2, "-T", 1, "--budget", 72, "--tail", 40)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [{"question": QUESTION, "answer": "38"},
            {"question": "A dial shows 40. Turn it up by 7. What does it show? Count modulo 100 "
             "and give two digits.", "answer": "#### 47"}]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_names_are_those_of_the_tables() -> None:
    assert tuple(PRESETS) == rsa.PRESETS
    assert tuple(SIZES) == rsa_parity.SIZES


def test_help_is_light() -> None:
    for command in ("rsa", "rsa-parity"):
        assert not {"torch", "transformers", "numpy"} & imported_by(command, "--help")


def test_one_prompt(zaya: Zaya, bundled: Path) -> None:
    done = zaya("rsa", bundled, "--prompt", QUESTION, *SMALL, "--select", "majority", "--json")
    assert done.code == 0, done.err
    facts = done.json()
    assert [row["round"] for row in facts["rounds"]] == [0, 1]
    assert facts["preset"] == "tiny"
    assert facts["settings"]["candidates"] == 2
    assert facts["new_tokens"] == sum(row["new_tokens"] for row in facts["rounds"])
    (answers,) = facts["answers"]
    assert len(answers["answers"]) == 2
    assert answers["correct"] is None
    text = zaya("rsa", bundled, "--prompt", QUESTION, *SMALL, "--select", "majority")
    assert answers["majority"] in text.out
    assert "tokens in" in text.err


def test_a_run_is_kept_and_taken_up(
    zaya: Zaya, bundled: Path, problems: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "run.jsonl"
    arguments = ("rsa", bundled, "--problems", problems, *SMALL, "--save", kept, "--json")
    first = zaya(*arguments)
    assert first.code == 0, first.err
    facts = first.json()
    assert facts["score"] == facts["mean_accuracy"]
    assert 0 <= facts["rounds"][0]["accuracy_low"] <= facts["rounds"][0]["accuracy"]
    lines = kept.read_text().splitlines()
    assert len(lines) == 1 + 2 * (4 + 1)
    kept.write_text("\n".join(lines[:6]) + "\n" + lines[6][:50])  # killed in round 1
    again = zaya(*arguments, "--resume")
    assert again.code == 0, again.err
    assert "1 of 2 rounds are done already" in again.err
    assert kept.read_text().splitlines() == lines
    same = {"answers", "rounds", "score"}
    assert {k: again.json()[k] for k in same} == {k: facts[k] for k in same}
    assert zaya(*arguments).code == 6
    other = zaya(*arguments, "--resume", "--tail", 30)
    assert other.code == 3
    assert "settings.tail: 40 there, 30 here" in other.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--prompt"),
        (["--prompt", "a", "--problems", "b"], 2, "--prompt"),
        (["--prompt", " "], 2, "empty"),
        (["--prompt", "half \udcff"], 2, "not UTF-8"),
        (["--prompt", "a", "--resume"], 2, "--save"),
        (["--prompt", "a", "-N", "2", "-C", "3"], 2, "cannot be drawn"),
        (["--prompt", "a", "--top-p", "0"], 2, "top-p"),
        (["--prompt", "a", "--preset", "best"], 2, "preset"),
        (["--prompt", "a", "--endpoint", "http://127.0.0.1:1", "--batch", "3"], 2, "server"),
        (
            ["--prompt", "a", "--endpoint", "http://127.0.0.1:1", "--attempts", "1"],
            3,
            "after 1 att",
        ),
        (["--problems", "/nonexistent"], 3, "cannot be read"),
    ],
)
def test_refusals(zaya: Zaya, bundled: Path, arguments: list[str], code: int, message: str) -> None:
    done = zaya("rsa", bundled, *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err


def test_a_last_round_samples_like_the_others_but_for_what_is_said(
    zaya: Zaya, bundled: Path
) -> None:
    done = zaya(
        "rsa", bundled, "--prompt", QUESTION, *SMALL, "--temperature", 0.5, "--top-k", 9,
        "--final-top-p", 0.9, "--json",
    )  # fmt: skip
    settings = done.json()["settings"]
    assert settings["sampling"] == {"temperature": 0.5, "top_p": 1.0, "top_k": 9}
    assert settings["final_sampling"] == {"temperature": 0.5, "top_p": 0.9, "top_k": 9}


def test_parity_passes_and_reports(zaya: Zaya, bundled: Path, tmp_path: Path) -> None:
    html, junit = tmp_path / "new" / "report.html", tmp_path / "report.xml"
    done = zaya(
        "rsa-parity", bundled, "--reference", bundled, "--size", "smoke", "--limit", 8, *SMALL,
        "--runs", tmp_path / "runs", "--trace-tokens", 4000, "--report", html, "--junit", junit,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    facts = done.json()
    assert facts["verdict"] == "pass"
    assert facts["kl_mean"] == 0
    assert [row["difference"]["value"] for row in facts["rounds"]] == [0, 0]
    assert "<svg" in html.read_text()
    assert ElementTree.fromstring(junit.read_text()).get("failures") == "0"
    # the same model on both sides is one run
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_parity_fails_with_code_4(zaya: Zaya, bundled: Path, tmp_path: Path) -> None:
    out = tmp_path / "int2"
    assert zaya("quantize", bundled, "--bits", 2, "-o", out).code == 0
    few = ("--size", "smoke", "--limit", 8, "-N", 2, "-T", 0, "--budget", 72, "--tail", 40)
    done = zaya("rsa-parity", out, "--reference", bundled, *few, "--json")
    assert done.code == 4
    assert done.json()["verdict"] == "fail"
    assert "RSA parity failed" in done.err
    assert "KL divergence" in done.err


def test_parity_that_cannot_decide_has_code_7(zaya: Zaya, bundled: Path) -> None:
    few = ("--size", "smoke", "--limit", 2, "-N", 1, "-C", 1, "-T", 0, "--budget", 20)
    done = zaya("rsa-parity", bundled, "--reference", bundled, *few)
    assert done.code == 7
    assert "verdict: inconclusive" in done.out
    assert "inconclusive" in done.err


def test_parity_refusals(zaya: Zaya, bundled: Path, nano_hybrid: Path) -> None:
    assert zaya("rsa-parity").code == 2
    done = zaya("rsa-parity", nano_hybrid)
    assert done.code == 2
    assert "--reference" in done.err
    done = zaya("rsa-parity", nano_hybrid, "--reference", nano_hybrid)
    assert done.code == 3
    assert "tokenizer.json" in done.err
    assert zaya("rsa-parity", bundled, "--reference", bundled, "--exact").code == 2


def test_validate_runs_it_too(
    zaya: Zaya, bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = replace(SIZES["smoke"], problems=10, settings=Settings(2, 2, 0), trace_tokens=3000)
    monkeypatch.setitem(SIZES, "smoke", smaller)
    html = tmp_path / "report.html"
    done = zaya(
        "validate", bundled, "--reference", bundled, "--tokens", 64, "--rsa", "--report", html,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    facts = done.json()
    assert facts["verdict"] == facts["rsa"]["verdict"] == "pass"
    assert sum(check["name"].startswith("RSA: ") for check in facts["checks"]) == 14
    assert "RSA parity" in html.read_text()
