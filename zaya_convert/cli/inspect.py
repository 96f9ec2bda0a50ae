"""``inspect``: what a checkpoint is, from its headers alone."""

from __future__ import annotations

from typing import Any

import click

from zaya_convert import inspect
from zaya_convert.cli.opening import open_named
from zaya_convert.cli.output import Output, output_options, printable, say, size, table
from zaya_convert.cli.params import MODEL
from zaya_convert.errors import InputError

_FEW = 20  # problems that fit an error message


@click.command("inspect")
@click.argument("model", type=MODEL, required=False)
@output_options
def command(model: str | None, out: Output) -> None:
    """Show MODEL's layout, shapes, parameters, sizes and problems. Reads headers only.

    A damaged checkpoint is an error (exit code 3) that lists every problem.
    """
    try:
        facts = inspect.describe(open_named(model, out, notes=False))
    except InputError as error:
        if len(error.problems) <= _FEW:
            raise
        for problem in error.problems:
            say(printable(f"problem: {problem}")[:1000])
        raise InputError(f"{len(error.problems)} problems, listed above", str(model)) from None
    out.result(facts, _text(facts))


def _text(facts: dict[str, Any]) -> str:
    heads = f"{facts['heads']} query heads, {facts['kv_heads']} key-value heads"
    rows = [
        ("model", facts["path"]),
        ("layout", facts["layout"]),
        ("layers", f"{facts['layers']}" + _sliding(facts["windows"])),
        ("experts", f"{facts['experts']} per layer + skip, width {facts['expert_width']}"),
        ("hidden", f"{facts['hidden']}, {heads} of {facts['head_dim']}"),
        ("vocabulary", f"{facts['vocab_rows']:,} rows, head {'tied' if facts['tied'] else 'own'}"),
        ("parameters", f"{facts['parameters_total']:,} in all, "
         f"{facts['parameters_active']:,} active per token"),
        ("size", f"{facts['bytes']:,} bytes ({size(facts['bytes'])}) in {_files(facts['files'])}, "
         f"{facts['bits_per_weight']:.3f} bits per weight"),
        ("tokenizer", "yes" if facts["tokenizer"] else "none"),
    ]  # fmt: skip
    kinds = [
        [row["kind"], row["tensors"], row["weights"], row["bytes"]] for row in facts["storage"]
    ]
    lines = [table(rows), "", table(kinds, ("stored as", "tensors", "weights", "bytes"))]
    lines += [f"note: {printable(note)}" for note in facts["notes"]]
    lines.append("no problems")  # with problems it would not have opened
    return "\n".join(lines)


def _files(names: list[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"


def _sliding(windows: list[int]) -> str:
    sliding = [window for window in windows if window]
    return f", {len(sliding)} with a window of {max(sliding)} tokens" if sliding else ""
