"""The runtime on a model: tokens a second, and how near to reading the weights they are."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zaya_convert.bench.measure import seconds
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.weights import Weights
from zaya_kernels.library import load
from zaya_kernels.packed import PackedWeight


@dataclass(frozen=True)
class Decoded:
    """What decoding and reading prompts took; see ``measure_decode``.

    Attributes:
        tokens: decoded and timed.
        prompt: tokens of the prompt.
        decode: tokens a second, from the median of single steps.
        decode_fastest: from their tenth percentile.
        prefill: tokens a second.
        bytes_per_token: weights that a step reads, skipped layers left out.
        skipped: share of layers that the steps skipped.
        read_seconds: a pure read of as many bytes, the median of those between the steps; None
            without the native library.
        share: ``read_seconds`` of a step's time.
        step: "native", or why single tokens take the way of blocks.
    """

    name: str
    dtype: str
    threads: int
    tokens: int
    prompt: int
    decode: float
    decode_fastest: float
    prefill: float
    bytes_per_token: int
    gigabytes: float
    skipped: float
    read_seconds: float | None
    share: float | None
    step: str


@torch.no_grad()
def measure_decode(
    checkpoint: Checkpoint,
    tokens: int = 32,
    prompt: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    threads: int = 1,
) -> Decoded:
    """Measure ``generate``'s way of running a model: packed weights, one sequence, greedy.

    Every step is followed by a pure read of as many bytes as it takes weights.

    Args:
        tokens: steps to time; a few more come before.
        prompt: random tokens of the prompt.
    """
    model = Model(checkpoint, dtype, fast=True)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(checkpoint.config.vocab_rows, (1, prompt), generator=draw)
    model.forward(ids, cache=model.new_cache(), last_only=True)  # reads and packs the weights
    prefill = min(
        seconds(lambda: model.forward(ids, cache=model.new_cache(), last_only=True))
        for _ in range(2)
    )
    cache = model.new_cache()
    logits = model.forward(ids, cache=cache, last_only=True).logits
    experts = checkpoint.config.experts
    whole, expert = bytes_read(model.weights)
    buffer = torch.zeros(whole + checkpoint.config.layers * expert, dtype=torch.uint8)
    found, _ = load()
    steps: list[float] = []
    reads: list[float] = []
    used: list[Tensor] = []
    warming = max(2, tokens // 8)

    def step() -> None:
        nonlocal logits
        output = model.forward(logits[:, -1].argmax(-1)[:, None], cache=cache, last_only=True)
        logits = output.logits
        used.append(output.routes != experts)

    for index in range(warming + tokens):
        taken = seconds(step)
        size = whole + int(used[-1].sum()) * expert
        if index < warming:
            continue
        steps.append(taken)
        if found is not None:
            reads.append(seconds(partial(found.zk_read, buffer.data_ptr(), size, threads)))
    taken_experts = torch.stack(used[warming:]).float()
    size = whole + int(float(taken_experts.sum()) / len(steps) * expert)
    median, read = statistics.median(steps), statistics.median(reads) if reads else None
    return Decoded(
        name=checkpoint.path.name, dtype=str(dtype).removeprefix("torch."), threads=threads,
        tokens=tokens, prompt=prompt, decode=1 / median,
        decode_fastest=1 / sorted(steps)[len(steps) // 10], prefill=prompt / prefill,
        bytes_per_token=size, gigabytes=size / median / 1e9,
        skipped=1 - float(taken_experts.mean()), read_seconds=read,
        share=None if read is None else read / median, step=model.step_refusal or "native",
    )  # fmt: skip


def bytes_read(weights: Weights) -> tuple[int, int]:
    """(bytes that every token reads, bytes of one expert: the mean over all).

    Of the embedding a token reads one row, unless the head is the same matrix.
    """
    config = weights.checkpoint.config
    layers = [weights.layer(index).values() for index in range(config.layers)]
    head = weights.packed_head()
    last = [head] if head is not None else [block for _, block in weights.head_blocks()]
    whole = sum(sum(map(_size, layer)) for layer in layers) + sum(map(_size, last))
    experts = [
        _total(weights.expert(layer, expert))
        for layer in range(config.layers)
        for expert in range(config.experts)
    ]
    return whole, sum(experts) // len(experts)


def _total(matrices: Iterable[object]) -> int:
    return sum(map(_size, matrices))


def _size(matrix: object) -> int:
    assert isinstance(matrix, Tensor | PackedWeight)
    return matrix.nbytes
