"""What tests of ONNX clients share: small artifacts, and a judge of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.convert import execute
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule, adjusted, load
from zaya_convert.runtime.generate import complete
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.tokenizer import Tokenizer

PROMPTS = (
    "Start with 14. Add 5. Add 5. Multiply by 2. Multiply by 2. What is the result? Count modulo "
    "100 and give two digits.",
    "Tom has 59 points. Tom gives away 8. Tom finds 4 more. How many points are there? Count "
    "modulo 100 and give two digits.",
    "hello",
    "日本語, é and 😀",
)
NEW_TOKENS = 64

FLOAT = "float"
RECIPES = {
    FLOAT: None,
    "int4": adjusted(load("onnx-int4"), method="rtn"),
    "int4, asymmetric": Recipe("asymmetric", "", (
        Rule("experts", 4, 64, symmetric=False),
        Rule("attention", 4, 32, symmetric=False),
        Rule("embedding", 4, 32, symmetric=False),
    )),
    "int8": Recipe("int8", "", tuple(
        Rule(kind, 8, 32) for kind in ("experts", "attention", "embedding")
    )),
}  # fmt: skip

# A quantized graph may round activations to 8 bits: logits, as large as 30, are then up to 0.44
# off, and the best token up to 0.041 below ours (measured).
CLOSE = 0.2


@dataclass(frozen=True)
class Subject:
    """An ONNX folder, and our own runtime on the weights in it."""

    folder: Path
    exact: bool
    model: Model
    tokenizer: Tokenizer

    @classmethod
    def write(
        cls, source: Checkpoint, name: str, folder: Path, shard_bytes: int | None = None
    ) -> Subject:
        """Write ``source`` as one of ``RECIPES``."""
        execute(make_plan(source, RECIPES[name], "onnx", shard_bytes), folder)
        opened = open_model(str(folder))
        return cls(folder, name == FLOAT, Model(opened), Tokenizer.of(opened))

    def chat(self, message: str) -> list[int]:
        """A prompt's tokens."""
        return self.tokenizer.chat([{"role": "user", "content": message}])

    def agrees(self, prompt: Sequence[int], tokens: Sequence[int]) -> None:
        """Assert that every one of ``tokens`` is the best one in our runtime too."""
        if self.exact:
            (ours,) = complete(self.model, [prompt], max_new_tokens=len(tokens))
            assert list(tokens) == ours.tokens
            return
        ids = torch.tensor([[*prompt, *tokens]])
        logits = self.model.forward(ids[:, :-1]).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        assert float((logits.amax(1) - chosen).max()) <= CLOSE
