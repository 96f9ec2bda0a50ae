"""``calibrate``: statistics of a float model's activations, for every later export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from zaya_convert.cli import calibration
from zaya_convert.cli.calibration import Calibration, calibration_options
from zaya_convert.cli.conversion import peak_memory
from zaya_convert.cli.opening import open_named
from zaya_convert.cli.output import Output, output_options, size
from zaya_convert.cli.params import MODEL
from zaya_convert.errors import OutputExistsError, UsageError
from zaya_convert.publish import check_writable


@click.command("calibrate")
@click.argument("model", type=MODEL, required=False)
@calibration_options
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Also measure how much each matrix's errors matter, for --target-bpw.",
)
@click.option("--threads", type=click.IntRange(1), help="Default: one per core.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file when done.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="STATS",
    required=True,
    help="The file to write; a folder gets a file named by its digest.",
)
@click.option(
    "--imatrix",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Also write an imatrix for llama.cpp (GGUF, names of the dialect pr23112).",
)
@output_options
def command(
    model: str | None,
    output: Path,
    imatrix: Path | None,
    sensitivity: bool,
    threads: int | None,
    resume: bool,
    overwrite: bool,
    out: Output,
    **options: Any,
) -> None:
    """Run MODEL over calibration text and keep what each expert receives.

    Prints how many tokens every expert got. `quantize --stats STATS` uses the file, for any recipe
    and format.
    """
    chosen = Calibration(**options)
    named = output.is_dir()
    path = output / "zaya-stats.safetensors" if named else output
    _check_outputs(None if named else path, imatrix, overwrite)
    source = open_named(model, out)
    started = time.monotonic()
    stats = calibration.run(
        source, chosen, path, out, sensitivity=sensitivity, threads=threads, resume=resume
    )
    if named:
        path = path.rename(output / f"zaya-stats-{stats.digest[:16]}.safetensors")
    from zaya_convert.calibrate import coverage

    if imatrix is not None:
        from zaya_convert.imatrix import write

        write(stats, source.config, imatrix)
        out.note(f"imatrix: {imatrix}")
    seconds = time.monotonic() - started
    facts = {
        "output": str(path),
        "imatrix": None if imatrix is None else str(imatrix),
        "bytes": path.stat().st_size,
        "digest": stats.digest,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        **{key: stats.facts[key] for key in ("description", "rounds", "not_finite")},
        **coverage(stats),
    }
    out.result(facts, f"{path}\n{calibration.coverage_table(stats)}")
    out.note(
        f"{stats.tokens:,} tokens of {stats.facts['description']} in {stats.facts['rounds']} "
        f"round(s); skip rate {facts['skip_rate']:.2%}; least-served expert {facts['least']:,} "
        f"tokens; {seconds:.1f} s, peak memory {size(facts['peak_memory_bytes'])}"
    )
    calibration.check_coverage(stats, chosen.on_uncovered, out)


def _check_outputs(path: Path | None, imatrix: Path | None, overwrite: bool) -> None:
    """Refuse what cannot be written, before the work.

    Args:
        path: None where the file is named when it is done.

    Raises:
        UsageError: names that do not fit what the files hold.
        OutputExistsError: a file stands there.
        OutputError: see ``check_writable``.
    """
    if path is not None and path.suffix.lower() == ".gguf":
        raise UsageError(
            "-o takes statistics of zaya-convert's own form, which is not GGUF; "
            "--imatrix FILE.gguf writes an imatrix as well"
        )
    if path and imatrix and path.absolute() == imatrix.absolute():
        raise UsageError("-o and --imatrix name the same file")
    for file, flag in ((path, "-o"), (imatrix, "--imatrix")):
        if file is not None and file.exists() and not overwrite:
            raise OutputExistsError(f"{file} exists; choose another {flag}, or pass --overwrite")
        if file is not None:
            check_writable(file)
