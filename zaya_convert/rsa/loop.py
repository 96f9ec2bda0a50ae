"""The loop of Markovian RSA: rounds of candidates, each from tails of the round before.

Everything random is keyed: a rollout's noise by (seed, problem, round, candidate), the draw of its
tails likewise. So a run does not depend on batches or on what ran before it, and two models given
the same seed meet the same draws and the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zaya_convert.rsa.answers import extract_boxed
from zaya_convert.rsa.generator import Answer, Generator, Request, rollout_seed
from zaya_convert.rsa.problems import Problem
from zaya_convert.rsa.prompts import message_for
from zaya_convert.rsa.settings import Settings
from zaya_convert.rsa.tails import TailCutter

_DRAW = 1  # keeps the key of a draw apart from that of the rollout


@dataclass(frozen=True, slots=True)
class Candidate:
    """One rollout of one round.

    Attributes:
        problem: index of its problem.
        round: 0 to T.
        index: which of the round's candidates of this problem.
        seed: of its noise.
        sources: whose tails of the round before were in its prompt, in their order there.
        answer: what was generated.
        tail: what the next round may see of it.
        boxed: the answer it gives, None when it gives none.
    """

    problem: int
    round: int
    index: int
    seed: int
    sources: tuple[int, ...]
    answer: Answer
    tail: str
    boxed: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, one flat object."""
        answer = self.answer
        return {
            "problem": self.problem, "round": self.round, "candidate": self.index,
            "seed": self.seed, "sources": list(self.sources), "boxed": self.boxed,
            "tail": self.tail, "text": answer.text, "finished": answer.finished,
            "prompt_tokens": answer.prompt_tokens, "new_tokens": answer.new_tokens,
            "tokens": answer.tokens and list(answer.tokens),
            "logprobs": answer.logprobs and list(answer.logprobs),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Candidate:
        """The inverse of ``to_dict``."""
        tokens, logprobs = facts["tokens"], facts["logprobs"]
        answer = Answer(
            facts["text"], None if tokens is None else tuple(tokens), facts["prompt_tokens"],
            facts["new_tokens"], facts["finished"], None if logprobs is None else tuple(logprobs),
        )  # fmt: skip
        return cls(
            facts["problem"], facts["round"], facts["candidate"], facts["seed"],
            tuple(facts["sources"]), answer, facts["tail"], facts["boxed"],
        )  # fmt: skip


# The candidates of one round, by problem.
Round = list[list[Candidate]]
# (round, tokens generated since the last call)
Progress = Callable[[int, int], None]


def run(
    generator: Generator,
    cutter: TailCutter,
    problems: Sequence[Problem],
    settings: Settings,
    *,
    seed: int = 0,
    done: Sequence[Round] = (),
    forced: Sequence[Round] | None = None,
    keep: Callable[[Round], None] = lambda found: None,
    progress: Progress = lambda round, tokens: None,
) -> list[Round]:
    """All rounds of all problems.

    Args:
        done: rounds that are made already.
        forced: rounds of another run, whose tails make the prompts instead of the run's own.
        keep: called with each round as it is done.

    Returns:
        T + 1 rounds, those of ``done`` first.
    """
    rounds = list(done)
    while len(rounds) <= settings.rounds:
        number = len(rounds)
        before = (forced or rounds)[number - 1] if number else None
        found = run_round(
            generator, cutter, problems, settings, number, before,
            seed=seed, progress=lambda tokens, number=number: progress(number, tokens),
        )  # fmt: skip
        keep(found)
        rounds.append(found)
    return rounds


def run_round(
    generator: Generator,
    cutter: TailCutter,
    problems: Sequence[Problem],
    settings: Settings,
    number: int,
    before: Round | None,
    *,
    seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Round:
    """One round of all problems, from the round before it (None for round 0)."""
    size = settings.size(number)
    drawn: list[tuple[int, ...]] = []
    requests: list[Request] = []
    for index, problem in enumerate(problems):
        population = before[index] if before is not None else []
        for candidate in range(size):
            sources = draw(settings, len(population), (seed, index, number, candidate))
            message = message_of(problem, population, sources)
            drawn.append(sources)
            requests.append(Request(message, rollout_seed(seed, index, number, candidate)))
    sampling = settings.sampling_of(number)
    answers = generator.generate(
        requests, budget=settings.budget, sampling=sampling, progress=progress
    )
    candidates = [
        Candidate(
            i // size, number, i % size, requests[i].seed, drawn[i], answer,
            cutter.cut(answer, settings.tail, settings.carry), extract_boxed(answer.text),
        )
        for i, answer in enumerate(answers)
    ]  # fmt: skip
    return [candidates[i : i + size] for i in range(0, len(candidates), size)]


def message_of(problem: Problem, before: Sequence[Candidate], sources: Sequence[int]) -> str:
    """What a candidate is asked.

    Args:
        before: the population that its sources are of; looked at only where there are sources.
    """
    return message_for(problem.text, [before[source].tail for source in sources])


def draw(settings: Settings, population: int, key: tuple[int, int, int, int]) -> tuple[int, ...]:
    """Whose tails a candidate sees: C of the population, uniformly and without replacement.

    With one tail a candidate goes on from its own, so that N chains stay N chains.

    Args:
        key: seed, problem, round and candidate.
    """
    if not population:
        return ()
    if settings.tails == 1:
        return (key[3] % population,)
    generator = np.random.default_rng([*key, _DRAW])
    return tuple(generator.choice(population, settings.tails, replace=False).tolist())


def new_tokens(rounds: Sequence[Round]) -> list[int]:
    """Tokens generated in each round; prompts do not count."""
    return [sum(c.answer.new_tokens for row in found for c in row) for found in rounds]
