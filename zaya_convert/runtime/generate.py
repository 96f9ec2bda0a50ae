"""Generation: batched, streaming, and reproducible whatever runs beside a sequence.

Sampling is Gumbel-max: ``argmax(filtered logits / temperature + noise)``, where the noise of a
sequence at a position comes from a counter-based generator (Philox) keyed by the seed and the
sequence's stream. No state is shared, so a sequence draws the same noise alone or in any batch,
and two models given the same streams can be compared draw by draw.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from zaya_convert.errors import InputError, UsageError
from zaya_convert.runtime.engine import Engine, S

T = TypeVar("T")

_COLDEST = 1e-290  # of temperatures above 0: logits divided by less would overflow


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
class Task:
    """A prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least one; the model's context may end it sooner.
        sampling: how its tokens are chosen.
        stream: name of its noise stream, numbers >= 0.
        stop_ids: tokens that end it.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling
    stream: Sequence[int] = (0,)
    stop_ids: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One new token.

    Attributes:
        sequence: which one it continues: the index of its prompt, or what ``Decoder.add`` said.
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


class Decoder(Generic[S]):
    """Sequences that are continued together, and join and leave between two steps.

    Args:
        prefill_chunk: columns of prompts run at once, None for all.

    Attributes:
        logits: [B, V] fp32, what the latest step's tokens were chosen from, in its order.
    """

    def __init__(self, model: Engine[S], prefill_chunk: int | None = None) -> None:
        self.logits = torch.empty(0, model.config.vocab_rows)
        self._model, self._chunk = model, prefill_chunk
        self._rows: list[_Row] = []
        self._cache: S | None = None
        self._chosen: Tensor | None = None  # by the latest step, not yet run
        self._next = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, tasks: Sequence[Task]) -> list[int]:
        """Take more sequences in; equal prompts are run once.

        Returns:
            What their steps will call them: numbers in the order of arrival.

        Raises:
            InputError: an empty prompt, or one that leaves no room in the context.
        """
        return finish(self.adding(tasks))

    def adding(self, tasks: Sequence[Task]) -> Generator[None, None, list[int]]:
        """``add`` in parts: a chunk of a prompt at a time, between which there may be steps.

        The sequences join when all of them are through; one that is not run to its end adds none.
        """
        limits = _limits(self._model, tasks)
        rows = [
            _Row(self._next + i, task, _key(task.sampling.seed, task.stream), limits[i])
            for i, task in enumerate(tasks)
        ]
        if not rows:
            return []
        self._next += len(rows)
        prompts = list(dict.fromkeys(tuple(task.prompt) for task in tasks))
        cache, logits = yield from _prefill(self._model, prompts, self._chunk)
        if len(prompts) < len(tasks):
            index = [prompts.index(tuple(task.prompt)) for task in tasks]
            cache, logits = cache.select(index), logits[index]
        self._run_chosen()
        if self._cache is not None:
            cache, logits = self._cache.join(cache), torch.cat([self.logits, logits])
        self._cache, self.logits = cache, logits
        self._rows += rows
        return [row.name for row in rows]

    def step(self) -> list[Step]:
        """One more token for every sequence; those that it finishes leave."""
        if not self._rows:
            self.logits = self.logits[:0]
            return []
        self._run_chosen()
        tokens = self._choose()
        steps: list[Step] = []
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.position += 1
            reason = "stop" if token in row.task.stop_ids else ""
            reason = reason or ("length" if row.position == row.limit else "")
            steps.append(Step(row.name, token, reason))
        self._chosen = tokens
        self._keep([i for i, step in enumerate(steps) if not step.finished])
        return steps

    def remove(self, sequences: Collection[int]) -> None:
        """Let go of sequences that are not finished."""
        kept = [i for i, row in enumerate(self._rows) if row.name not in sequences]
        if self._chosen is None:
            self.logits = self.logits[kept]
        self._keep(kept)

    def _run_chosen(self) -> None:
        """Put the tokens that the latest step chose through the model."""
        if self._chosen is not None and self._cache is not None:
            self.logits = self._model.forward(
                self._chosen[:, None], cache=self._cache, last_only=True
            ).logits[:, -1]
        self._chosen = None

    def _choose(self) -> Tensor:
        """A token for each sequence [B]; those of equal settings are chosen together."""
        groups: dict[Sampling, list[int]] = {}
        for i, row in enumerate(self._rows):
            groups.setdefault(replace(row.task.sampling, seed=0), []).append(i)
        tokens = torch.empty(len(self._rows), dtype=torch.long)
        for sampling, members in groups.items():
            rows = [self._rows[i] for i in members]
            noise = None
            if sampling.temperature > 0:
                noise = _noise([(row.key, row.position) for row in rows], self.logits.shape[1])
            logits = self.logits if len(groups) == 1 else self.logits[members]
            tokens[members] = choose(logits, sampling, noise)
        return tokens

    def _keep(self, kept: Sequence[int]) -> None:
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        assert self._cache is not None
        self._cache = self._cache.select(kept) if kept else None
        if self._chosen is not None:
            self._chosen = self._chosen[kept]


@dataclass
class _Row:
    """A sequence in flight: its place in the noise, and how far it may go."""

    name: int
    task: Task
    key: np.ndarray
    limit: int
    position: int = 0


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
    names = [(i,) for i in range(len(prompts))] if streams is None else streams
    if len(names) != len(prompts):
        raise ValueError(f"{len(names)} noise streams for {len(prompts)} prompts")
    how = sampling or Sampling()
    tasks = [
        Task(prompt, max_new_tokens, how, stream, stop_ids)
        for prompt, stream in zip(prompts, names, strict=True)
    ]
    if max_new_tokens < 1:
        return
    decoder = Decoder(model, prefill_chunk)
    decoder.add(tasks)
    while len(decoder):
        yield from decoder.step()


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
    scaled = logits.double() / max(sampling.temperature, _COLDEST)
    return (_filter(scaled, sampling.top_k, sampling.top_p) + noise).argmax(-1)


def logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """log p of one token in each row of ``logits`` [B, V]: natural, unfiltered, temperature 1."""
    chosen = torch.tensor(tokens, dtype=torch.long)[:, None]
    return logits.log_softmax(1).gather(1, chosen)[:, 0].tolist()


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


def _noise(draws: Sequence[tuple[np.ndarray, int]], size: int) -> Tensor:
    """Gumbel noise [B, V] of each (key, position)."""
    rows = np.empty((len(draws), size))
    for row, (key, position) in zip(rows, draws, strict=True):
        # The position is the counter's highest word, so no two positions share a block.
        raw = np.random.Philox(key=key, counter=[0, 0, 0, position]).random_raw(size)
        row[:] = ((raw >> np.uint64(12)) + 0.5) * 2.0**-52  # uniform in (0, 1), exactly
    return torch.from_numpy(-np.log(-np.log(rows)))


def _limits(model: Engine[Any], tasks: Sequence[Task]) -> list[int]:
    """How many tokens each sequence may get."""
    context = model.config.max_positions
    problems = []
    for i, task in enumerate(tasks):
        if not task.prompt:
            problems.append(f"prompt {i} is empty")
        elif len(task.prompt) >= context:
            problems.append(
                f"prompt {i} has {len(task.prompt)} tokens; the model's context is {context}"
            )
    if problems:
        raise InputError(problems)
    return [min(task.max_new_tokens, context - len(task.prompt)) for task in tasks]


def finish(work: Generator[None, None, T]) -> T:
    """Do all of some work that is done in parts; its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def _prefill(
    model: Engine[S], prompts: Sequence[Sequence[int]], chunk: int | None
) -> Generator[None, None, tuple[S, Tensor]]:
    """Run prompts, a chunk at a time; returns the cache and the logits of the last column [B, V].

    Neighbours that begin alike, by so much that it pays, have their common beginning run once.
    """
    parts: list[tuple[S, Tensor]] = []
    order: list[int] = []
    alone: list[int] = []
    for rows, shared in _families(prompts):
        if not shared:
            alone += rows
            continue
        order += rows
        begun = model.new_cache()
        stem, _ = yield from _run_block(model, [prompts[rows[0]][:shared]], begun, chunk)
        for row in rows:
            rest = _run_block(model, [prompts[row][shared:]], stem.select([0]), chunk)
            parts.append((yield from rest))
    if alone:
        order += alone
        rest = _run_block(model, [prompts[row] for row in alone], model.new_cache(), chunk)
        parts.append((yield from rest))
    while len(parts) > 1:  # in pairs, so that nothing is copied often
        pairs = [parts[i : i + 2] for i in range(0, len(parts), 2)]
        parts = [_joined(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    cache, logits = parts[0]
    if order != sorted(order):
        places = torch.tensor(order).argsort()
        cache, logits = cache.select(places), logits[places]
    return cache, logits


def _run_block(
    model: Engine[S], prompts: Sequence[Sequence[int]], cache: S, chunk: int | None
) -> Generator[None, None, tuple[S, Tensor]]:
    """Continue ``cache``, or start it with left-padded prompts."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), model.config.pad_id or 0)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = True
    mask = torch.cat([torch.ones(len(prompts), cache.length, dtype=torch.bool), mask], dim=1)
    logits = torch.empty(0)
    for part in ids.split(chunk or width, dim=1):
        seen = mask[:, : cache.length + part.shape[1]]
        logits = model.forward(part, cache=cache, mask=seen, last_only=True).logits[:, -1]
        yield
    return cache, logits


def _joined(one: tuple[S, Tensor], other: tuple[S, Tensor]) -> tuple[S, Tensor]:
    return one[0].join(other[0]), torch.cat([one[1], other[1]])


def _families(prompts: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Neighbours that begin alike: their indices, and how many tokens to run once for all.

    0 where that would save less than a quarter of their tokens: running them one by one then
    costs more.
    """
    families: list[tuple[list[int], int]] = []
    for row, prompt in enumerate(prompts):
        if families:
            rows, shared = families[-1]
            alike = _alike(prompts[rows[0]][:shared], prompt[:-1])
            if 8 * alike >= len(prompt):  # more than the beginning of every chat
                families[-1] = ([*rows, row], alike)
                continue
        families.append(([row], len(prompt) - 1))
    found: list[tuple[list[int], int]] = []
    for rows, shared in families:
        pays = 4 * shared * (len(rows) - 1) >= sum(len(prompts[row]) for row in rows)
        found.append((rows, shared if pays and len(rows) > 1 else 0))
    return found


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
