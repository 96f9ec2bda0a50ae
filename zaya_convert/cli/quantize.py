"""``quantize``: the main job."""

from __future__ import annotations

from typing import Any

import click

from zaya_convert import models
from zaya_convert import recipe as recipes
from zaya_convert.cli.conversion import Writing, carry_out, default_output, open_named
from zaya_convert.cli.output import Output, output_options
from zaya_convert.cli.params import MODEL, writing_options
from zaya_convert.errors import UsageError
from zaya_quant.methods import METHODS
from zaya_quant.spec import QuantSpec


@click.command("quantize")
@click.argument("model", type=MODEL, required=False)
@click.option("--bits", type=click.IntRange(2, 8), help="Bits of the experts' weights.")
@click.option(
    "--group-size",
    type=int,
    metavar="N",
    help="Weights per scale, a multiple of 16; -1 = one scale per output channel.",
)
@click.option("--method", type=click.Choice(list(METHODS)), help="Default: as the recipe says.")
@click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="See `zaya-convert recipes`; --bits, --group-size and --method overrule it.",
)
@click.option(
    "--format",
    type=click.Choice(["safetensors"]),
    default="safetensors",
    show_default=True,
    help="File format.",
)
@writing_options
@output_options
def command(
    model: str | None,
    bits: int | None,
    group_size: int | None,
    method: str | None,
    recipe: str | None,
    format: str,
    out: Output,
    **options: Any,
) -> None:
    """Quantize MODEL and write an artifact with manifest and model card.

    Without --bits and --recipe the recipe is int4. Prints the output's path.
    """
    writing = Writing(**options)
    chosen = choose_recipe(recipe, bits, group_size, method)
    source = open_named(model, out)
    from zaya_convert.plan import make_plan

    origin = writing.base_model or models.origin(model)
    plan = make_plan(source, chosen, writing.packing, writing.shard_size, origin)
    suffix = f"int{bits}" if bits and not recipe else chosen.name
    if writing.packing != "compressed-tensors":
        suffix += f"-{writing.packing}"
    output = writing.output or default_output(source, model, suffix)
    carry_out(plan, output, model, writing, out)


def choose_recipe(
    name: str | None, bits: int | None, group_size: int | None, method: str | None
) -> recipes.Recipe:
    """The recipe that the flags ask for."""
    try:
        QuantSpec(bits or 4, 32 if group_size is None else group_size)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if name is None:
        chosen = recipes.for_bits(bits or 4)
    else:
        chosen = recipes.adjusted(recipes.load(name), bits=bits)
    return recipes.adjusted(chosen, group_size=group_size, method=method)
