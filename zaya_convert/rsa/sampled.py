"""What a server's own log-probabilities say, where it tells them.

A server does not read traces for us. But it samples each token from its distribution q and tells
log q. With p the reference's probability of that token and r = p / q, the mean of r - 1 - log r is
KL(candidate ‖ reference): E[r] is 1, and E[-log r] the divergence. No term is negative, so a few
thousand tokens suffice. It is the divergence the other way round, on the candidate's own traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zaya_convert.rsa import statistics
from zaya_convert.rsa.local import prompt_ids
from zaya_convert.rsa.loop import Round
from zaya_convert.rsa.problems import Problem
from zaya_convert.rsa.prompts import message_for
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
) -> SampledFigures | None:
    """The estimate, None where a server tells too little or does not sample plainly."""
    if settings.sampling != Sampling(1.0, seed=settings.sampling.seed):
        return None
    ids: list[Tensor] = []
    prompts: list[int] = []
    told: list[tuple[float, ...]] = []
    owners: list[int] = []
    tokens = 0
    for rounds in runs:
        for number, everyone in enumerate(rounds):
            for row in everyone:
                for one in row:
                    answer = one.answer
                    plain = settings.sampling_of(number) == settings.sampling
                    if not answer.tokens or answer.logprobs is None or not plain:
                        continue
                    if tokens >= _TOKENS:
                        continue
                    before = rounds[number - 1][one.problem] if number else []
                    tails = [before[source].tail for source in one.sources]
                    prompt = prompt_ids(tokenizer, message_for(problems[one.problem].text, tails))
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
