"""Self-generated traces: what the model itself writes, as calibration text.

A model is used on its own output, so its activations there are the ones that matter. Prompts come
from the calibration documents: up to the first answer of a conversation, or the beginning of a
plain text. Sampling is at temperature 1, from the float model, and reproducible by seed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.data import Sequences, digest_of
from zaya_convert.runtime.generate import Sampling, complete
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.tokenizer import Tokenizer

_BATCH = 16
_PROMPT = 32  # tokens of a document that begin a trace
_RESIDENT_BYTES = 2 << 30  # larger models are read anew for each step


def self_generated(
    checkpoint: Checkpoint,
    documents: Sequences,
    *,
    tokens: int,
    length: int,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Sequences:
    """Traces of about ``tokens`` tokens in all, prompts included.

    Args:
        length: of the longest trace, its prompt included.
    """
    has_tokenizer = checkpoint.has_tokenizer
    stop = Tokenizer.of(checkpoint).stop_ids if has_tokenizer else ()
    model = Model(checkpoint, resident=checkpoint.bytes <= _RESIDENT_BYTES, exact=False)
    limit = min(length, checkpoint.config.max_positions)
    prompts = [ids[: min(_PROMPT, limit // 2)] for ids in documents.ids if len(ids) > 1]
    found: list[Tensor] = []
    made = start = 0
    while made < tokens:
        # After all prompts were used they come again, with noise of their own.
        batch = [prompts[(start + i) % len(prompts)].tolist() for i in range(_BATCH)]
        streams = [(start + i,) for i in range(_BATCH)]
        answers = complete(
            model, batch, max_new_tokens=limit - max(map(len, batch)), stop_ids=stop,
            sampling=Sampling(temperature=1.0, seed=seed), streams=streams,
        )  # fmt: skip
        for prompt, answer in zip(batch, answers, strict=True):
            trace = torch.tensor((prompt + answer.tokens)[: max(tokens - made, 2)])
            if made < tokens and len(trace) > 1:
                found.append(trace)
                made += len(trace)
        start += _BATCH
        progress("writing traces", min(made, tokens), tokens)
    return Sequences(found, f"self-generated traces, seed {seed}", digest_of(found))
