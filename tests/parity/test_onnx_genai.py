"""ONNX folders in onnxruntime-genai, against our own runtime on the same weights.

Set up with ``pip install onnxruntime-genai==0.18.0``; without it these tests are skipped.

Prompts of several lengths in one batch are not among them: onnxruntime-genai takes padding for
tokens unless it is on the right, where no model with convolution states can have it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity.onnx_clients import FLOAT, NEW_TOKENS, PROMPTS, RECIPES, Subject
from zaya_convert.models import open_model

og: Any = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai==0.18.0")


@dataclass
class Genai:
    """One of our folders, loaded there.

    Attributes:
        endless: the same model with a stop token that it never generates.
    """

    subject: Subject
    model: Any
    endless: Any

    @classmethod
    def load(cls, subject: Subject) -> Genai:
        """Load a folder as it is, and once more with other settings."""
        config = og.Config(str(subject.folder))
        unused = subject.model.config.vocab_rows - 1
        config.overlay(json.dumps({"model": {"eos_token_id": unused}}))
        return cls(subject, og.Model(str(subject.folder)), og.Model(config))

    def generate(
        self, prompts: Sequence[Sequence[int]], cuts: Sequence[int] = (), **options: Any
    ) -> list[list[int]]:
        """Greedy continuations of prompts of one length, which are given in parts."""
        ids = np.array(prompts, np.int32)
        generator = _generator(self.endless, ids.shape[1] + NEW_TOKENS, len(prompts), **options)
        for part in np.split(ids, cuts, axis=1):
            generator.append_tokens(part)
        _finish(generator)
        return [_tokens(generator, i)[ids.shape[1] :] for i in range(len(prompts))]


def _generator(model: Any, length: int, batch: int = 1, **options: Any) -> Any:
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, batch_size=batch, **options)
    return og.Generator(model, params)


def _finish(generator: Any) -> None:
    while not generator.is_done():
        generator.generate_next_token()


def _tokens(generator: Any, row: int = 0) -> list[int]:
    return [int(token) for token in generator.get_sequence(row)]


@pytest.fixture(scope="session", params=RECIPES)
def genai(
    request: pytest.FixtureRequest, bundled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Genai:
    folder = tmp_path_factory.mktemp("genai") / "model"
    return Genai.load(Subject.write(open_model(str(bundled)), request.param, folder))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("message", PROMPTS)
def test_greedy_tokens(message: str, shared: bool, genai: Genai) -> None:
    prompt = genai.subject.chat(message)
    (found,) = genai.generate([prompt], past_present_share_buffer=shared)
    assert len(found) == NEW_TOKENS
    genai.subject.agrees(prompt, found)


@pytest.mark.parametrize("cuts", [(7,), (1, 2, -1)])
def test_a_prompt_in_parts(cuts: tuple[int, ...], genai: Genai) -> None:
    prompt = genai.subject.chat(PROMPTS[0])
    (found,) = genai.generate([prompt], [cut % len(prompt) for cut in cuts])
    genai.subject.agrees(prompt, found)


def test_prompts_in_chunks(genai: Genai) -> None:
    """``chunk_size`` is for prompts that need too much memory at once."""
    prompt = genai.subject.chat(PROMPTS[0])
    config = og.Config(str(genai.subject.folder))
    config.overlay(json.dumps({"search": {"chunk_size": 8}}))
    generator = _generator(og.Model(config), len(prompt) + 8)
    generator.append_tokens(np.array([prompt], np.int32))
    _finish(generator)
    genai.subject.agrees(prompt, _tokens(generator)[len(prompt) :])


def test_prompts_of_one_length_together(genai: Genai) -> None:
    prompts = [genai.subject.chat(message) for message in PROMPTS[:2]]
    width = min(map(len, prompts))
    prompts = [prompt[-width:] for prompt in prompts]
    assert prompts[0] != prompts[1]
    for prompt, found in zip(prompts, genai.generate(prompts), strict=True):
        genai.subject.agrees(prompt, found)


def test_a_conversation_goes_on_after_a_stop_token(genai: Genai) -> None:
    subject, stop = genai.subject, genai.subject.tokenizer.stop_ids
    prompt = subject.chat(PROMPTS[0])
    generator = _generator(genai.model, 512)
    generator.append_tokens(np.array([prompt], np.int32))
    _finish(generator)
    first = _tokens(generator)
    assert len(first) < 512
    subject.agrees(prompt, first[len(prompt) :])
    assert not stop & set(first[len(prompt) :])
    more = [*stop, *subject.chat(PROMPTS[1])[1:]]
    generator.append_tokens(np.array([more], np.int32))
    _finish(generator)
    second = _tokens(generator)
    assert second[: len(first) + len(more)] == first + more
    subject.agrees(first + more, second[len(first) + len(more) :])


@pytest.mark.parametrize("message", PROMPTS)
def test_texts(message: str, genai: Genai) -> None:
    theirs, ours = og.Tokenizer(genai.model), genai.subject.tokenizer
    chat = [{"role": "user", "content": message}]
    text = theirs.apply_chat_template(messages=json.dumps(chat), add_generation_prompt=True)
    assert text == ours.render(chat)
    assert theirs.encode(text).tolist() == genai.subject.chat(message)
    # it adds no token of its own
    ids = theirs.encode(message).tolist()
    assert ids == ours.encode(message, add_bos=False)
    assert theirs.decode(np.array(ids, np.int32)) == ours.decode(ids)


def test_several_files(bundled: Path, tmp_path: Path) -> None:
    subject = Subject.write(open_model(str(bundled)), FLOAT, tmp_path / "model", 8_000_000)
    assert len(list(subject.folder.glob("onnx/*data*"))) > 2
    prompt = subject.chat(PROMPTS[0])
    (found,) = Genai.load(subject).generate([prompt])
    subject.agrees(prompt, found)
