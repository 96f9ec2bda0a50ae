"""``export``: the same model in another packing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from zaya_convert import models
from zaya_convert.cli.conversion import Writing, carry_out, default_output, open_named
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL, writing_options


@click.command("export")
@click.argument("model", type=MODEL)
@click.option(
    "--to",
    "format",
    type=click.Choice(["safetensors"]),
    default="safetensors",
    show_default=True,
    help="File format.",
)
@writing_options
@output_options
def command(model: str, format: str, out: Output, **options: Any) -> None:
    """Write MODEL in another packing: the same codes and scales, never quantized again.

    --packing dense writes large matrices in bf16: dequantized values, and float matrices that the
    source holds wider, are rounded to it. A float checkpoint can only be written so: that turns
    the legacy layout into the hybrid one. Prints the output's path.
    """
    writing = Writing(**options)
    source = open_named(model, out)
    from zaya_convert.plan import make_plan

    origin = writing.base_model or models.origin(model) or _origin_of(source.manifest)
    plan = make_plan(source, None, writing.packing, writing.shard_size, origin)
    output = writing.output or default_output(source, model, writing.packing)
    carry_out(plan, output, model, writing, out)


def _origin_of(manifest: Any) -> str:
    """An artifact of an artifact keeps the name of the model they both come from."""
    source = manifest.get("source") if isinstance(manifest, Mapping) else None
    name = source.get("model") if isinstance(source, Mapping) else None
    return name if isinstance(name, str) else ""
