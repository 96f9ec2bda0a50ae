"""A ``Report`` as text, JSON, JUnit XML or one self-contained HTML page."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from zaya_convert import junit
from zaya_convert.junit import Case

if TYPE_CHECKING:
    from zaya_convert.validate import Report, TensorError

SCHEMA = 1


def to_json(report: Report) -> dict[str, Any]:
    """All figures; infinite SQNR (an unchanged tensor) is null, since JSON has no infinity."""
    data = {"schema": SCHEMA, "verdict": report.verdict, **asdict(report)}
    for row in data["tensors"]:
        row["sqnr_db"] = row["sqnr_db"] if math.isfinite(row["sqnr_db"]) else None
    data["sqnr_db_by_expert"] = [
        {"layer": layer, "expert": expert, "sqnr_db": value if math.isfinite(value) else None}
        for (layer, expert), value in by_expert(report.tensors).items()
    ]
    return data


def by_expert(tensors: list[TensorError]) -> dict[tuple[int, int], float]:
    """The worst SQNR among each expert's matrices, by (layer, expert)."""
    worst: dict[tuple[int, int], float] = defaultdict(lambda: math.inf)
    for row in tensors:
        if row.expert >= 0:
            key = (row.layer, row.expert)
            worst[key] = min(worst[key], row.sqnr_db)
    return dict(worst)


def figures(report: Report) -> list[tuple[str, str]]:
    """The main figures as (name, value) for people."""
    changed = [row for row in report.tensors if math.isfinite(row.sqnr_db)]
    worst = min(changed, key=lambda row: row.sqnr_db, default=None)
    layers = report.router_agreement_by_layer
    rows = [
        ("evidence", f"{report.tokens:,} tokens of {report.data}, {report.dtype}"),
        ("engine", report.engine),
        ("KL divergence (nats)", f"mean {report.kl_mean:.3g}, p99 {report.kl_p99:.3g}, "
         f"max {report.kl_max:.3g}"),
        ("top-1 agreement", f"{report.top1_agreement:.2%}"),
        ("perplexity", f"{report.perplexity_reference:.4f} -> {report.perplexity_candidate:.4f}"),
        ("router agreement", f"{report.router_agreement:.2%} "
         f"(worst layer {layers.index(min(layers))}: {min(layers):.2%})"),
        ("skip rate", f"{report.skip_rate_reference:.2%} -> {report.skip_rate:.2%}"),
        ("size", f"{report.bytes:,} bytes, {report.bits_per_weight:.3f} bits per weight "
         f"({report.bytes / report.bytes_reference:.1%} of the reference)"),
    ]  # fmt: skip
    if worst:
        mean = sum(row.sqnr_db for row in changed) / len(changed)
        rows.append(("SQNR (dB)", f"mean {mean:.1f}, worst {worst.sqnr_db:.1f} at {worst.name}"))
    if report.calibration:
        rows.append(("calibration", _calibration_line(report.calibration)))
    if report.allocation:
        rows.append(("bits chosen for", str(report.allocation.get("target"))))
    if report.reference_digest_matches is not None:
        rows.append(
            ("reference", "the model it was made from" if report.reference_digest_matches
             else "NOT the model this artifact was made from")
        )  # fmt: skip
    return rows


def _calibration_line(facts: Mapping[str, Any]) -> str:
    """What an artifact says of its calibration, in one line."""
    counts = [count for row in facts["counts"] for count in row[:-1]]
    below, fallback = len(facts["below_minimum"]), len(facts["fallback"])
    return (
        f"{facts['tokens']:,} tokens of {facts['data']}; least-served expert {min(counts):,}, "
        f"{below} below {facts['min_tokens']:,}"
        + (f"; {fallback} matrices rounded without calibration" if fallback else "")
    )


def to_text(report: Report, *, color: bool = False) -> str:
    """A table for the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report.packing} against its reference", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in figures(report):
        table.add_row(name, value)
    out = io.StringIO()
    console = Console(
        file=out, width=96, force_terminal=color, no_color=not color,
        markup=False, emoji=False, highlight=False,
    )  # fmt: skip
    console.print(table)
    for check in report.checks:
        if check.limit is not None or not check.passed:
            console.print(check.line(), soft_wrap=True)
    if all(check.limit is None for check in report.checks):
        console.print("no bounds asked for (--max-kl, --min-top1, ...): only soundness was judged")
    for name in report.undecided:
        console.print(f"?    {name}", soft_wrap=True)
    style = {"pass": "bold green", "fail": "bold red"}.get(report.verdict, "bold yellow")
    console.print(f"verdict: {report.verdict}", style=style)
    return out.getvalue()


def to_junit(report: Report) -> str:
    """JUnit XML: one test case per check; what is undecided is skipped."""
    judged = [Case(c.name, "pass" if c.passed else "fail", c.line()) for c in report.checks]
    undecided = [Case(line, "undecided", "too little evidence") for line in report.undecided]
    return junit.to_junit("validate", figures(report), [*judged, *undecided])


def to_html(report: Report, more: str = "") -> str:
    """A page without scripts or outside resources: figures, checks, SQNR of every expert.

    Args:
        more: further sections, as markup.
    """
    from jinja2 import Environment

    experts = by_expert(report.tensors)
    layers = sorted({layer for layer, _ in experts})
    columns = sorted({expert for _, expert in experts})
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(
        report=report,
        figures=figures(report),
        checks=[(check.passed, check.line()) for check in report.checks],
        columns=columns,
        rows=[(layer, [_cell(experts.get((layer, e))) for e in columns]) for layer in layers],
        coverage=report.calibration["counts"] if report.calibration else [],
        more=more,
    )


def _cell(value: float | None) -> tuple[str, str]:
    """Text and background of one SQNR: red at 10 dB, green at 40 dB and above."""
    if value is None:
        return "", "#fff"
    if math.isinf(value):
        return "exact", "#cfe8cf"
    hue = 120 * min(max((value - 10) / 30, 0), 1)
    return f"{value:.1f}", f"hsl({hue:.0f} 60% 82%)"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>zaya-convert: {{ report.verdict }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .6em; text-align: left }
.grid td { text-align: right; font-variant-numeric: tabular-nums } .fail { color: #b00 }
.inconclusive, .undecided { color: #a60 }
</style>
<h1>{{ report.packing }}: <span class="{{ report.verdict }}">{{ report.verdict }}</span></h1>
<table>{% for name, value in figures %}<tr><th>{{ name }}<td>{{ value }}{% endfor %}</table>
<h2>Checks</h2>
<ul>{% for passed, line in checks %}<li{% if not passed %} class="fail"{% endif %}>{{ line }}
{% endfor %}</ul>
<h2>Router agreement by layer</h2>
<p>{% for value in report.router_agreement_by_layer -%}
{{ "%.2f%%" | format(100 * value) }} {% endfor %}
<h2>Worst SQNR of each expert (dB)</h2>
<table class="grid"><tr><th>layer{% for e in columns %}<th>{{ e }}{% endfor %}
{% for layer, cells in rows %}<tr><th>{{ layer }}
{% for text, color in cells %}<td style="background: {{ color }}">{{ text }}{% endfor %}
{% endfor %}</table>
{% if coverage %}<h2>Calibration tokens of each expert</h2>
<table class="grid"><tr><th>layer{% for _ in coverage[0][1:] %}<th>{{ loop.index0 }}{% endfor %}
<th>skip
{% for counts in coverage %}<tr><th>{{ loop.index0 }}
{% for count in counts %}<td>{{ count }}{% endfor %}
{% endfor %}</table>
{% endif %}{% if report.allocation %}<h2>Bits chosen</h2>
<table>{% for part, counts in report.allocation.chosen.items() %}<tr><th>{{ part }}<td>
{% for label, count in counts.items() %}{{ count }} × {{ label }}<br>{% endfor %}{% endfor %}
</table>
{% endif %}<p>Data digest {{ report.data_digest }}</p>
{{ more }}
</html>
"""
