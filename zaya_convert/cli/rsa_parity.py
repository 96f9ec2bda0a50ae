"""``rsa-parity``: does a candidate reason under Markovian RSA as its reference does?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zaya_convert import models
from zaya_convert.cli import rsa_options
from zaya_convert.cli.engines import engine_option
from zaya_convert.cli.opening import find_reference
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL
from zaya_convert.cli.progress import stages_bar
from zaya_convert.errors import Inconclusive, UsageError, ValidationFailed
from zaya_convert.publish import check_writable, write_whole

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.rsa.results import ParityReport
    from zaya_convert.rsa.sides import Side

SIZES = ("smoke", "standard", "report")
_FILE = click.Path(dir_okay=False, path_type=Path)
_SHARE = click.FloatRange(0, 1)
_POSITIVE = click.FloatRange(0)
# Flags that are bounds by their own name; --margin has a default for each size.
_BOUNDS = ("max_kl", "max_kl_p99", "min_top1", "min_router", "min_problems", "min_tokens")


@click.command("rsa-parity")
@click.argument("candidate", type=MODEL, required=False)
@click.option("--reference", type=MODEL, help="Default: the bundled checkpoint, as in validate.")
@click.option(
    "--size",
    type=click.Choice(SIZES),
    default="standard",
    show_default=True,
    help="How much to run: smoke is for continuous integration, report has the settings of the "
    "technical report.",
)
@rsa_options.problem_options
@rsa_options.settings_options
@click.option("--seeds", type=click.IntRange(1), help="Runs of each model [default: of the size].")
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--prompts",
    type=click.Choice(["free", "forced"]),
    default="free",
    show_default=True,
    help="free: each model aggregates its own tails; forced: both get the reference's, which "
    "isolates one round.",
)
@click.option(
    "--trace-tokens", type=click.IntRange(1), help="Of the reference's traces to teacher-force."
)
@engine_option
@click.option("--exact", is_flag=True, help="Run an ONNX graph without rounding activations.")
@rsa_options.engine_options
@click.option(
    "--yardstick-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    default="3",
    show_default=True,
    help="The candidate has to be nearer to the reference than the reference rounded to so many "
    "bits. The next four options put numbers in its place.",
)
@click.option("--max-kl", type=_POSITIVE, help="Largest mean KL divergence, in nats.")
@click.option("--max-kl-p99", type=_POSITIVE, help="Largest 99th percentile of it.")
@click.option("--min-top1", type=_SHARE, help="Smallest share of equal best tokens.")
@click.option("--min-router", type=_SHARE, help="Smallest share of equal expert choices.")
@click.option(
    "--margin", type=_SHARE, help="How much accuracy and agreement may fall short [by size]."
)
@click.option("--min-problems", type=click.IntRange(1), default=8, show_default=True)
@click.option("--min-tokens", type=click.IntRange(1), default=1000, show_default=True)
@click.option(
    "--runs",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep all runs there, and take up those of the same model and settings.",
)
@click.option("--report", "html", type=_FILE, help="Write an HTML report, with plots.")
@click.option("--junit", type=_FILE, help="Write JUnit XML.")
@output_options
def command(
    candidate: str | None,
    reference: str | None,
    size: str,
    problems: Path | None,
    limit: int | None,
    engine: str | None,
    exact: bool,
    arithmetic: str | None,
    batch: int | None,
    threads: int | None,
    endpoint: str | None,
    html: Path | None,
    junit: Path | None,
    out: Output,
    **options: Any,
) -> None:
    """Compare how CANDIDATE and its reference reason, under the same draws and the same noise.

    Exit code 4 when a bound is broken, 7 when there was too little evidence to say that all are
    kept. With --endpoint the candidate is a server, and CANDIDATE its weights, if they are at hand.
    """
    if candidate is None and endpoint is None:
        raise UsageError("name a CANDIDATE, or a server with --endpoint")
    client = rsa_options.client(options) | {"logprobs": True}
    opened = None if candidate is None else models.open_model(candidate)
    original = find_reference(opened, reference, out)
    for path in filter(None, (html, junit)):
        check_writable(path)
    other = rsa_options.side(
        candidate or f"{endpoint}", opened, out, engine=engine, exact_graph=exact,
        arithmetic_name=arithmetic, batch=batch, endpoint=endpoint, client=client,
    )  # fmt: skip
    own = rsa_options.side(
        reference or models.BUNDLED.name, original, out, engine="reference",
        arithmetic_name=arithmetic, batch=batch,
    )  # fmt: skip
    rsa_options.use_threads(threads, original)
    report = run_size(own, other, original, size, problems, limit, options, out)
    from zaya_convert.rsa import report as reports

    if html:
        write_whole(html, reports.to_html(report).encode())
    if junit:
        write_whole(junit, reports.to_junit(report).encode())
    color = click.get_current_context().color is not False and sys.stdout.isatty()
    out.result(reports.to_json(report), reports.to_text(report, color=color))
    complain(report)


def run_size(
    own: Side,
    other: Side,
    original: Checkpoint,
    size: str,
    problems: Path | None,
    limit: int | None,
    options: dict[str, Any],
    out: Output,
) -> ParityReport:
    """The test of a size, with what flags change of it."""
    from zaya_convert.rsa.parity import Plan, parity
    from zaya_convert.rsa.sizes import SIZES as ROWS
    from zaya_convert.rsa.sizes import settings_for
    from zaya_convert.rsa.verdict import Bounds

    row = ROWS[size]
    base = settings_for(size, rsa_options.is_bundled(original))
    base = rsa_options.fitting(base, original.config.max_positions)
    given = {name: options[name] for name in _BOUNDS if options.get(name) is not None}
    margin = options.get("margin")
    plan = Plan(
        rsa_options.read_problems(problems, limit or row.problems, out),
        rsa_options.changed(base, options),
        seeds=range(
            first := options.get("first_seed") or 0, first + (options.get("seeds") or row.seeds)
        ),
        forced=options.get("prompts") == "forced",
        trace_tokens=options.get("trace_tokens") or row.trace_tokens,
        yardstick_bits=int(options.get("yardstick_bits") or 3),
        bounds=Bounds(margin=row.margin if margin is None else margin, **given),
        runs=options.get("runs"),
    )
    if plan.runs is not None:
        own, other = (rsa_options.with_digest(made) for made in (own, other))
    with stages_bar(out) as progress:
        return parity(own, other, plan, progress)


def complain(report: ParityReport) -> None:
    """Nothing when the test is passed.

    Raises:
        ValidationFailed, Inconclusive: it is not.
    """
    lines = [check.line() for check in report.checks if check.outcome != "pass"]
    if report.verdict == "fail":
        failed = [check.line() for check in report.checks if check.outcome == "fail"]
        raise ValidationFailed("RSA parity failed: " + "; ".join([*failed, *report.findings]))
    if report.verdict != "pass":
        raise Inconclusive("RSA parity is inconclusive; more --problems, --seeds or --budget may "
                           "decide it: " + "; ".join(lines))  # fmt: skip
