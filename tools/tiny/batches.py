"""Training batches: examples drawn per pool of steps, sorted by length, tokenized and weighted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from tools.tiny.data import Example, aggregation_example, single_example
from tools.tiny.prose import prose_example
from tools.tiny.tokenizer import BOS_ID, PAD_ID, THINK_ID

POOL_STEPS = 16
LENGTH_STEP = 16
PROBLEM_WEIGHT = 0.05
TAILS_WEIGHT = 0.3  # predicting one tail from another is reading practice too


@dataclass(frozen=True)
class Mix:
    """How a phase is mixed: tokens a step by kind of batch, shares inside them, and error rates."""

    short_tokens: int
    long_tokens: int
    prose_share: float
    drill_share: float
    slip_rate: float
    error_rate: float
    foreign_share: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Right-padded ids [B, S] (with `<bos>`), and the weight [B, S] of predicting each of them."""

    ids: Tensor
    weights: Tensor


def pool_of_batches(
    tokenizer: Tokenizer, mix: Mix, seed: int, pool: int, split: str = "train"
) -> list[tuple[Batch, Batch]]:
    """The batches of `POOL_STEPS` steps, a short (problems, prose) and a long (tails) one each."""
    rng = random.Random(f"{seed}:{pool}")

    def short() -> Example:
        if rng.random() < mix.prose_share:
            return prose_example(rng, split)
        return single_example(rng, split, mix.slip_rate)

    def long() -> Example:
        hidden = rng.randint(1, 3) if rng.random() < mix.drill_share else 0
        return aggregation_example(
            rng, split, mix.slip_rate, mix.error_rate, hidden, mix.foreign_share
        )

    shorts = _batches(tokenizer, short, mix.short_tokens, rng)
    longs = _batches(tokenizer, long, mix.long_tokens, rng)
    return list(zip(shorts, longs, strict=True))


def _batches(
    tokenizer: Tokenizer, draw: Callable[[], Example], tokens: int, rng: random.Random
) -> list[Batch]:
    """`POOL_STEPS` batches of at most `tokens` padded tokens each, filled by similar lengths."""
    examples: list[Example] = []
    encodings: list[Encoding] = []
    total = 0
    while total < tokens * (POOL_STEPS + 2):
        drawn = [draw() for _ in range(64)]
        encoded = tokenizer.encode_batch([e.text for e in drawn], add_special_tokens=False)
        total += sum(len(e.ids) + 1 for e in encoded)
        examples += drawn
        encodings += encoded
    order = sorted(range(len(examples)), key=lambda i: len(encodings[i].ids))
    groups: list[list[int]] = [[]]
    for index in order:
        if (len(groups[-1]) + 1) * _padded(len(encodings[index].ids) + 1) > tokens:
            groups.append([])
        groups[-1].append(index)
    rng.shuffle(groups)
    chosen = [groups[i % len(groups)] for i in range(POOL_STEPS)]
    return [collate([examples[i] for i in g], [encodings[i] for i in g]) for g in chosen]


def _padded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def collate(examples: Sequence[Example], encodings: Sequence[Encoding]) -> Batch:
    """One batch; context tokens weigh little, muted ones nothing."""
    width = _padded(max(len(e.ids) for e in encodings) + 1)
    ids = torch.full((len(examples), width), PAD_ID)
    weights = torch.zeros(len(examples), width)
    for row, (example, encoding) in enumerate(zip(examples, encodings, strict=True)):
        sequence = encoding.ids
        ids[row, 0] = BOS_ID
        ids[row, 1 : len(sequence) + 1] = torch.tensor(sequence)
        weight = torch.ones(len(sequence))
        if example.response_at:
            context = TAILS_WEIGHT if "Candidate" in example.text else PROBLEM_WEIGHT
            weight[: sequence.index(THINK_ID) + 2] = context
        if example.mute:
            for position, (start, end) in enumerate(encoding.offsets):
                if any(a <= start and end <= b for a, b in example.mute):
                    weight[position] = 0.0
        weights[row, 1 : len(sequence) + 1] = weight
    return Batch(ids, weights)


def batch_of(tokenizer: Tokenizer, examples: Sequence[Example]) -> Batch:
    """All of `examples` in one batch."""
    texts = [example.text for example in examples]
    return collate(examples, tokenizer.encode_batch(texts, add_special_tokens=False))
