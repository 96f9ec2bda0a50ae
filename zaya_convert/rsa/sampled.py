"""What a server's own log-probabilities say, where it tells them.

A server does not read traces for us. But it samples each token from its distribution q and tells
log q. With p the reference's probability of that token and r = p / q, the mean of r - 1 - log r is
KL(candidate ‖ reference): E[r] is 1, and E[-log r] the divergence. No term is negative, so a few
thousand tokens suffice. It is the divergence the other way round, on the candidate's own traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zaya_convert.rsa import statistics
from zaya_convert.rsa.local import prompt_ids
from zaya_convert.rsa.loop import Round, message_of
from zaya_convert.rsa.problems import Problem
from zaya_convert.rsa.settings import Settings
from zaya_convert.rsa.statistics import Interval
from zaya_convert.runtime.engine import Engine
from zaya_convert.runtime.generate import Sampling
from zaya_convert.runtime.tokenizer import Tokenizer

_TOKENS = 16384  # of traces are enough
_HEAD_ROWS = 256


@dataclass(frozen=True)
class SampledFigures:
    """KL in nats, estimated from so many sampled tokens."""

    kl: Interval
    tokens: int


def figures(
    reference: Engine[Any],
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    settings: Settings,
    runs: Sequence[Sequence[Round]],
    asked_from: Sequence[Sequence[Round]],
) -> SampledFigures | None:
    """The estimate, None where a server tells too little or does not sample plainly.

    Args:
        asked_from: the runs whose tails were in the prompts: its own, or those it was forced to.
    """
    if settings.sampling != Sampling(1.0, seed=settings.sampling.seed):
        return None
    ids: list[Tensor] = []
    prompts: list[int] = []
    told: list[tuple[float, ...]] = []
    owners: list[int] = []
    tokens = 0
    for rounds, sources in zip(runs, asked_from, strict=True):
        for number, everyone in enumerate(rounds):
            if settings.sampling_of(number) != settings.sampling:
                continue
            for one in chain.from_iterable(everyone):
                answer = one.answer
                if not answer.tokens or answer.logprobs is None or tokens >= _TOKENS:
                    continue
                before = sources[number - 1][one.problem] if number else []
                asked = message_of(problems[one.problem], before, one.sources)
                prompt = prompt_ids(tokenizer, asked)
                ids.append(torch.tensor([*prompt, *answer.tokens]))
                prompts.append(len(prompt))
                told.append(answer.logprobs)
                owners.append(one.problem)
                tokens += answer.new_tokens
    if not ids:
        return None
    hidden = reference.evaluate(ids).hidden
    sums, counts = np.zeros(len(problems)), np.zeros(len(problems))
    for sequence, rows, prompt, theirs, owner in zip(
        ids, hidden, prompts, told, owners, strict=True
    ):
        ours = _logprobs(reference, rows[prompt - 1 : -1], sequence[prompt:])
        log_r = ours - torch.tensor(theirs, dtype=torch.float64)
        sums[owner] += float((log_r.expm1() - log_r).sum())
        counts[owner] += len(theirs)
    there = counts > 0
    return SampledFigures(statistics.mean(sums[there], counts[there]), int(counts.sum()))


def _logprobs(reference: Engine[Any], hidden: Tensor, targets: Tensor) -> Tensor:
    """log p of each target [n], float64."""
    parts = [
        torch.log_softmax(reference.logits(rows).double(), -1).gather(1, ids[:, None])[:, 0]
        for rows, ids in zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True)
    ]
    return torch.cat(parts)
