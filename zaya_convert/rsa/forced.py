"""Teacher forcing: what a candidate makes of the reference's own traces, token by token.

The candidate runs as it would when it generates: prompts in blocks, then one token at a time, its
states carried in its own cache. What is wrong with the states shows here, and not in one pass over
whole sequences. The reference runs whole sequences, layer outermost, each weight read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zaya_convert.runtime.cache import rows_that_fit
from zaya_convert.runtime.engine import Engine
from zaya_convert.runtime.model import Evaluation
from zaya_quant.metrics import kl_divergence

# (tokens done, of)
Progress = Callable[[int, int], None]

_HEAD_ROWS = 256  # rows of logits held at once; the head is read once per such block
_KL_ROWS = 16  # rows in float64 at once
_LOGITS_BYTES = 64 << 20  # of one block of a cached run
_STATE_BYTES = 2 << 30
_ROWS = 64


@dataclass(frozen=True)
class Trace:
    """A prompt and what the reference generated after it.

    Attributes:
        ids: int64 [T].
        prompt: how many of them are the prompt.
        problem: index of its problem.
        round: 0 to T.
    """

    ids: Tensor
    prompt: int
    problem: int
    round: int


@dataclass(frozen=True)
class Reading:
    """What one engine makes of all tokens of some traces, beside the reference; n positions.

    Attributes:
        kl: KL(reference ‖ candidate) [n], nats, float64; inf where logits are not numbers.
        same_top1: whether both find the same token most probable [n].
        routes: the classes it chose [L, n], E = skip.
        weights: their probabilities [L, n].
    """

    kl: Tensor
    same_top1: Tensor
    routes: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Places:
    """Where positions lie; [n] each.

    Attributes:
        trace: index of the trace.
        problem: index of its problem.
        column: position in the trace.
        generated: whether the next token was generated (or the end).
    """

    trace: Tensor
    problem: Tensor
    column: Tensor
    generated: Tensor

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> Places:
        """All positions of all traces, one after the other."""
        trace = torch.cat([torch.full((len(t.ids),), i) for i, t in enumerate(traces)])
        columns = torch.cat([torch.arange(len(t.ids)) for t in traces])
        prompts = torch.tensor([t.prompt for t in traces])[trace]
        problems = torch.tensor([t.problem for t in traces])[trace]
        return cls(trace, problems, columns, columns >= prompts - 1)


@dataclass(frozen=True)
class Block:
    """Logits of some positions [m, V]; their classes and the probabilities of these [L, m]."""

    positions: Tensor
    logits: Tensor
    routes: Tensor
    weights: Tensor


def evaluate(
    reference: Engine[Any], traces: Sequence[Trace], progress: Progress = lambda done, of: None
) -> Evaluation:
    """The reference over all traces."""
    return reference.evaluate([trace.ids for trace in traces], progress)


def compare(
    judges: Sequence[tuple[Engine[Any], Evaluation]],
    blocks: Iterator[Block],
    progress: Progress = lambda done, of: None,
) -> list[Reading]:
    """Hold an engine's logits against those of one or more others: a reading beside each.

    An engine with fewer rows of vocabulary is compared on those it has.

    Args:
        judges: each with its ``evaluate`` of the same traces.
        blocks: of all positions of the traces, in any order.
    """
    layers, total = judges[0][1].routes.shape
    hidden = [torch.cat(evaluation.hidden) for _, evaluation in judges]
    kl = torch.full((len(judges), total), torch.nan, dtype=torch.float64)
    same = torch.zeros(len(judges), total, dtype=torch.bool)
    routes = torch.full((layers, total), -1, dtype=torch.int32)
    weights = torch.full((layers, total), torch.nan)
    done = 0
    for block in _gathered(blocks):
        routes[:, block.positions] = block.routes
        weights[:, block.positions] = block.weights
        for judge, (engine, _) in enumerate(judges):
            ours = engine.logits(hidden[judge][block.positions])
            rows = min(block.logits.shape[1], ours.shape[1])
            for at in torch.arange(len(ours)).split(_KL_ROWS):
                a, b = ours[at, :rows], block.logits[at, :rows]
                where = block.positions[at]
                divergence = kl_divergence(a, b)
                kl[judge, where] = divergence.masked_fill(divergence.isnan(), torch.inf)
                same[judge, where] = a.argmax(-1) == b.argmax(-1)
        done += len(block.positions)
        progress(done, total)
    return [Reading(kl[i], same[i], routes, weights) for i in range(len(judges))]


def _gathered(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same in blocks of at most ``_HEAD_ROWS`` rows, nearly all of them full."""
    held: list[Block] = []

    def take() -> Block:
        whole = Block(
            torch.cat([block.positions for block in held]),
            torch.cat([block.logits for block in held]),
            torch.cat([block.routes for block in held], dim=1),
            torch.cat([block.weights for block in held], dim=1),
        )
        held.clear()
        return whole

    for block in blocks:
        for part in torch.arange(len(block.positions)).split(_HEAD_ROWS):
            if sum(len(b.positions) for b in held) + len(part) > _HEAD_ROWS:
                yield take()
            held.append(
                Block(
                    block.positions[part], block.logits[part], block.routes[:, part],
                    block.weights[:, part],
                )
            )  # fmt: skip
    if held:
        yield take()


def whole(engine: Engine[Any], traces: Sequence[Trace]) -> Iterator[Block]:
    """An engine over whole sequences, without a cache."""
    found = engine.evaluate([trace.ids for trace in traces])
    hidden = torch.cat(found.hidden)
    for start in range(0, len(hidden), _HEAD_ROWS):
        part = slice(start, start + _HEAD_ROWS)
        positions = torch.arange(len(hidden))[part]
        yield Block(
            positions, engine.logits(hidden[part]), found.routes[:, part], found.weights[:, part]
        )


def cached(engine: Engine[Any], traces: Sequence[Trace]) -> Iterator[Block]:
    """An engine as it generates: prompts in at least two blocks, then token by token."""
    starts = torch.tensor([0, *(len(trace.ids) for trace in traces)]).cumsum(0)[:-1]
    order = sorted(range(len(traces)), key=lambda i: traces[i].prompt)  # little padding
    while order:
        longest = max(len(traces[i].ids) for i in order)
        rows = min(_ROWS, rows_that_fit(engine.config, longest, _STATE_BYTES))
        batch, order = order[-rows:], order[:-rows]
        yield from _cached(engine, [traces[i] for i in batch], starts[torch.tensor(batch)])


def _cached(engine: Engine[Any], traces: Sequence[Trace], starts: Tensor) -> Iterator[Block]:
    """One batch.

    Args:
        starts: positions of the traces' first tokens [B].
    """
    size, width = len(traces), max(trace.prompt for trace in traces)
    ids = torch.full((size, width), engine.config.pad_id or 0)
    mask = torch.zeros(size, width, dtype=torch.bool)
    places = torch.full((size, width), -1)
    for row, trace in enumerate(traces):
        ids[row, width - trace.prompt :] = trace.ids[: trace.prompt]
        mask[row, width - trace.prompt :] = True
        places[row, width - trace.prompt :] = starts[row] + torch.arange(trace.prompt)
    cache = engine.new_cache()
    most = max(1, _LOGITS_BYTES // (4 * engine.config.vocab_rows * size))
    for columns in torch.arange(width).split(max(1, min(most, -(-width // 2)))):
        output = engine.forward(ids[:, columns], cache=cache, mask=mask[:, : int(columns[-1]) + 1])
        real = mask[:, columns].flatten()
        yield Block(
            places[:, columns].flatten()[real],
            output.logits.flatten(0, 1)[real],
            output.routes.flatten(1)[:, real],
            output.weights.flatten(1)[:, real],
        )
    live = list(range(size))
    step = 0
    while True:
        kept = [i for i, row in enumerate(live) if traces[row].prompt + step < len(traces[row].ids)]
        if not kept:
            return
        if len(kept) < len(live):
            cache, live = cache.select(kept), [live[i] for i in kept]
        at = [traces[row].prompt + step for row in live]
        tokens = torch.stack([traces[row].ids[p] for row, p in zip(live, at, strict=True)])
        output = engine.forward(tokens[:, None], cache=cache)
        yield Block(
            starts[torch.tensor(live)] + torch.tensor(at), output.logits[:, 0],
            output.routes[:, :, 0], output.weights[:, :, 0],
        )  # fmt: skip
        step += 1
