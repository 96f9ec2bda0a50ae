"""``export``: the same model in another packing."""

from __future__ import annotations

from typing import Any

import click

from zaya_convert import models
from zaya_convert import recipe as recipes
from zaya_convert.cli.conversion import Writing, carry_out, default_output
from zaya_convert.cli.opening import open_named
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL, writing_options
from zaya_convert.errors import UsageError
from zaya_convert.export import FORMATS


@click.command("export")
@click.argument("model", type=MODEL)
@click.option(
    "--to",
    "format",
    type=click.Choice(list(FORMATS)),
    default="safetensors",
    show_default=True,
    help="File format.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(recipes.TYPES, case_sensitive=False),
    help="Type of all matrices [default: as MODEL holds them]. Block types (q4_0 and on) are for "
    "GGUF files of float models: plain rounding, as other converters do; `quantize` does better.",
)
@writing_options
@output_options
def command(model: str, format: str, kind: str | None, out: Output, **options: Any) -> None:
    """Write MODEL in another form: the same codes and scales, never quantized again.

    --to gguf writes a file for those builds of llama.cpp that know ZAYA1. --packing dense writes
    large matrices in bf16 (or --type): dequantized values, and float matrices that the source holds
    wider, are rounded to it. In safetensors a float checkpoint can only be written so: that turns
    the legacy layout into the hybrid one. Prints the output's path.
    """
    writing = Writing(format, **options)
    if kind and format != "gguf" and kind.upper() not in recipes.FLOAT_TYPES:
        raise UsageError(f"--type {kind} is a type of GGUF; give --to gguf, or use `quantize`")
    source = open_named(model, out)
    from zaya_convert.plan import make_plan

    # An artifact of an artifact keeps the name of the model they both come from.
    origin = writing.base_model or models.origin(model) or source.made_from.get("model", "")
    recipe = recipes.adjusted(recipes.for_type(kind), method="absmax") if kind else None
    plan = make_plan(source, recipe, writing.target, writing.shard_size, origin)
    name = kind.upper() if kind else plan.main_type if format == "gguf" else writing.target
    suffix = f"{name}.gguf" if format == "gguf" else name
    output = writing.output or default_output(source, model, suffix)
    carry_out(plan, output, model, writing, out)
