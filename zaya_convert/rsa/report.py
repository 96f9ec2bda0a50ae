"""A ``ParityReport`` as text, JSON, JUnit XML or one self-contained HTML page."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zaya_convert import junit
from zaya_convert.junit import Case
from zaya_convert.rsa import plots
from zaya_convert.rsa.statistics import Interval
from zaya_convert.rsa.verdict import FAIL, PASS

if TYPE_CHECKING:
    from zaya_convert.rsa.results import ParityReport


def to_json(report: ParityReport) -> dict[str, Any]:
    """All figures, the main ones at the top."""
    last, found = report.rounds[-1], report.candidate_figures
    first = [position for row in report.rounds for position in row.first_divergence]
    return {
        "verdict": report.verdict,
        "rounds": [asdict(row) for row in report.rounds],
        "answer_agreement": last.agreement.value,
        "accuracy_difference": None if last.difference is None else asdict(last.difference),
        "mcnemar_p": None if report.votes is None else report.votes.mcnemar_p,
        "kl_mean": None if found is None else found.kl_mean,
        "kl_p99": None if found is None else found.kl_p99,
        "top1_agreement": None if found is None else found.top1_agreement,
        "router_agreement": None if found is None else found.router_agreement,
        "skip_rate": None if found is None else found.skip_rate,
        "first_divergence": {
            "rollouts": len(first),
            "median": statistics.median_low(first) if first else None,
            "earliest": min(first, default=None),
        },
        "tokens": report.tokens,
        **{
            name: value
            for name, value in asdict(report).items()
            if name not in ("rounds", "settings")
        },
        "settings": report.settings.to_dict(),
    }


def figures(report: ParityReport) -> list[tuple[str, str]]:
    """The main figures as (name, value) for people."""
    settings, last = report.settings, report.rounds[-1]
    rows = [
        ("candidate", f"{report.candidate}, run by {report.engine} ({report.arithmetic})"),
        ("reference", report.reference),
        ("evidence", f"{report.problems} problems, seeds {', '.join(map(str, report.seeds))}; "
         f"{report.tokens:,} tokens generated, {report.trace_tokens:,} of {report.traces} traces "
         "teacher-forced"),
        ("settings", f"N={settings.candidates} C={settings.tails} T={settings.rounds} "
         f"β={settings.budget} τ={settings.tail}, "
         f"prompts from {'the reference' if report.forced else 'its own'} tails"),
    ]  # fmt: skip
    if report.votes is not None:
        votes = report.votes
        rows.append(
            ("majority votes", f"{votes.reference:.3f} -> {votes.candidate:.3f} of {votes.pairs}; "
             f"only one right: {votes.only_reference} and {votes.only_candidate}, "
             f"McNemar p = {votes.mcnemar_p:.3g}")
        )  # fmt: skip
    if last.self_agreement is not None:
        rows.append(
            ("answers agree", f"{last.agreement} in the last round; two rollouts of the reference: "
             f"{last.self_agreement:.3f}")
        )  # fmt: skip
    found, measure = report.candidate_figures, report.yardstick_figures
    bits = report.yardstick_bits
    if found is not None and measure is not None:
        layers = found.router_agreement_by_layer
        rows += [
            ("KL divergence (nats)", f"mean {found.kl_mean:.3g}, p99 {found.kl_p99:.3g} "
             f"({bits} bits: {measure.kl_mean:.3g}, {measure.kl_p99:.3g})"),
            ("top-1 agreement", f"{found.top1_agreement:.2%} ({bits} bits: "
             f"{measure.top1_agreement:.2%})"),
            ("router agreement", f"{found.router_agreement:.2%}, by layer "
             f"{_shares(layers)} ({bits} bits: {_shares(measure.router_agreement_by_layer)})"),
            ("skip rate", f"{report.skip_rate_reference:.2%} -> {found.skip_rate:.2%}"),
        ]  # fmt: skip
    if report.engine_figures is not None:
        engine = report.engine_figures
        rows.append(
            ("engine", f"KL {engine.kl_mean:.3g} against our runtime on the same weights, rounding "
             f"explains {engine.noise_p99:.3g} (p99)")
        )  # fmt: skip
    if report.sampled is not None:
        same = report.sampled_engine
        rows.append(
            ("KL of sampled tokens", f"{report.sampled.kl.value:.3g} over "
             f"{report.sampled.tokens:,} tokens"
             + ("" if same is None else f"; {same.kl.value:.3g} against our runtime on the same "
                "weights"))
        )  # fmt: skip
    return rows


def round_rows(report: ParityReport) -> list[tuple[str, ...]]:
    """One row of texts a round, for tables; the first is the header."""
    header = ("round", "reference", "candidate", "difference", "answers agree", "same traces",
              "same tails", "parts at", "longest prompt", "tokens")  # fmt: skip
    rows = [
        (
            str(row.round),
            _interval(row.accuracy_reference),
            _interval(row.accuracy_candidate),
            _interval(row.difference, sign="+"),
            f"{row.agreement.value:.3f}",
            f"{row.identical_traces:.3f}",
            f"{row.identical_tails:.3f}",
            str(statistics.median_low(row.first_divergence)) if row.first_divergence else "-",
            str(row.longest_prompt),
            f"{row.tokens_reference:,} + {row.tokens_candidate:,}",
        )
        for row in report.rounds
    ]
    return [header, *rows]


def to_text(report: ParityReport, *, color: bool = False) -> str:
    """Tables for the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="RSA parity", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in figures(report):
        table.add_row(name, value)
    header, *rows = round_rows(report)
    rounds = Table()
    for name in header[:8]:
        rounds.add_column(name)
    for row in rows:
        rounds.add_row(*row[:8])
    out = io.StringIO()
    console = Console(
        file=out, width=110, force_terminal=color, no_color=not color,
        markup=False, emoji=False, highlight=False,
    )  # fmt: skip
    console.print(table)
    console.print(rounds)
    for check in report.checks:
        console.print(check.line(), soft_wrap=True)
    for finding in report.findings:
        console.print(f"-> {finding}", soft_wrap=True)
    style = {PASS: "bold green", FAIL: "bold red"}.get(report.verdict, "bold yellow")
    console.print(f"verdict: {report.verdict}", style=style)
    return out.getvalue()


def to_junit(report: ParityReport) -> str:
    """JUnit XML: one test case per check; what is undecided is skipped."""
    cases = [Case(check.name, check.outcome, check.line()) for check in report.checks]
    return junit.to_junit("rsa-parity", figures(report), cases, "\n".join(report.findings))


def to_html(report: ParityReport) -> str:
    """A page without scripts or outside resources: figures, rounds, plots, checks, findings."""
    from jinja2 import Environment

    return Environment(autoescape=True).from_string(_PAGE).render(section=section(report))


def section(report: ParityReport) -> Any:
    """The body of that page, to stand in another page too."""
    from jinja2 import Environment
    from markupsafe import Markup

    header, *rows = round_rows(report)
    text = Environment(autoescape=True).from_string(_SECTION).render(
        report=report,
        figures=figures(report),
        header=header,
        rows=rows,
        plots=[
            Markup(plot)
            for plot in (plots.accuracy(report.rounds), plots.divergence(report.rounds))
            if plot
        ],
        checks=[(check.outcome, check.line()) for check in report.checks],
    )  # fmt: skip
    return Markup(text)


def _interval(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return "-"
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _shares(values: Sequence[float]) -> str:
    """All of a few shares; of many the lowest."""
    if len(values) <= 8:
        return " ".join(f"{value:.1%}" for value in values)
    return f"at least {min(values):.1%} (layer {list(values).index(min(values))})"


_SECTION = """
<h1>RSA parity: <span class="{{ report.verdict }}">{{ report.verdict }}</span></h1>
{% if report.findings %}<ul>{% for line in report.findings %}<li class="fail">{{ line }}
{% endfor %}</ul>{% endif %}
<table>{% for name, value in figures %}<tr><th>{{ name }}<td>{{ value }}{% endfor %}</table>
<table><tr>{% for name in header %}<th>{{ name }}{% endfor %}
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}{% endfor %}
{% endfor %}</table>
<p>{% for plot in plots %}{{ plot }} {% endfor %}
<h2>Checks of Markovian RSA</h2>
<ul>{% for outcome, line in checks %}<li class="{{ outcome }}">{{ line }}
{% endfor %}</ul>
<p>Problems digest {{ report.problems_digest }}</p>
"""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>zaya-convert: RSA parity</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .6em; text-align: left }
.fail { color: #b00 } .undecided, .inconclusive { color: #a60 }
</style>
{{ section }}
</html>
"""
