"""The RSA parity test: does a candidate reason under Markovian RSA as its reference does?

Both run the same problems with the same draws of tails and the same sampling noise, so that what
differs is the candidate's doing. Accuracy is nearly blind to damage (a few problems decide it), so
the candidate also reads the reference's own traces, token by token, and its divergence there is
held against that of a yardstick: the reference itself, rounded to three bits without care.

Two questions are kept apart, because their answers lie in different places: whether the *engine*
computes what our runtime computes on the candidate's weights, and whether these *weights* are
still the reference's model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.rsa import evidence, forced, judgement, pairs, records, sampled, texts, yardstick
from zaya_convert.rsa.evidence import EngineFigures
from zaya_convert.rsa.forced import Places, Reading, Trace
from zaya_convert.rsa.generator import Generator
from zaya_convert.rsa.local import LocalGenerator, prompt_ids
from zaya_convert.rsa.loop import Round, message_of, run
from zaya_convert.rsa.pairs import Runs
from zaya_convert.rsa.problems import Problem, digest_of
from zaya_convert.rsa.results import ParityReport, WeightFigures
from zaya_convert.rsa.settings import Settings
from zaya_convert.rsa.sides import Arithmetic, Side
from zaya_convert.rsa.tails import TailCutter
from zaya_convert.rsa.texts import TextFigures
from zaya_convert.rsa.verdict import Bounds
from zaya_convert.runtime.engine import Engine
from zaya_convert.runtime.model import Evaluation
from zaya_convert.runtime.tokenizer import Tokenizer
from zaya_convert.validate import TensorError, compare_weights

# (what, done, of)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        seeds: one run of each model for each.
        forced: the candidate aggregates the reference's tails, not its own.
        trace_tokens: of teacher-forced traces, at least; fewer when the runs have fewer.
        yardstick_bits: of the yardstick.
        runs: a folder where the runs are kept and taken up again, or None.
    """

    problems: Sequence[Problem]
    settings: Settings
    seeds: Sequence[int] = (0,)
    forced: bool = False
    trace_tokens: int = 4096
    yardstick_bits: int = yardstick.BITS
    bounds: Bounds = field(default_factory=Bounds)
    runs: Path | None = None


def parity(
    reference: Side,
    candidate: Side,
    plan: Plan,
    progress: Progress = lambda what, done, of: None,
) -> ParityReport:
    """Run the test.

    Args:
        reference: must have a checkpoint.

    Raises:
        InputError: models of different shapes, weights that are not finite, prompts that do not
            fit the context, a damaged file of runs.
    """
    source = reference.checkpoint
    assert source is not None
    cutter = TailCutter(Tokenizer.of(source))
    # first, because models that cannot be compared are found out here
    errors = _errors(source, candidate.checkpoint, progress)
    ours, _ = _runs(reference, plan, cutter, progress)
    leader = (reference, ours) if plan.forced else None
    theirs, generator = _runs(candidate, plan, cutter, progress, leader)
    traces = select(cutter.tokenizer, plan, ours)
    judge = Arithmetic(reference.arithmetic.dtype).model(source, resident=False)
    skip = source.config.experts
    own = forced.evaluate(judge, traces, _stage(progress, "reference reads its traces"))
    test = _Reader(traces, Places.of(traces), judge, own, skip, progress)
    grids = yardstick.grids(source, errors, plan.yardstick_bits)
    coarse = yardstick.rounded(source, grids)
    measure = test.whole(reference.arithmetic.model(coarse, resident=False), "yardstick")
    runs = Runs(plan.problems, ours, theirs)
    local = isinstance(generator, LocalGenerator)
    report = ParityReport(
        reference=reference.name,
        candidate=candidate.name,
        engine=generator.name,
        arithmetic=str(candidate.arithmetic) if local else "arithmetic of the server",
        problems=len(plan.problems),
        problems_digest=digest_of(plan.problems),
        settings=plan.settings,
        seeds=list(plan.seeds),
        forced=plan.forced,
        rounds=pairs.compare(runs, cutter, forced=plan.forced),
        votes=pairs.votes(runs),
        traces=len(traces),
        trace_tokens=sum(len(trace.ids) for trace in traces),
        generated_tokens=int(test.places.generated.sum()),
        skip_rate_reference=float((own.routes == skip).double().mean()),
        yardstick_bits=plan.yardstick_bits,
        yardstick_matrices=Counter(grids.values()),
        weights=weight_figures(errors, plan.bounds) if candidate.checkpoint else None,
        texts=_texts(cutter.tokenizer, candidate.checkpoint, plan),
        yardstick_figures=evidence.figures(measure, own, test.places, skip),
    )
    if isinstance(generator, LocalGenerator) and candidate.checkpoint is not None:
        reading, engine = test.engine(generator.engine, candidate)
        report = replace(
            report,
            candidate_figures=evidence.figures(reading, own, test.places, skip),
            excess=evidence.excess(reading, measure, own, test.places, skip),
            engine_figures=engine,
        )
    else:
        asked_from = ours if plan.forced else theirs
        told = (cutter.tokenizer, plan.problems, plan.settings, theirs, asked_from)
        report = replace(report, sampled=sampled.figures(judge, *told))
        if candidate.checkpoint is not None:
            weights = Arithmetic().model(candidate.checkpoint, resident=False)
            report = replace(report, sampled_engine=sampled.figures(weights, *told))
    report.checks.extend(judgement.checks(report, plan.bounds))
    report.findings.extend(judgement.findings(report, plan.bounds))
    return report


def select(tokenizer: Tokenizer, plan: Plan, runs: Sequence[Sequence[Round]]) -> list[Trace]:
    """Traces of the reference's runs, until there are enough tokens.

    The first candidate of every problem comes first, in all rounds and seeds, then the second one,
    and so on.
    """
    found: list[Trace] = []
    tokens = 0
    most = max(len(row) for rounds in runs for number in rounds for row in number)
    for index in range(most):
        for problem in range(len(plan.problems)):
            for rounds in runs:
                for number, row in enumerate(everyone[problem] for everyone in rounds):
                    if tokens >= plan.trace_tokens:
                        return found
                    if index < len(row):
                        trace = _trace(tokenizer, plan, rounds, number, problem, index)
                        found.append(trace)
                        tokens += len(trace.ids)
    return found


def _trace(
    tokenizer: Tokenizer, plan: Plan, rounds: Sequence[Round], number: int, problem: int, index: int
) -> Trace:
    one = rounds[number][problem][index]
    before = rounds[number - 1][problem] if number else []
    prompt = prompt_ids(tokenizer, message_of(plan.problems[problem], before, one.sources))
    return Trace(torch.tensor([*prompt, *(one.answer.tokens or ())]), len(prompt), problem, number)


def _runs(
    side: Side,
    plan: Plan,
    cutter: TailCutter,
    progress: Progress,
    leader: tuple[Side, Sequence[Sequence[Round]]] | None = None,
) -> tuple[list[list[Round]], Generator]:
    """All rounds for every seed, and what made them.

    Args:
        leader: whose rounds the prompts come from, instead of the side's own.
    """
    generator = side.open()
    found: list[list[Round]] = []
    reference, forced_by = leader or (None, None)
    for i, seed in enumerate(plan.seeds):
        own = None if forced_by is None else forced_by[i]
        with ExitStack() as stack:
            done: list[Round] = []
            keep: Callable[[Round], None] = lambda made: None  # noqa: E731
            if plan.runs is not None:
                file = stack.enter_context(_file(side, plan, seed, reference))
                done, keep = list(file.rounds), file.append
            found.append(
                run(
                    generator, cutter, plan.problems, plan.settings, seed=seed, done=done,
                    forced=own, keep=keep, progress=_counter(side, plan, seed, progress),
                )
            )  # fmt: skip
    return found, generator


def _file(
    side: Side, plan: Plan, seed: int, reference: Side | None
) -> AbstractContextManager[records.RunFile]:
    """The file of one run, named after all that determines it."""
    assert plan.runs is not None
    forced_by = None if reference is None else reference.identity
    settings = plan.settings.to_dict() | {"forced_by": forced_by}
    problems = digest_of(plan.problems)
    head = records.header(settings, seed=seed, problems=problems, model=side.identity)
    name = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:16]
    return records.open_run(plan.runs / f"seed{seed}-{name}.jsonl", head, resume=True)


def _counter(side: Side, plan: Plan, seed: int, progress: Progress) -> Callable[[int, int], None]:
    """Counts tokens of each round against the most there can be."""
    counts: dict[int, int] = {}

    def count(number: int, tokens: int) -> None:
        counts[number] = counts.get(number, 0) + tokens
        of = len(plan.problems) * plan.settings.size(number) * plan.settings.budget
        progress(f"{side.name}: seed {seed}, round {number} (tokens)", counts[number], of)

    return count


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, of: progress(name, done, of)


@dataclass(frozen=True)
class _Reader:
    """Reads the reference's traces with other engines."""

    traces: list[Trace]
    places: Places
    judge: Engine[Any]
    own: Evaluation
    skip: int
    progress: Progress

    def whole(self, engine: Engine[Any], name: str) -> Reading:
        """An engine over whole sequences."""
        judges = [(self.judge, self.own)]
        blocks = forced.whole(engine, self.traces)
        return forced.compare(judges, blocks, _stage(self.progress, f"{name} reads traces"))[0]

    def engine(self, engine: Engine[Any], side: Side) -> tuple[Reading, EngineFigures]:
        """The candidate as it generates: beside the reference, and beside its own weights."""
        assert side.checkpoint is not None
        exact = Arithmetic().model(side.checkpoint, resident=False)
        weights = exact.evaluate([trace.ids for trace in self.traces])
        judges = [(self.judge, self.own), (exact, weights)]
        stage = _stage(self.progress, "candidate reads traces")
        reading, beside = forced.compare(judges, forced.cached(engine, self.traces), stage)
        # packed weights, which the fast arithmetic needs, are resident ones
        alike = side.arithmetic.noisy().model(side.checkpoint, resident=side.arithmetic.fast)
        noise = forced.compare([(exact, weights)], forced.whole(alike, self.traces))[0]
        found = evidence.engine_figures(beside, weights, noise, self.places, self.skip)
        if found.first_column is not None:
            blocks = forced.whole(engine, self.traces)
            at_once = forced.compare([(exact, weights)], blocks)[0]
            share = evidence.share_beyond(at_once, found.noise_p99)
            found = replace(found, whole_beyond=share)
        return reading, found


def _errors(
    reference: Checkpoint, candidate: Checkpoint | None, progress: Progress
) -> list[TensorError]:
    return [] if candidate is None else compare_weights(reference, candidate, progress)[0]


def _texts(own: Tokenizer, candidate: Checkpoint | None, plan: Plan) -> TextFigures | None:
    if candidate is None or not candidate.has_tokenizer:
        return None
    return texts.compare(own, Tokenizer.of(candidate), plan.problems)


def weight_figures(errors: Sequence[TensorError], bounds: Bounds) -> WeightFigures:
    """What stands out among a candidate's tensors."""

    def far(row: TensorError) -> float:
        return abs(row.gain - 1)

    strangers = [r for r in errors if r.sqnr_db < bounds.min_sqnr_db or far(r) > bounds.max_gain]
    return WeightFigures(
        worst=min(errors, key=lambda row: row.sqnr_db),
        worst_float=min((r for r in errors if r.role == "float"), key=lambda row: row.sqnr_db),
        furthest=max(errors, key=far),
        strangers=sorted(strangers, key=lambda row: (row.layer, row.expert)),
    )
