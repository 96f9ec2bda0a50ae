"""``generate`` on artifacts whose matrices stay codes: the text of the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.cli.main import run
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.runtime.generate import generate
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_kernels import library, table
from zaya_kernels.packed import PackedWeight
from zaya_kernels.reference import Weight

if not library.supported_isas():
    pytest.skip(library.load()[1], allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("Compute 12 + 30.", "Reverse abc.")
EMBEDDING = TensorKey(-1, "embed_tokens.weight")  # the head too: they are tied
RULE = '[[rules]]\nmatch = "{}"\nbits = {}\ngroup_size = 32\nmethod = "rtn"\n'
# compressed-tensors keep the embedding as floats; GGUF holds Q4_0 and Q8_0 here.
BITS = {
    "safetensors": {"experts": 4, "attention": 8},
    "gguf": {"experts": 4, "attention": 8, "embedding": 8},
}


@pytest.fixture(scope="module", params=BITS)
def quantized(
    request: pytest.FixtureRequest, bundled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    """The bundled model in one of the forms."""
    folder = tmp_path_factory.mktemp("packed")
    rules = "".join(RULE.format(*rule) for rule in BITS[request.param].items())
    (folder / "recipe.toml").write_text(f'description = "packed"\n{rules}')
    arguments = ["--recipe", folder / "recipe.toml", "--format", request.param]
    command = ["quantize", bundled, *arguments, "-o", folder / "artifact", "-q"]
    assert run([str(part) for part in command]) == 0
    return open_model(str(folder / "artifact"))


def prompts(checkpoint: Checkpoint) -> list[list[int]]:
    tokenizer = Tokenizer.of(checkpoint)
    return [tokenizer.chat([{"role": "user", "content": text}]) for text in PROMPTS]


def continued(model: Model, checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Greedy tokens, and the sequences they are of."""
    stop = Tokenizer.of(checkpoint).stop_ids
    steps = generate(model, prompts(checkpoint), max_new_tokens=24, stop_ids=stop)
    return [(step.sequence, step.token) for step in steps]


def held(model: Model) -> list[Weight]:
    """Of the first layer an attention matrix and an expert's matrices, and the head."""
    attention = model.weights.layer(0)["self_attn.o_proj.weight"]
    head = model.weights.packed_head()
    return [attention, *model.weights.expert(0, 3), *([] if head is None else [head])]


def logits(model: Model, checkpoint: Checkpoint) -> Tensor:
    return model.forward(torch.tensor([prompts(checkpoint)[0]])).logits


def test_packed_codes_say_what_the_reference_says(
    quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Model(quantized)
    wanted, scores = continued(exact, quantized), logits(exact, quantized)
    monkeypatch.setenv(table.ENVIRONMENT, "native")
    packed = Model(quantized, exact=False, fast=True)
    assert continued(packed, quantized) == wanted
    torch.testing.assert_close(logits(packed, quantized), scores, rtol=1e-4, atol=1e-3)
    found = held(packed)
    assert all(isinstance(matrix, PackedWeight) for matrix in found)
    assert len(found) == 4 + (quantized.infos[EMBEDDING].spec is not None)
    assert not any(matrix.fast for matrix in found if isinstance(matrix, PackedWeight))


def test_rounded_activations_change_logits_little(quantized: Checkpoint) -> None:
    scores = logits(Model(quantized), quantized)
    for dtype in (torch.float32, torch.bfloat16):
        model = Model(quantized, dtype, exact=False, fast=True)
        found = logits(model, quantized)
        assert float((found - scores).norm() / scores.norm()) < 0.03
        assert all(matrix.fast for matrix in held(model) if isinstance(matrix, PackedWeight))


def test_proofs_never_run_on_packed_codes(quantized: Checkpoint) -> None:
    for model in (
        Model(quantized),
        Model(quantized, fast=True),
        Model(quantized, torch.bfloat16),
        Model(quantized, torch.bfloat16, resident=False, fast=True),
    ):
        assert not any(isinstance(matrix, PackedWeight) for matrix in held(model))


def test_the_environment_forces_the_reference(
    quantized: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(table.ENVIRONMENT, "reference")
    model = Model(quantized, torch.bfloat16, fast=True)
    assert not any(isinstance(matrix, PackedWeight) for matrix in held(model))
    assert torch.equal(
        logits(model, quantized), logits(Model(quantized, torch.bfloat16), quantized)
    )
