"""ONNX folders in transformers.js, against our own runtime on the same weights.

Set up, in a folder outside this repository::

    npm install @huggingface/transformers@4.3.1
    export ZAYA_CONVERT_TRANSFORMERS_JS=$PWD

``node`` must be on the path. (``npm install --ignore-scripts`` will do: the script of
onnxruntime-node fetches GPU libraries.) Otherwise these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from parity.onnx_clients import FLOAT, NEW_TOKENS, PROMPTS, RECIPES, Subject
from zaya_convert.models import open_model

VARIABLE = "ZAYA_CONVERT_TRANSFORMERS_JS"
SCRIPT = Path(__file__).with_name("transformers_js.mjs")
PACKAGE = "node_modules/@huggingface/transformers/package.json"


@pytest.fixture(scope="session")
def library() -> Path:
    """The folder that holds transformers.js."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to a folder with {PACKAGE}")
    if not (Path(folder) / PACKAGE).is_file():
        pytest.skip(f"{VARIABLE}: {folder} has no {PACKAGE}")
    if not shutil.which("node"):
        pytest.skip("node is not on the path")
    return Path(folder).resolve()


@pytest.fixture(scope="session", params=RECIPES)
def subject(
    request: pytest.FixtureRequest,
    library: Path,
    bundled: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Subject:
    folder = tmp_path_factory.mktemp("transformers-js") / "model"
    return Subject.write(open_model(str(bundled)), request.param, folder)


def ask(library: Path, subject: Subject, batches: Sequence[Sequence[str]]) -> list[Any]:
    """What ``transformers_js.mjs`` answers."""
    request = json.dumps({"batches": batches, "newTokens": NEW_TOKENS})
    command = ["node", str(SCRIPT), str(library), str(subject.folder)]
    done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(subject: Subject, messages: Sequence[str], answer: Any) -> None:
    """Whether a batch became the right tokens, and was continued as we would."""
    prompts = [subject.chat(message) for message in messages]
    width, pad = max(map(len, prompts)), subject.model.config.pad_id
    assert answer["ids"] == [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    assert answer["mask"] == [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    for prompt, endless, stopped in zip(prompts, answer["endless"], answer["stopped"], strict=True):
        assert len(endless) == NEW_TOKENS
        subject.agrees(prompt, endless)
        assert stopped == endless[: len(stopped)]
    subject.agrees(prompts[0], answer["continued"])
    if len(prompts) == 1:  # of several, the slowest one stops the others
        (endless,), (stopped,) = answer["endless"], answer["stopped"]
        stops = [i for i, token in enumerate(endless) if token in subject.tokenizer.stop_ids]
        assert len(stopped) == min([*stops, NEW_TOKENS - 1]) + 1


def test_conversations(library: Path, subject: Subject) -> None:
    """One process for all of it: most of its time goes into starting."""
    batches = [*([message] for message in PROMPTS), PROMPTS]
    answers = ask(library, subject, batches)
    for messages, answer in zip(batches, answers, strict=True):
        check(subject, messages, answer)
    assert len(answers[0]["stopped"][0]) < NEW_TOKENS  # so stop tokens were met


def test_several_files(library: Path, bundled: Path, tmp_path: Path) -> None:
    subject = Subject.write(open_model(str(bundled)), FLOAT, tmp_path / "model", 8_000_000)
    assert len(list(subject.folder.glob("onnx/*data*"))) > 2
    (answer,) = ask(library, subject, [PROMPTS[:1]])
    check(subject, PROMPTS[:1], answer)
