"""Two runs side by side: the same problems, draws and noise, two models.

A *pair* is the same rollout (seed, problem, round, candidate) of both models. Everything is summed
up by problem over all seeds, because problems are what is drawn from a population.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from zaya_convert.rsa import statistics
from zaya_convert.rsa.answers import same, vote
from zaya_convert.rsa.generator import Answer
from zaya_convert.rsa.loop import Candidate, Round
from zaya_convert.rsa.problems import Problem
from zaya_convert.rsa.statistics import Interval
from zaya_convert.rsa.tails import TailCutter


@dataclass(frozen=True)
class RoundPair:
    """One round of both models over all seeds.

    Attributes:
        accuracy_reference, accuracy_candidate: mean correctness of all candidates; None when no
            answers are known.
        difference: candidate minus reference, paired by problem.
        agreement: share of pairs that give the same answer; none at all is no agreement.
        self_agreement: the same between any two different rollouts of the reference: what is left
            when everything but the model changes. None with one candidate.
        beyond_self: agreement minus self_agreement.
        answered_reference, answered_candidate: share of candidates that give an answer.
        identical_traces: share of pairs with the same tokens.
        identical_tails: share of pairs with the same tail.
        identical_prompts: share of pairs that were asked the same.
        other_prompts: share of those whose prompts have different numbers of tokens all the same,
            so that the two models' tokenizers or chat templates differ.
        first_divergence: of pairs with the same prompt but different tokens, the first position
            where they differ.
        tokens_reference, tokens_candidate: generated.
        longest_prompt: tokens of the longest prompt of both.
    """

    round: int
    accuracy_reference: Interval | None
    accuracy_candidate: Interval | None
    difference: Interval | None
    agreement: Interval
    self_agreement: float | None
    beyond_self: Interval | None
    answered_reference: float
    answered_candidate: float
    identical_traces: float
    identical_tails: float
    identical_prompts: float
    other_prompts: float
    first_divergence: list[int]
    tokens_reference: int
    tokens_candidate: int
    longest_prompt: int


@dataclass(frozen=True)
class Votes:
    """Majority votes of the last round, one of each model for every problem and seed.

    Attributes:
        reference, candidate: share of right votes.
        mcnemar_p: exact, over (problem, seed) pairs of votes.
        only_reference, only_candidate: pairs that one of the two gets right.
        pairs: how many there are.
    """

    reference: float
    candidate: float
    mcnemar_p: float
    only_reference: int
    only_candidate: int
    pairs: int


@dataclass(frozen=True)
class Runs:
    """The rounds of both models, by seed."""

    problems: Sequence[Problem]
    reference: Sequence[Sequence[Round]]
    candidate: Sequence[Sequence[Round]]

    def pairs(self, round: int, problem: int) -> list[tuple[Candidate, Candidate]]:
        """All pairs of one problem in one round."""
        return [
            pair
            for ours, theirs in zip(self.reference, self.candidate, strict=True)
            for pair in zip(ours[round][problem], theirs[round][problem], strict=True)
        ]

    def same_prompt(self, seed: int, one: Candidate, other: Candidate) -> bool:
        """Whether a pair was asked the same, given that both aggregate their own populations."""
        if one.round == 0:
            return True
        tails = [
            [rounds[one.round - 1][one.problem][source].tail for source in candidate.sources]
            for rounds, candidate in ((self.reference[seed], one), (self.candidate[seed], other))
        ]
        return tails[0] == tails[1]


def compare(runs: Runs, cutter: TailCutter, *, forced: bool) -> list[RoundPair]:
    """Every round.

    Args:
        forced: the candidate was given the reference's populations, so all prompts are the same.
    """
    return [_round(runs, cutter, number, forced) for number in range(len(runs.reference[0]))]


def votes(runs: Runs) -> Votes | None:
    """The last round's votes; None when no answers are known."""
    known = [i for i, problem in enumerate(runs.problems) if problem.answer is not None]
    if not known:
        return None
    right = np.array(
        [
            [_vote_is_right(rounds[-1][i], runs.problems[i]) for i in known]
            for side in (runs.reference, runs.candidate)
            for rounds in side
        ]
    ).reshape(2, -1)
    first, second = right
    return Votes(
        float(first.mean()), float(second.mean()), statistics.mcnemar(first, second),
        int((first & ~second).sum()), int((~first & second).sum()), len(first),
    )  # fmt: skip


def divergence(cutter: TailCutter, one: Answer, other: Answer) -> int | None:
    """The first position where two rollouts differ, None when nowhere."""
    a, b = cutter.ids(one), cutter.ids(other)
    for position, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return position
    return None if len(a) == len(b) and one.finished == other.finished else min(len(a), len(b))


def _round(runs: Runs, cutter: TailCutter, number: int, forced: bool) -> RoundPair:
    rows = [_Problem.of(runs, cutter, number, i, forced) for i in range(len(runs.problems))]

    def column(name: str) -> statistics.Values:
        return np.array([getattr(row, name) for row in rows], dtype=np.float64)

    counts = column("pairs")
    total = counts.sum()
    known = np.array([problem.answer is not None for problem in runs.problems])
    accuracies: list[Interval | None] = [None, None, None]
    if known.any():
        right, theirs = column("right")[known], column("right_candidate")[known]
        accuracies = [
            statistics.share(right, counts[known]),
            statistics.share(theirs, counts[known]),
            statistics.mean(theirs - right, counts[known]),
        ]
    agree, within, of = column("agree"), column("within"), column("within_pairs")
    beyond = None
    if of.sum():
        beyond = statistics.bootstrap(
            [agree, counts, within, of], lambda a, n, w, m: a / n - w / m
        )  # fmt: skip
    return RoundPair(
        round=number,
        accuracy_reference=accuracies[0],
        accuracy_candidate=accuracies[1],
        difference=accuracies[2],
        agreement=statistics.share(agree, counts),
        self_agreement=float(within.sum() / of.sum()) if of.sum() else None,
        beyond_self=beyond,
        answered_reference=float(column("answered").sum() / total),
        answered_candidate=float(column("answered_candidate").sum() / total),
        identical_traces=float(column("traces").sum() / total),
        identical_tails=float(column("tails").sum() / total),
        identical_prompts=float(column("prompts").sum() / total),
        other_prompts=float(column("other_prompts").sum() / max(column("prompts").sum(), 1)),
        first_divergence=[position for row in rows for position in row.first],
        tokens_reference=int(column("tokens").sum()),
        tokens_candidate=int(column("tokens_candidate").sum()),
        longest_prompt=int(column("longest").max()),
    )


@dataclass(frozen=True)
class _Problem:
    """Sums over the pairs of one problem in one round."""

    pairs: int
    right: int
    right_candidate: int
    answered: int
    answered_candidate: int
    agree: int
    within: int
    within_pairs: int
    traces: int
    tails: int
    prompts: int
    other_prompts: int
    tokens: int
    tokens_candidate: int
    longest: int
    first: list[int]

    @classmethod
    def of(cls, runs: Runs, cutter: TailCutter, number: int, index: int, forced: bool) -> _Problem:
        """Sum up."""
        pairs = runs.pairs(number, index)
        size = len(pairs) // len(runs.reference)
        answer = runs.problems[index].answer
        first = [divergence(cutter, a.answer, b.answer) for a, b in pairs]
        asked = [forced or runs.same_prompt(i // size, a, b) for i, (a, b) in enumerate(pairs)]
        within = [
            same(one.boxed, other.boxed)
            for rounds in runs.reference
            for i, one in enumerate(rounds[number][index])
            for other in rounds[number][index][:i]
        ]
        return cls(
            pairs=len(pairs),
            right=sum(same(a.boxed, answer) for a, _ in pairs),
            right_candidate=sum(same(b.boxed, answer) for _, b in pairs),
            answered=sum(a.boxed is not None for a, _ in pairs),
            answered_candidate=sum(b.boxed is not None for _, b in pairs),
            agree=sum(same(a.boxed, b.boxed) for a, b in pairs),
            within=sum(within),
            within_pairs=len(within),
            traces=sum(position is None for position in first),
            tails=sum(a.tail == b.tail for a, b in pairs),
            prompts=sum(asked),
            other_prompts=sum(
                alike and a.answer.prompt_tokens != b.answer.prompt_tokens
                for (a, b), alike in zip(pairs, asked, strict=True)
            ),
            tokens=sum(a.answer.new_tokens for a, _ in pairs),
            tokens_candidate=sum(b.answer.new_tokens for _, b in pairs),
            longest=max(max(a.answer.prompt_tokens, b.answer.prompt_tokens) for a, b in pairs),
            first=[p for p, alike in zip(first, asked, strict=True) if p is not None and alike],
        )


def _vote_is_right(population: Sequence[Candidate], problem: Problem) -> bool:
    answers = [candidate.boxed for candidate in population]
    chosen = vote(answers)
    return chosen is not None and same(answers[chosen], problem.answer)
