"""Batched sampling from `ZayaForCausalLM`, its noise depending on the request alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, ZayaForCausalLM

from tools.tiny.tokenizer import EOS_ID, IM_END_ID, PAD_ID


@dataclass(frozen=True)
class Request:
    """A prompt to continue; `key` (seed, problem, round, candidate) decides its noise."""

    prompt: tuple[int, ...]
    key: tuple[int, int, int, int]


def gumbel(key: Sequence[int], positions: int, rows: int) -> NDArray[np.float32]:
    """Gumbel noise, a row a position, from a counter-based generator keyed by `key`."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))
    uniform = generator.random((positions, rows), dtype=np.float32)
    return -np.log(-np.log(uniform * np.float32(1 - 2e-7) + np.float32(1e-7)))


@torch.no_grad()
def sample(
    model: ZayaForCausalLM,
    requests: Sequence[Request],
    budget: int,
    temperature: float,
    batch_size: int = 128,
) -> list[list[int]]:
    """New tokens of every request, at most `budget`; the closing token is not included.

    Temperature 0 is greedy. Requests of like length share a batch, which changes no result beyond
    rounding.
    """
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
    results: list[list[int]] = [[] for _ in requests]
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        outputs = _sample_batch(model, [requests[i] for i in chosen], budget, temperature)
        for index, output in zip(chosen, outputs, strict=True):
            results[index] = output
    return results


def _sample_batch(
    model: ZayaForCausalLM, requests: Sequence[Request], budget: int, temperature: float
) -> list[list[int]]:
    width = max(len(r.prompt) for r in requests)
    ids = torch.full((len(requests), width), PAD_ID)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
    mask = (ids != PAD_ID).long()
    position = mask.cumsum(1) - 1
    rows = model.config.vocab_size
    noise = None
    if temperature > 0:
        noise = torch.from_numpy(np.stack([gumbel(r.key, budget, rows) for r in requests], 1))
    cache = DynamicCache(config=model.config)
    outputs: list[list[int]] = [[] for _ in requests]
    open_rows = torch.ones(len(requests), dtype=torch.bool)
    step_ids, step_positions = ids, position.clamp(min=0)
    for index in range(budget):
        logits: Tensor = model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=step_positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        scores = logits if noise is None else logits / temperature + noise[index]
        token = scores.argmax(-1)
        open_rows &= (token != IM_END_ID) & (token != EOS_ID)
        if not open_rows.any():
            break
        for row in open_rows.nonzero()[:, 0].tolist():
            outputs[row].append(int(token[row]))
        mask = torch.cat([mask, mask.new_ones(len(requests), 1)], 1)
        step_ids, step_positions = token[:, None], step_positions[:, -1:] + 1
    return outputs
