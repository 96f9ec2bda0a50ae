"""``validate``: the proof."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zaya_convert import models
from zaya_convert.cli.engines import ONNXRUNTIME, choose_engine, engine_option
from zaya_convert.cli.opening import find_reference
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL
from zaya_convert.cli.progress import stages_bar
from zaya_convert.errors import Inconclusive, UsageError, ValidationFailed
from zaya_convert.publish import check_writable, write_whole

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.rsa.results import ParityReport
    from zaya_convert.runtime.onnx_engine import OnnxModel
    from zaya_convert.validate import Report

_FILE = click.Path(dir_okay=False, path_type=Path)
_SHARE = click.FloatRange(0, 1)
_POSITIVE = click.FloatRange(0)


@click.command("validate")
@click.argument("candidate", type=MODEL)
@click.option(
    "--reference",
    type=MODEL,
    help="Default: the bundled checkpoint, for artifacts made from it.",
)
@click.option(
    "--data",
    type=click.Path(),
    help="Text (.txt, .jsonl) or token ids to compare on. Default: the bundled held-out text.",
)
@click.option("--tokens", type=click.IntRange(2), default=4096, show_default=True)
@click.option("--sequence-length", type=click.IntRange(2), default=512, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of random tokens.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the reference runtime: float32 measures the quantization alone, bfloat16 how people "
    "run it.",
)
@engine_option
@click.option(
    "--exact",
    is_flag=True,
    help="Run an ONNX graph without rounding activations to 8 bits: its weights alone.",
)
@click.option("--max-kl", type=_POSITIVE, help="Largest mean KL divergence, in nats.")
@click.option("--max-kl-p99", type=_POSITIVE, help="Largest 99th percentile of it.")
@click.option("--min-top1", type=_SHARE, help="Smallest share of equal best tokens.")
@click.option("--min-router", type=_SHARE, help="Smallest share of equal expert choices.")
@click.option("--max-perplexity-ratio", type=_POSITIVE, help="Candidate over reference.")
@click.option(
    "--rsa",
    is_flag=True,
    help="Also run the RSA parity test at smoke size; see `zaya-convert rsa-parity` for more.",
)
@click.option("--report", "html", type=_FILE, help="Write an HTML report.")
@click.option("--junit", type=_FILE, help="Write JUnit XML.")
@output_options
def command(
    candidate: str,
    reference: str | None,
    data: str | None,
    tokens: int,
    sequence_length: int,
    seed: int,
    dtype: str,
    engine: str | None,
    exact: bool,
    rsa: bool,
    html: Path | None,
    junit: Path | None,
    out: Output,
    **bounds: float | None,
) -> None:
    """Compare CANDIDATE with its reference on the same tokens, and print the proof.

    Exit code 4 when a bound that was asked for is not kept; with --rsa also when its bounds are
    not, and 7 when nothing failed but the RSA parity test could not decide.
    """
    opened = models.open_model(candidate)
    original = find_reference(opened, reference, out)
    runs = _engine(opened, engine, exact)
    for path in filter(None, (html, junit)):
        check_writable(path)
    from zaya_convert.data import load_sequences
    from zaya_convert.validate import Bounds, validate

    sequences = load_sequences(original, data, tokens=tokens, length=sequence_length, seed=seed)
    with stages_bar(out) as progress:
        report = validate(
            original, opened, sequences,
            dtype=dtype, engine=runs, bounds=Bounds(**bounds), progress=progress,
        )  # fmt: skip
    parity = _parity(opened, original, engine, exact, report, out) if rsa else None
    _publish(report, parity, html, junit, out)


def _parity(
    candidate: Checkpoint,
    reference: Checkpoint,
    engine: str | None,
    exact: bool,
    report: Report,
    out: Output,
) -> ParityReport:
    """The RSA parity test at smoke size, its checks added to those of ``report``."""
    from zaya_convert.cli import rsa_options
    from zaya_convert.cli.rsa_parity import run_size
    from zaya_convert.validate import Check

    rsa_options.use_threads(None, reference)
    other = rsa_options.side("candidate", candidate, out, engine=engine, exact_graph=exact)
    own = rsa_options.side("reference", reference, out, engine="reference")
    found = run_size(own, other, reference, "smoke", None, None, {}, out)
    for check in found.checks:
        if check.outcome == "undecided":
            report.undecided.append(f"RSA: {check.line()}")
        else:
            passed = check.outcome == "pass"
            report.checks.append(Check(f"RSA: {check.name}", check.value, check.limit, passed))
    return found


def _engine(candidate: Checkpoint, name: str | None, exact: bool) -> OnnxModel | None:
    """What runs the candidate; None stands for the reference runtime."""
    if choose_engine(candidate, name) == ONNXRUNTIME:
        from zaya_convert.runtime.onnx_engine import OnnxModel

        return OnnxModel(candidate, exact)
    if exact:
        raise UsageError("--exact is for ONNX folders run by onnxruntime")
    return None


def _publish(
    report: Report, parity: ParityReport | None, html: Path | None, junit: Path | None, out: Output
) -> None:
    from zaya_convert import report as reports

    section, text, more = "", "", dict[str, Any]()
    color = click.get_current_context().color is not False and sys.stdout.isatty()
    if parity is not None:
        from zaya_convert.rsa import report as rsa_reports

        section = rsa_reports.section(parity)
        text = rsa_reports.to_text(parity, color=color)
        more = {"rsa": rsa_reports.to_json(parity)}
    if html:
        write_whole(html, reports.to_html(report, section).encode())
    if junit:
        write_whole(junit, reports.to_junit(report).encode())
    facts: dict[str, Any] = reports.to_json(report) | more
    out.result(facts, text + reports.to_text(report, color=color))
    findings = [] if parity is None else parity.findings
    if report.verdict == "fail":
        failed = [check.line() for check in report.checks if not check.passed]
        raise ValidationFailed("validation failed: " + "; ".join([*failed, *findings]))
    if report.verdict != "pass":
        raise Inconclusive("validation is inconclusive: " + "; ".join(report.undecided))
