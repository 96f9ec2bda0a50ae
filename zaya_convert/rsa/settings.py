"""``Settings`` of Markovian RSA, and the named ones: the technical report's and its proxy's.

Symbols as in the ZAYA1-8B report (arXiv 2605.05365, section VI-A): N candidates, C tails in an
aggregation prompt, T aggregation rounds after round 0, β tokens of budget for each rollout, τ
tokens of tail.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from zaya_convert.errors import UsageError
from zaya_convert.runtime.generate import Sampling

REASONING, ANSWER = "reasoning", "answer"
MEAN, MAJORITY = "mean", "majority"
_K = 1024


@dataclass(frozen=True)
class Settings:
    """What determines a run, besides the model, the problems and the seed.

    Attributes:
        candidates: N, rollouts of a problem in every round.
        tails: C, tails in an aggregation prompt, drawn without replacement from the round before.
            With one, every candidate goes on from its own tail.
        rounds: T, aggregation rounds after round 0; 0 is parallel sampling.
        budget: β, most new tokens of a rollout.
        tail: τ, most tokens of a tail, counted with the model's tokenizer.
        sampling: of rollouts; its seed is not used.
        carry: "reasoning": tails come from the reasoning alone; "answer": the answer behind it is
            carried too (the hybrid with PaCoRe), within the same τ.
        select: "mean" keeps all final candidates; "majority" votes, ties go to the earliest.
        final_candidates: rollouts of the last round, where they are not N; 0: they are.
        final_sampling: of the last round, where it is another.
    """

    candidates: int = 16
    tails: int = 4
    rounds: int = 2
    budget: int = 16 * _K
    tail: int = 4 * _K
    sampling: Sampling = field(default_factory=lambda: Sampling(1.0))
    carry: str = REASONING
    select: str = MEAN
    final_candidates: int = 0
    final_sampling: Sampling | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value}, expected {least} or more"
            for name, value, least in (
                ("candidates", self.candidates, 1), ("tails", self.tails, 1),
                ("rounds", self.rounds, 0), ("budget", self.budget, 1), ("tail", self.tail, 1),
                ("final candidates", self.final_candidates, 0),
            )
            if value < least
        ]  # fmt: skip
        if self.rounds and self.tails > self.candidates:
            problems.append(f"{self.tails} tails cannot be drawn from {self.candidates} candidates")
        if self.tail > self.budget:
            problems.append(f"a tail of {self.tail} tokens is more than the budget {self.budget}")
        if self.carry not in (REASONING, ANSWER):
            problems.append(f"carry is {self.carry!r}, expected {REASONING} or {ANSWER}")
        if self.select not in (MEAN, MAJORITY):
            problems.append(f"select is {self.select!r}, expected {MEAN} or {MAJORITY}")
        if problems:
            raise UsageError("; ".join(problems))

    def size(self, round: int) -> int:
        """How many candidates a round has."""
        last = round == self.rounds and round > 0
        return self.final_candidates if last and self.final_candidates else self.candidates

    def sampling_of(self, round: int) -> Sampling:
        """How a round samples."""
        last = round == self.rounds and round > 0
        return self.final_sampling if last and self.final_sampling else self.sampling

    def to_dict(self) -> dict[str, Any]:
        """As JSON; without seeds, which are the run's."""
        facts = asdict(self)
        for name in ("sampling", "final_sampling"):
            if facts[name] is not None:
                del facts[name]["seed"]
        return facts


# The report's tables: headline, deployment, light, APEX, and two ways to do without aggregation.
# "proxy" is what Zyphra's server does unless told otherwise: the last round is one rollout.
# "tiny" is what the bundled checkpoint is evaluated with.
PRESETS: dict[str, Settings] = {
    "report": Settings(budget=40 * _K),
    "deployment": Settings(),
    "light": Settings(candidates=8, budget=8 * _K),
    "apex": Settings(candidates=32, rounds=8, budget=32 * _K),
    "markovian": Settings(tails=1, rounds=4, budget=8 * _K),
    "single": Settings(1, 1, 0, 40 * _K, sampling=Sampling(1.0, 0.95)),
    "single-code": Settings(1, 1, 0, 40 * _K, sampling=Sampling(0.6, 0.95, 20)),
    "proxy": Settings(
        32, 4, 8, 32 * _K, final_candidates=1, final_sampling=Sampling(0.6, 0.95, 40)
    ),
    "tiny": Settings(candidates=8, budget=96, tail=40),
}
