"""``generate``: text on stdout as it comes, the same for the same seed."""

import subprocess
import sys
from pathlib import Path

import pytest

from cli.running import Zaya, environment

pytest_plugins = ("cli.fixtures",)

PROMPT = ("--prompt", "Compute 2 + 3.", "--max-new-tokens", "12")


def test_as_a_process_with_the_prompt_on_stdin(bundled: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "zaya_convert", "generate", bundled, "--prompt", "-", "-q",
         "--max-new-tokens", "8"],
        input="Compute 2 + 3.",
        capture_output=True,
        text=True,
        env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert done.stdout.endswith("\n")


def test_json_holds_the_streamed_text(zaya: Zaya, bundled: Path) -> None:
    streamed = zaya("generate", bundled, *PROMPT)
    assert streamed.code == 0
    assert "ended by" in streamed.err
    facts = zaya("generate", bundled, *PROMPT, "--json").json()
    assert facts["text"] + "\n" == streamed.out
    assert facts["new_tokens"] <= 12
    assert facts["finished"] in ("stop", "length")


def test_the_seed_decides(zaya: Zaya, bundled: Path) -> None:
    def text(seed: int) -> str:
        hot = ("--temperature", "5", "--top-k", "50", "--top-p", "0.99", "--seed", seed)
        return zaya("generate", bundled, *PROMPT, *hot, "--dtype", "float32").out

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_raw_leaves_the_template_out(zaya: Zaya, bundled: Path) -> None:
    chat, raw = (
        zaya("generate", bundled, *PROMPT, "--json", *flags).json()["prompt_tokens"]
        for flags in ((), ("--raw",))
    )
    assert chat > raw


def test_the_bundled_checkpoint_is_the_default(zaya: Zaya, bundled: Path) -> None:
    done = zaya("generate", *PROMPT)
    assert done.code == 0
    assert bundled.name in done.err


def test_without_tokenizer(zaya: Zaya, nano_hybrid: Path) -> None:
    done = zaya("generate", nano_hybrid, *PROMPT)
    assert (done.code, done.out) == (3, "")
    assert "tokenizer.json" in done.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--top-p", "0"], 2),
        (["--temperature", "-1"], 2),
        (["--top-k", "-1"], 2),
        (["--max-new-tokens", "0"], 2),
    ],
)
def test_refusals(zaya: Zaya, bundled: Path, arguments: list[str], code: int) -> None:
    done = zaya("generate", bundled, *PROMPT, *arguments)
    assert (done.code, done.out) == (code, "")
