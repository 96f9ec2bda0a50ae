"""Generation: batched, streaming, and reproducible whatever runs beside a sequence.

Sampling is Gumbel-max: ``argmax(filtered logits / temperature + noise)``, where the noise of a
sequence at a position comes from a counter-based generator (Philox) keyed by the seed and the
sequence's stream. No state is shared, so a sequence draws the same noise alone or in any batch,
and two models given the same streams can be compared draw by draw.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zaya_convert.errors import InputError, UsageError
from zaya_convert.runtime.engine import Engine, S


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: keep the most probable tokens up to this total probability (after temperature).
        top_k: keep this many tokens, 0 for all.
        seed: of the noise.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}, expected more than 0 and at most 1")
        if self.top_k < 0:
            raise UsageError(f"top-k is {self.top_k}, expected 0 (all) or more")


@dataclass(frozen=True, slots=True)
class Step:
    """One new token.

    Attributes:
        sequence: index of the prompt it continues.
        token: its id; a stop token is reported too.
        finished: "" while the sequence goes on, else "stop" or "length".
    """

    sequence: int
    token: int
    finished: str = ""


@dataclass
class Completion:
    """The tokens generated for one prompt; a stop token is not among them."""

    tokens: list[int] = field(default_factory=list)
    finished: str = ""


def generate(
    model: Engine[S],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    prefill_chunk: int | None = None,
    streams: Sequence[Sequence[int]] | None = None,
) -> Iterator[Step]:
    """Continue all prompts together, yielding each token as soon as it is known.

    Args:
        max_new_tokens: per sequence; the model's context may end it sooner.
        sampling: greedy when left out.
        stop_ids: tokens that end a sequence.
        prefill_chunk: columns of the prompt run at once, None for all.
        streams: names of the noise streams, one tuple of numbers >= 0 a prompt; (index,) by
            default.

    Raises:
        InputError: an empty prompt, or one that leaves no room in the context.
    """
    sampling = sampling or Sampling()
    limits = _limits(model, prompts, max_new_tokens)
    keys = [_key(sampling.seed, s) for s in streams or [(i,) for i in range(len(prompts))]]
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} noise streams for {len(prompts)} prompts")
    if not prompts or max_new_tokens < 1:
        return
    cache, logits = _prefill(model, prompts, prefill_chunk)
    live = list(range(len(prompts)))
    position = 0
    while True:
        noise = _noise([keys[i] for i in live], position, logits.shape[1], sampling)
        tokens = choose(logits, sampling, noise)
        position += 1
        kept: list[int] = []
        for row, (sequence, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
            reason = "stop" if token in stop_ids else ""
            reason = reason or ("length" if position == limits[sequence] else "")
            yield Step(sequence, token, reason)
            if not reason:
                kept.append(row)
        if not kept:
            return
        if len(kept) < len(live):
            cache, tokens, live = cache.select(kept), tokens[kept], [live[row] for row in kept]
        logits = model.forward(tokens[:, None], cache=cache, last_only=True).logits[:, -1]


def complete(
    model: Engine[S],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    prefill_chunk: int | None = None,
    streams: Sequence[Sequence[int]] | None = None,
) -> list[Completion]:
    """``generate``, collected: one completion a prompt."""
    results = [Completion() for _ in prompts]
    for step in generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        prefill_chunk=prefill_chunk,
        streams=streams,
    ):
        results[step.sequence].finished = step.finished
        if step.finished != "stop":
            results[step.sequence].tokens.append(step.token)
    return results


def choose(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """Choose one token a row.

    Args:
        logits: [B, V] fp32.
        noise: standard Gumbel noise [B, V]; None at temperature 0.

    Returns:
        [B] token ids.
    """
    if noise is None:
        return logits.argmax(-1)
    scaled = logits.double() / sampling.temperature
    return (_filter(scaled, sampling.top_k, sampling.top_p) + noise).argmax(-1)


def _filter(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] with those outside the top k, then outside the nucleus, at -inf."""
    if 0 < top_k < logits.shape[1]:
        lowest = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    if top_p < 1:
        values, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = values.softmax(-1)
        # A token stays while what is more probable has not reached top_p: the first always does.
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(beyond.gather(1, order.argsort(-1)), -torch.inf)
    return logits


def _key(seed: int, stream: Sequence[int]) -> np.ndarray:
    """The Philox key of one sequence's noise: 128 bits drawn from the seed and its stream."""
    return np.random.SeedSequence([seed, *stream]).generate_state(2, np.uint64)


def _noise(
    keys: Sequence[np.ndarray], position: int, size: int, sampling: Sampling
) -> Tensor | None:
    """Gumbel noise [B, V] of each stream at ``position``; None when none is needed."""
    if sampling.temperature == 0:
        return None
    rows = np.empty((len(keys), size))
    for row, key in zip(rows, keys, strict=True):
        # The position is the counter's highest word, so no two positions share a block.
        raw = np.random.Philox(key=key, counter=[0, 0, 0, position]).random_raw(size)
        row[:] = ((raw >> np.uint64(12)) + 0.5) * 2.0**-52  # uniform in (0, 1), exactly
    return torch.from_numpy(-np.log(-np.log(rows)))


def _limits(model: Engine[Any], prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens each sequence may get."""
    context = model.config.max_positions
    problems = []
    for i, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompt {i} is empty")
        elif len(prompt) >= context:
            problems.append(
                f"prompt {i} has {len(prompt)} tokens; the model's context is {context}"
            )
    if problems:
        raise InputError(problems)
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


def _prefill(
    model: Engine[S], prompts: Sequence[Sequence[int]], chunk: int | None
) -> tuple[S, Tensor]:
    """Run left-padded prompts; returns the cache and the logits of the last column [B, V]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), model.config.pad_id or 0)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    cache = model.new_cache()
    logits = torch.empty(0)
    for part in ids.split(chunk or width, dim=1):
        seen = mask[:, : cache.length + part.shape[1]]
        logits = model.forward(part, cache=cache, mask=seen, last_only=True).logits[:, -1]
    return cache, logits
