"""What ``calibrate`` and ``quantize`` share: the options, and getting statistics from them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zaya_convert.cli.output import Output, table
from zaya_convert.cli.params import Size, together
from zaya_convert.cli.progress import stages_bar
from zaya_convert.errors import InputError

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint
    from zaya_convert.stats import Stats

# Of every command that calibrates.
calibration_options = together(
    click.option(
        "--data",
        metavar="FILE|NAME",
        help="Calibration text: .txt, .jsonl (text, messages or ids), hf://datasets/org/name, or a "
        "bundled set (general, zaya1-tiny). Default: the bundled set that fits the model.",
    ),
    click.option(
        "--tokens", type=click.IntRange(2), default=65536, show_default=True,
        help="Calibration tokens to begin with.",
    ),
    click.option(
        "--max-tokens", type=click.IntRange(2),
        help="Limit when starved experts get further tokens. Default: twice --tokens.",
    ),
    click.option(
        "--min-tokens", type=click.IntRange(0), default=256, show_default=True,
        help="Tokens every expert should get.",
    ),
    click.option(
        "--sequence-length", type=click.IntRange(2), default=1024, show_default=True,
        metavar="N", help="Longest calibration sequence, in tokens.",
    ),
    click.option(
        "--pack", is_flag=True, help="Join documents, so that sequences are full.",
    ),
    click.option(
        "--traces", type=click.IntRange(0), default=0, show_default=True, metavar="N",
        help="Put N tokens that the model itself writes, on the prompts in the data, before them.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of traces."),
    click.option(
        "--max-memory", type=Size(), default="4GiB", show_default=True,
        help="Memory for activations; what does not fit goes to disk.",
    ),
    click.option(
        "--on-uncovered",
        type=click.Choice(["flag", "error"]),
        default="flag",
        show_default=True,
        help="What to do about experts below --min-tokens.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """The options above, and whether sensitivity is wanted too."""

    data: str | None
    tokens: int
    max_tokens: int | None
    min_tokens: int
    sequence_length: int
    pack: bool
    traces: int
    seed: int
    max_memory: int
    on_uncovered: str


def run(
    source: Checkpoint,
    options: Calibration,
    path: Path,
    out: Output,
    *,
    sensitivity: bool,
    threads: int | None,
    resume: bool,
) -> Stats:
    """Calibrate and write the statistics to ``path``."""
    from zaya_convert.calibrate import Settings, calibrate
    from zaya_convert.data import joined, load_documents
    from zaya_convert.traces import self_generated

    documents = load_documents(
        source, options.data, length=options.sequence_length, pack=options.pack,
        tokens=options.tokens, seed=options.seed,
    )  # fmt: skip
    limit = options.max_tokens or 2 * options.tokens
    settings = Settings(options.tokens, max(options.tokens, limit), options.min_tokens, sensitivity)
    with _interruptible(), stages_bar(out) as progress:
        if options.traces:
            own = self_generated(
                source, documents, tokens=options.traces, length=options.sequence_length,
                seed=options.seed, progress=progress,
            )  # fmt: skip
            documents = joined(own, documents)
        return calibrate(
            source, documents, settings, path, threads=threads, max_memory=options.max_memory,
            resume=resume, progress=progress,
        )  # fmt: skip


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note("finished layers are kept; run again with --resume to continue")
        raise


def check_coverage(stats: Stats, on_uncovered: str, out: Output) -> None:
    """Say which experts are below the minimum, or refuse.

    Raises:
        InputError: ``on_uncovered`` is "error", and there are some.
    """
    below = stats.below()
    if stats.facts["not_finite"]:
        out.note(f"warning: {stats.facts['not_finite']} activation rows were not finite; dropped")
    if not below:
        return
    lines = [f"layer {layer}, expert {expert}: {n} tokens" for layer, expert, n in below]
    if on_uncovered == "error":
        raise InputError(lines, f"experts with fewer than {stats.min_tokens} calibration tokens")
    none = sum(n == 0 for *_, n in below)
    out.note(
        f"warning: {len(below)} experts have fewer than {stats.min_tokens} calibration tokens and "
        f"lean on their layer's pooled statistics"
        + (f"; {none} of them have none and are rounded by weight alone" if none else "")
    )


def coverage_table(stats: Stats) -> str:
    """Tokens by layer and expert; the last column is the skip expert."""
    counts = stats.counts.tolist()
    header = ["layer", *(str(e) for e in range(len(counts[0]) - 1)), "skip"]
    return table([[layer, *row] for layer, row in enumerate(counts)], header)
