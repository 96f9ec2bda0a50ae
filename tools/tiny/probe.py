"""What a run has learned so far: clean held-out examples, scored without sampling."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer

from tools.tiny.batches import Batch, batch_of
from tools.tiny.data import aggregation_example, single_example
from tools.tiny.fast import FastForward


@torch.no_grad()
def trace_probability(forward: FastForward, batch: Batch) -> tuple[float, float, float]:
    """Of clean traces: the mean probability, and the shares of traces and tokens greedy gets.

    The first is what sampling at temperature 1 scores, but for lucky double errors.
    """
    logits = forward(batch.ids)[0][:, :-1].log_softmax(-1)
    targets = batch.ids[:, 1:]
    learned = batch.weights[:, 1:] == 1.0
    chosen = logits.gather(2, targets[..., None])[..., 0]
    sampled = (chosen * learned).sum(1).exp().mean()
    hits = logits.argmax(-1) == targets
    greedy = (hits | ~learned).all(1).float().mean()
    return float(sampled), float(greedy), float(hits[learned].float().mean())


def probe_batches(tokenizer: Tokenizer) -> dict[str, Batch]:
    """Held-out examples without slips, to follow what a step has learned."""
    rng = random.Random("probe")
    singles = [single_example(rng, "validation", 0.0) for _ in range(32)]
    tails = [aggregation_example(rng, "validation", 0.0, 0.08) for _ in range(16)]
    drill = [aggregation_example(rng, "validation", 0.0, 0.08, 2) for _ in range(16)]
    return {
        "single": batch_of(tokenizer, singles),
        "aggregate": batch_of(tokenizer, tails),
        "drill": batch_of(tokenizer, drill),
    }
