"""Types and options that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from zaya_convert.errors import UsageError
from zaya_convert.export import DIALECTS, FORMATS
from zaya_convert.recipe import parse_size


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


def prompt_text(given: str) -> str:
    """The text of ``--prompt``: what was given, or stdin for -.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        text = sys.stdin.read() if given == "-" else given
        text.encode()
    except UnicodeError:
        raise UsageError("the prompt is not UTF-8") from None
    return text


def together(
    *options: Callable[..., Any],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Several options as one decorator."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# Of every command that writes a model.
writing_options = together(
    click.option(
        "--packing",
        type=click.Choice(FORMATS["safetensors"]),
        help="How safetensors hold weights [default: compressed-tensors]; dense is a dequantized "
        "bf16 twin.",
    ),
    click.option(
        "--dialect",
        type=click.Choice(list(DIALECTS)),
        help=f"Which of llama.cpp's forks a GGUF file is for [default: {next(iter(DIALECTS))}].",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        help="Output folder, or a single file NAME.gguf (default: ./NAME).",
    ),
    click.option(
        "--shard-size",
        type=Size(),
        help="Largest weight file [default: 2GB; GGUF: one file].",
    ),
    click.option("--base-model", metavar="ID", help="Hub id to name as base model in the card."),
    click.option("--threads", type=click.IntRange(1), help="Default: one per core."),
    click.option("--dry-run", is_flag=True, help="Print the plan and exact sizes; write nothing."),
    click.option("--resume", is_flag=True, help="Continue an interrupted run."),
    click.option("--overwrite", is_flag=True, help="Replace an existing artifact when done."),
)
