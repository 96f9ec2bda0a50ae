"""From figures to checks, and from failed checks to what they point at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from zaya_convert.rsa.results import ParityReport
from zaya_convert.rsa.statistics import Interval
from zaya_convert.rsa.verdict import FAIL, UNDECIDED, Bounds, Check, at_least, at_most, enough

if TYPE_CHECKING:
    from zaya_convert.validate import TensorError

_STANDS_OUT = 5  # times all other tokens
_FLOAT_DB = 40.0  # which 8 bits keep
_SHOWN = 6


def checks(report: ParityReport, bounds: Bounds) -> list[Check]:
    """Every bound, in the order of the report: evidence, texts, engine, weights, divergence,
    answers."""
    return [
        enough("evidence (problems)", report.problems, bounds.min_problems),
        _tokens(report, bounds),
        *_texts(report),
        *_engine(report, bounds),
        *_weights(report, bounds),
        *_divergence(report, bounds),
        *_answers(report, bounds),
    ]


def findings(report: ParityReport, bounds: Bounds) -> list[str]:
    """What the figures point at, most specific first.

    When all passed only what limits the verdict: other prompts, or a reference without answers.
    """
    found = list(_notes(report))
    if any(check.outcome == FAIL for check in report.checks):
        found += _findings(report, bounds)
    return found


def _tokens(report: ParityReport, bounds: Bounds) -> Check:
    if report.sampled is not None:
        return enough("evidence (sampled tokens)", report.sampled.tokens, bounds.min_tokens)
    return enough("evidence (teacher-forced tokens)", report.generated_tokens, bounds.min_tokens)


def _texts(report: ParityReport) -> Iterator[Check]:
    if report.texts is not None:
        name = "tokenizer, chat template and stop tokens are the reference's (differences)"
        yield at_most(name, report.texts.differences, 0)


def _engine(report: ParityReport, bounds: Bounds) -> Iterator[Check]:
    found = report.engine_figures
    if found is not None:
        name = "engine against our runtime on the same weights (share of tokens beyond rounding)"
        yield at_most(name, found.beyond, bounds.max_beyond)


def _weights(report: ParityReport, bounds: Bounds) -> Iterator[Check]:
    if report.weights is not None:
        name = "every tensor is the reference's (worst SQNR, dB)"
        yield at_least(name, report.weights.worst.sqnr_db, bounds.min_sqnr_db)
        name = "every row of it is the reference's (furthest gain from 1)"
        yield at_most(name, abs(report.weights.furthest.gain - 1), bounds.max_gain)


def _divergence(report: ParityReport, bounds: Bounds) -> Iterator[Check]:
    found, measure, excess = report.candidate_figures, report.yardstick_figures, report.excess
    bits, slack = f"{report.yardstick_bits} bits", bounds.router_slack
    if report.sampled is not None and measure is not None:
        limit = measure.kl_mean if bounds.max_kl is None else bounds.max_kl
        yield at_most("KL divergence of sampled tokens, mean", report.sampled.kl, limit)
        if report.sampled_engine is not None:
            name = "the same against our runtime on the same weights"
            yield at_most(name, report.sampled_engine.kl, limit)
    if found is None or excess is None:
        return
    if bounds.max_kl is not None:
        yield at_most("KL divergence, mean", found.kl_mean, bounds.max_kl)
    else:
        yield at_most(f"KL divergence, mean, beyond that of {bits}", excess.kl, 0)
    if bounds.max_kl_p99 is not None:
        yield at_most("KL divergence, 99th percentile", found.kl_p99, bounds.max_kl_p99)
    else:
        name = f"tokens beyond the 99th percentile of {bits}, beyond 1 %"
        yield at_most(name, excess.beyond, 0)
    if excess.skipped is not None:
        name = f"KL divergence on tokens that take the skip expert, beyond that of {bits}"
        yield at_most(name, excess.skipped, 0)
    if bounds.min_top1 is not None:
        yield at_least("top-1 agreement", found.top1_agreement, bounds.min_top1)
    else:
        yield at_most(f"other best tokens than the reference, beyond {bits}", excess.top1, 0)
    if bounds.min_router is not None:
        yield at_least("router agreement", found.router_agreement, bounds.min_router)
    else:
        yield at_most(f"other experts than the reference, beyond {bits}", excess.router, slack)
        name = f"the same in the worst layer ({excess.router_worst_layer})"
        worst = at_most(name, excess.router_worst, 2 * slack)
        # the worst of many layers is bound to come near the limit: only a sure excess counts
        yield replace(worst, outcome="pass") if worst.outcome == UNDECIDED else worst


def _answers(report: ParityReport, bounds: Bounds) -> Iterator[Check]:
    last = report.rounds[-1]
    # enough tokens that are all the same need no answers to be judged by
    generated = sum(row.tokens_reference for row in report.rounds)
    same = generated >= bounds.min_tokens and all(r.identical_traces == 1 for r in report.rounds)
    answered = last.answered_reference > 0
    right = last.accuracy_reference is not None and last.accuracy_reference.value > 0
    # what the reference never does cannot get worse, and where tokens were judged that suffices
    told = report.candidate_figures is not None or report.sampled is not None
    unknown = Interval(float("nan"), float("-inf"), float("inf"))
    if last.difference is not None and (right or not told):
        found = last.difference if same or right else unknown
        yield at_least("accuracy in the last round, candidate - reference", found, -bounds.margin)
    if last.beyond_self is not None and (answered or not told):
        found = last.beyond_self if same or answered else unknown
        name = "agreement of answers, beyond that of the reference's own rollouts"
        yield at_least(name, found, -bounds.margin)


def _findings(report: ParityReport, bounds: Bounds) -> Iterator[str]:
    yield from _engine_findings(report, bounds)
    yield from _weight_findings(report)
    found, measure = report.candidate_figures, report.yardstick_figures
    if found is not None and measure is not None:
        worst = min(
            range(len(found.router_agreement_by_layer)),
            key=lambda i: found.router_agreement_by_layer[i] - measure.router_agreement_by_layer[i],
        )
        ours, theirs = (f.router_agreement_by_layer[worst] for f in (found, measure))
        if ours < theirs - bounds.router_slack:
            yield (
                f"routing: layer {worst} sends {1 - ours:.1%} of the tokens elsewhere, "
                f"{report.yardstick_bits} bits would {1 - theirs:.1%}"
            )
        elif found.kl_mean > 0 and (
            report.engine_figures is None or report.engine_figures.beyond.low <= bounds.max_beyond
        ):
            yield (
                "routing holds in every layer, so it is not the routers: experts, attention or head"
            )
        top = [row for row in found.concentrated if row.times_others >= _STANDS_OUT]
        if top:
            places = "; ".join(
                f"layer {row.layer}, {'skip expert' if row.expert < 0 else f'expert {row.expert}'} "
                f"({row.times_others:.0f} times the others)"
                for row in top
            )
            yield f"divergence is concentrated on tokens of {places}"
    yield from _trace_findings(report)


def _notes(report: ParityReport) -> Iterator[str]:
    other, texts = report.rounds[0].other_prompts, report.texts
    if texts is not None and texts.tokens:
        examples = ", ".join(map(repr, texts.examples))
        yield f"tokenizer: {texts.tokens} tokens have another number or are missing: {examples}"
    if texts is not None and texts.prompts:
        yield (
            f"prompts: {texts.prompts} of {report.problems} problems make another prompt by the "
            "candidate's tokenizer and chat template"
        )
    if texts is not None and texts.stops_reference != texts.stops_candidate:
        yield (
            f"stop tokens: the reference ends at {texts.stops_reference}, the candidate at "
            f"{texts.stops_candidate}"
        )
    if not report.rounds[-1].answered_reference:
        yield "answers: the reference gives none in the last round, so only tokens were judged"
    if other:
        yield (
            f"prompts: {other:.1%} of round 0 have another number of tokens than the reference's, "
            "so the chat template or the tokenizer is another one"
        )


def _engine_findings(report: ParityReport, bounds: Bounds) -> Iterator[str]:
    found = report.engine_figures
    if found is None or found.beyond.value <= bounds.max_beyond:
        return
    layer = (
        ""
        if found.first_layer is None
        else f", seen first by the router of layer {found.first_layer}"
    )
    yield (
        f"engine: {found.beyond.value:.1%} of the tokens differ from our runtime on the same "
        f"weights, from position {found.first_column} on{layer}"
    )
    if found.whole_beyond is not None and found.whole_beyond <= bounds.max_beyond:
        yield (
            "engine: whole sequences come out right, so states are lost or wrong between blocks "
            "(keys and values, convolution, delayed values)"
        )
    skipped, others = found.kl_skipped, found.kl_not_skipped
    if skipped is not None and others is not None and skipped > _STANDS_OUT * others:
        yield (
            f"engine: tokens that take the skip expert differ most (KL {skipped:.2g}, the others "
            f"{others:.2g})"
        )


def _weight_findings(report: ParityReport) -> Iterator[str]:
    found = report.weights
    if found is None:
        return
    layers: dict[int, dict[str, TensorError]] = {}
    for row in found.strangers:
        named = layers.setdefault(row.layer, {})
        named[_named(row)] = min(row, named.get(_named(row), row), key=lambda r: r.sqnr_db)
    for layer, rows in list(layers.items())[:_SHOWN]:
        names = [
            f"{name} ({row.sqnr_db:.1f} dB, gain {row.gain:.2f})"
            for name, row in list(rows.items())[:_SHOWN]
        ]
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        where = f"layer {layer} has" if layer >= 0 else "there are"
        yield f"weights: {where} tensors of another model: {', '.join(names)}{more}"
    if found.strangers:
        return
    if found.worst_float.sqnr_db < _FLOAT_DB:
        yield (
            f"weights: {found.worst_float.name}, which quantizers leave alone, differs "
            f"({found.worst_float.sqnr_db:.1f} dB)"
        )
    coarsest = f"; the coarsest is {found.worst.name} ({found.worst.sqnr_db:.1f} dB)"
    yield (
        "weights: all but embedding and head, which were not looked at, are the reference's"
        + ("" if math.isinf(found.worst.sqnr_db) else coarsest)
    )


def _named(row: TensorError) -> str:
    """A tensor within its layer, all of an expert as one."""
    if row.expert >= 0:
        return f"expert {row.expert}"
    return row.name.removeprefix(f"model.layers.{row.layer}.")


def _trace_findings(report: ParityReport) -> Iterator[str]:
    first = sorted(report.rounds[0].first_divergence)
    if first:
        yield (
            f"rollouts: {1 - report.rounds[0].identical_traces:.1%} of round 0 leave the "
            f"reference's, half of them by token {first[len(first) // 2]}"
        )
