"""What a command prints and where: results to stdout, everything else to stderr."""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import click

SCHEMA = 1


@dataclass(frozen=True)
class Output:
    """How this run prints.

    Attributes:
        json: the result is one JSON object.
        quiet: nothing but the result and errors.
    """

    json: bool = False
    quiet: bool = False

    def result(self, payload: Mapping[str, Any], text: str) -> None:
        """Print the result: ``payload`` as JSON, or ``text`` for people."""
        if not self.json:
            click.echo(text.rstrip("\n"))
            return
        whole = finite({"schema": SCHEMA, **payload})
        click.echo(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False))

    def stream(self, text: str) -> None:
        """Print a piece of a result that comes bit by bit."""
        click.echo(printable(text) if sys.stdout.isatty() else text, nl=False)

    def note(self, text: str) -> None:
        """Tell a person something beside the result."""
        if not self.quiet:
            say(printable(text))

    @property
    def live(self) -> bool:
        """Whether a person is watching stderr."""
        return not self.quiet and sys.stderr.isatty()


def output_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--json`` and ``-q``; it receives them as one ``Output`` called ``out``."""

    @click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
    @click.option("-q", "--quiet", is_flag=True, help="Print the result only.")
    @functools.wraps(function)
    def wrapper(*args: Any, as_json: bool, quiet: bool, **options: Any) -> None:
        of_group = bool(click.get_current_context().find_root().params.get("quiet"))
        function(*args, out=Output(as_json, quiet or of_group), **options)

    return wrapper


def complain(message: str) -> None:
    """One error to stderr."""
    head = click.style("error:", fg="red", bold=True)
    say(f"{head} {printable(message)}", color=False if os.environ.get("NO_COLOR") else None)


def say(text: str, color: bool | None = None) -> None:
    """Print to stderr; that nobody can read it any more ends no work."""
    with suppress(OSError):
        click.echo(text, err=True, color=color)


def open_streams() -> None:
    """Put the null device where a standard stream is closed.

    Otherwise the next file opened would stand in its place, and get what libraries print.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(null, "w" if descriptor else "r"))


def discard_stdout() -> None:
    """After a broken pipe: keep the interpreter from complaining when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """``text`` with control characters escaped, so that a file's names cannot drive a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def finite(value: Any) -> Any:
    """``value`` with NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Aligned columns; numbers to the right with thousands separated."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [isinstance(value, int) for value in rows[0]] if rows else []
    lines = [list(header), *cells] if header else cells
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))] if lines else []
    return "\n".join(
        "  ".join(
            text.rjust(width) if i < len(right) and right[i] else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def size(count: int) -> str:
    """``15400000`` → ``15.4 MB``: decimal units, as the Hub counts."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
