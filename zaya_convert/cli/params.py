"""Types and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from zaya_convert.export import PACKINGS

_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """``"2GB"`` or ``"4.6GiB"`` → bytes.

    Raises:
        ValueError: not a size, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise ValueError(f"{text!r} is not a size like 500MB, 2GB or 4.6GiB")
    return int(float(match[1]) * unit)


class Size(click.ParamType):
    """A number of bytes, written like 2GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse what was typed."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


# A string, not a Path: it may be a Hub id. The type gives file completion in the shell.
MODEL = click.Path()

_WRITING = (
    click.option(
        "--packing",
        type=click.Choice(list(PACKINGS)),
        default="compressed-tensors",
        show_default=True,
        help="How weights are stored; dense is a dequantized bf16 twin.",
    ),
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="Output folder (default: ./NAME)."
    ),
    click.option(
        "--shard-size", type=Size(), default="2GB", show_default=True, help="Largest weight file."
    ),
    click.option("--base-model", metavar="ID", help="Hub id to name as base model in the card."),
    click.option("--threads", type=click.IntRange(1), help="Default: one per core."),
    click.option("--dry-run", is_flag=True, help="Print the plan and exact sizes; write nothing."),
    click.option("--resume", is_flag=True, help="Continue an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace an existing artifact when done."),
)


def writing_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of every command that writes a model."""
    for option in reversed(_WRITING):
        function = option(function)
    return function
