"""GGUF files in a llama.cpp that knows ZAYA1, against our own runtime on the same tokens.

Needs such a build: see ``llama_cpp``. What differs there by design, and so is part of the bounds:

* it never chooses the skip expert. Comparing with our runtime where that expert is out of reach
  measures everything else; where it is in reach, tokens that skip come out differently, and a
  little also those that attend to them;
* its router uses a tabulated tanh GELU, and convolutions run in fp16;
* it rounds activations to 8 bits before it multiplies them with blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nano import Nano
from parity import llama_cpp
from parity.llama_cpp import Probe
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.cli.main import run
from zaya_convert.convert import execute
from zaya_convert.data import load_sequences
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import adjusted, for_type
from zaya_convert.runtime.generate import generate
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_quant.metrics import kl_divergence
from zaya_quant.spec import BLOCK_TYPES

# Mean KL (nats) over 512 tokens of the bundled validation text. Beside each bound what was measured
# (AVX-512, two threads).
KL_FLOAT = 1e-4  # F32 1.5e-5, F16 1.5e-5, BF16 1.6e-5; but for the skip expert 7e-7 to 1.3e-6
KL_FLOAT_WITHOUT_SKIP = {"F32": 1e-6, "F16": 1e-6, "BF16": 1e-5}  # 1.6e-9, 5.0e-9, 1.1e-6
# Against our runtime on the same file: three times what was measured.
KL_SAME_FILE = {
    "Q4_0": 1.8e-4,  # 6.0e-5
    "Q4_1": 1.5e-4,  # 4.9e-5
    "Q5_0": 1.7e-4,  # 5.7e-5
    "Q5_1": 1.3e-4,  # 4.3e-5
    "Q8_0": 0.8e-4,  # 2.5e-5
    "Q3_K": 1.9e-4,  # 6.2e-5
    "Q4_K": 1.4e-4,  # 4.5e-5
    "Q5_K": 1.3e-4,  # 4.3e-5
    "Q6_K": 1.6e-4,  # 5.4e-5
    "IQ4_NL": 1.2e-4,  # 4.1e-5
    "IQ4_XS": 1.2e-4,  # 4.1e-5
}
TOP1_SAME_FILE = 0.96  # least 0.980: what the model was trained on has coin tosses in it


@dataclass(frozen=True)
class _OutOfReach:
    """Balancing biases that no token's skip expert can overcome."""

    def of(self, value: Any) -> Tensor:
        changed = value.clone()
        changed[-1] = -10
        return changed

    def of_moments(self, moments: Tensor) -> Tensor:
        return moments


def without_skip(checkpoint: Checkpoint) -> Checkpoint:
    """The model as this llama.cpp runs it."""
    layers = range(checkpoint.config.layers)
    keys = (TensorKey(layer, "mlp.gate.balancing_biases") for layer in layers)
    return replace(checkpoint, scaling=dict.fromkeys(keys, _OutOfReach()))


@dataclass(frozen=True)
class Ours:
    """Logits [n, V] and where a token took the skip expert in some layer [n]."""

    logits: Tensor
    skipped: Tensor


def run_ours(checkpoint: Checkpoint, sequences: Sequence[Tensor]) -> Ours:
    model = Model(checkpoint)
    found = model.evaluate(list(sequences))
    logits = torch.cat([model.logits(hidden) for hidden in found.hidden])
    return Ours(logits, (found.routes == checkpoint.config.experts).any(0))


def kl(ours: Tensor, theirs: Tensor) -> float:
    return float(kl_divergence(ours, theirs).mean())


def same(ours: Tensor, theirs: Tensor) -> Tensor:
    """Where both find the same token most probable."""
    return ours.argmax(1) == theirs.argmax(1)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    try:
        return llama_cpp.locate().build(tmp_path_factory.mktemp("probe"))
    except llama_cpp.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def source(bundled: Path) -> Checkpoint:
    return open_model(str(bundled))


@pytest.fixture(scope="module")
def sequences(source: Checkpoint) -> list[Tensor]:
    found = load_sequences(source, None, tokens=512, length=256)
    assert found.tokens == 512
    return found.ids


@pytest.fixture(scope="module")
def reference(source: Checkpoint, sequences: list[Tensor]) -> Ours:
    return run_ours(source, sequences)


@pytest.fixture(scope="module")
def files(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundled checkpoint as a file of a type, written when it is asked for."""
    folder = tmp_path_factory.mktemp("files")

    @cache
    def make(kind: str) -> Path:
        recipe = adjusted(for_type(kind), method="rtn")
        execute(make_plan(source, recipe, "gguf"), folder / f"{kind}.gguf")
        return folder / f"{kind}.gguf"

    return make


@pytest.fixture(scope="module")
def theirs(
    probe: Probe, sequences: list[Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path], Tensor]:
    """llama.cpp's logits of a file on all sequences."""
    scratch = tmp_path_factory.mktemp("logits")
    ids = [sequence.tolist() for sequence in sequences]

    @cache
    def logits(path: Path) -> Tensor:
        return torch.from_numpy(np.concatenate(probe.logits(path, ids, scratch)))

    return logits


Logits = Callable[[Path], Tensor]


@pytest.mark.parametrize("kind", KL_FLOAT_WITHOUT_SKIP)
def test_floats_run_like_the_source(
    kind: str,
    files: Callable[[str], Path],
    theirs: Logits,
    source: Checkpoint,
    sequences: list[Tensor],
    reference: Ours,
) -> None:
    found = theirs(files(kind))
    assert kl(reference.logits, found) <= KL_FLOAT
    agree = same(reference.logits, found)
    assert bool(agree[~reference.skipped].all())
    assert float(agree.float().mean()) >= 0.99
    # It is not the file that makes the difference.
    equal_terms = run_ours(without_skip(source), sequences)
    assert not bool(equal_terms.skipped.any())
    assert kl(equal_terms.logits, found) <= KL_FLOAT_WITHOUT_SKIP[kind]
    assert bool(same(equal_terms.logits, found).all())


def test_some_tokens_skip_and_most_do_not(reference: Ours) -> None:
    """Else the test above would say little."""
    share = float(reference.skipped.float().mean())
    assert 0.05 < share < 0.3


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_mean_there_what_they_mean_here(
    kind: str, files: Callable[[str], Path], theirs: Logits, sequences: list[Tensor]
) -> None:
    ours, found = run_ours(open_model(str(files(kind))), sequences), theirs(files(kind))
    assert kl(ours.logits, found) <= KL_SAME_FILE[kind]
    assert float(same(ours.logits, found).float().mean()) >= TOP1_SAME_FILE


def test_calibrated_super_blocks(
    bundled: Path, theirs: Logits, sequences: list[Tensor], tmp_path: Path
) -> None:
    """What ``quantize --format gguf`` writes, calibrated on little text."""
    out = tmp_path / "x.gguf"
    tokens = ("--tokens", "512", "--max-tokens", "512")
    command = ["quantize", str(bundled), "--format", "gguf", *tokens, "-o", str(out), "-q"]
    assert run(command) == 0
    opened = open_model(str(out))
    assert opened.manifest["recipe"]["name"] == "q4_k_m"
    assert opened.manifest["calibration"]["tokens"] > 0
    ours, found = run_ours(opened, sequences), theirs(out)
    assert kl(ours.logits, found) <= KL_SAME_FILE["Q4_K"]
    assert float(same(ours.logits, found).float().mean()) >= TOP1_SAME_FILE


def test_parts_are_the_file(
    source: Checkpoint, files: Callable[[str], Path], theirs: Logits, tmp_path: Path
) -> None:
    recipe = adjusted(for_type("Q8_0"), method="rtn")
    execute(make_plan(source, recipe, "gguf", 4_000_000), tmp_path / "parts")
    parts = sorted((tmp_path / "parts").glob("*.gguf"))
    assert len(parts) > 2
    assert torch.equal(theirs(parts[0]), theirs(files("Q8_0")))


def test_a_canonical_artifact(
    source: Checkpoint, theirs: Logits, sequences: list[Tensor], tmp_path: Path
) -> None:
    """int4 from safetensors: the same codes and scales in another file."""
    recipe = adjusted(for_type("Q4_0"), method="rtn")
    recipe = replace(recipe, rules=recipe.rules[:2])  # the embedding stays bf16
    execute(make_plan(source, recipe, "compressed-tensors"), tmp_path / "a")
    packed = open_model(str(tmp_path / "a"))
    execute(make_plan(packed, None, "gguf"), tmp_path / "x.gguf")
    found = theirs(tmp_path / "x.gguf")
    assert kl(run_ours(packed, sequences).logits, found) <= KL_SAME_FILE["Q4_0"]


def test_a_model_without_a_tokenizer(probe: Probe, nano: Nano, tmp_path: Path) -> None:
    folder = nano("hybrid", layers=3, skip_bias=-1.0)
    execute(make_plan(open_model(str(folder)), for_type("F32"), "gguf"), tmp_path / "x.gguf")
    ids = [(torch.arange(60) * 7 % 96).tolist()]
    (found,) = probe.logits(tmp_path / "x.gguf", ids, tmp_path)
    ours = run_ours(without_skip(open_model(str(folder))), [torch.tensor(ids[0])])
    assert kl(ours.logits, torch.from_numpy(found)) <= 1e-3
    with pytest.raises(llama_cpp.ProbeError, match="no tokenizer"):
        probe.tokens(tmp_path / "x.gguf", ["a"])


PROMPTS = ("A:1+2=?", "The sum of 12 and 30", "hello", "Solve: 7*8, then subtract 5.", "日本語")

TEXTS = (
    "", "hello world", " the", " the  Sunday  ", "12345 don't!?", "a\nb", "a\n\nb\n\n\nc\r\n",
    "\n", "\n\n", " \n ", "\t", "é", "日本語 テスト", "😀👍", "e\u0301", "\u00a0x\u3000", "▁",
    "<0x0A>", "<0x41", "[PAD740]", "<eos>", "<unk>", "<pad>x", "<|im_start|>user\nhi<|im_end|>\n",
    "<think>a</think>", "<think>\n", "<|im_start|><|im_start|>", " <think> ", "\x00", "\x1b[0m",
    "x" * 300, "<|im_st", "A:16+7=23\nB:23-3=20\n",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["F32", "Q4_K"])
def test_texts_become_the_same_tokens(
    kind: str, probe: Probe, files: Callable[[str], Path], source: Checkpoint
) -> None:
    tokenizer = Tokenizer.of(source)
    prompts = (*PROMPTS, "A:1+2=?\n\nB: é\n")
    chats = [tokenizer.render([{"role": "user", "content": prompt}]) for prompt in prompts]
    assert all(text.startswith("<bos>") for text in chats)
    texts = [*TEXTS, *chats, *(text.removeprefix("<bos>") for text in chats)]
    for bos in (False, True):
        # llama.cpp would put a second one in front
        asked = [text for text in texts if not (bos and text.startswith("<bos>"))]
        found = probe.tokens(files(kind), asked, bos=bos)
        for text, ids in zip(asked, found, strict=True):
            assert ids == tokenizer.encode(text, add_bos=bos), repr(text)


def test_bundled_texts_become_the_same_tokens(
    probe: Probe, files: Callable[[str], Path], source: Checkpoint, sequences: list[Tensor]
) -> None:
    texts = [Tokenizer.of(source).decode(ids.tolist(), skip_special=False) for ids in sequences]
    found = probe.tokens(files("F32"), texts)
    assert found == [Tokenizer.of(source).encode(text, add_bos=False) for text in texts]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_same(
    prompt: str, chat: bool, probe: Probe, files: Callable[[str], Path], source: Checkpoint
) -> None:
    tokenizer = Tokenizer.of(source)
    ids = tokenizer.encode(prompt)
    if chat:
        ids = tokenizer.chat([{"role": "user", "content": prompt}])
    found, _ = probe.generate(files("F32"), ids, 32)
    for checkpoint in (source, without_skip(source)):
        steps = generate(Model(checkpoint), [ids], max_new_tokens=32)
        assert [step.token for step in steps] == found
