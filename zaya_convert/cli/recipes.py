"""``recipes``: what there is to choose from."""

from __future__ import annotations

from pathlib import Path

import click

from zaya_convert import recipe
from zaya_convert.cli.output import Output, output_options, table


@click.command("recipes")
@click.argument("name", required=False)
@output_options
def command(name: str | None, out: Output) -> None:
    """List the shipped recipes, or print NAME as commented TOML to start your own from.

    GGUF's types (Q4_K, Q8_0, ...) are recipes by name too.
    """
    if name is None:
        found = [recipe.load(known) for known in recipe.shipped()]
        rows = [(entry.name, entry.description) for entry in found]
        out.result({"recipes": [entry.to_dict() for entry in found]}, table(rows))
        return
    loaded = recipe.load(name)  # refuses unknown names and mistakes
    path = recipe.shipped().get(name.lower(), Path(name))
    text = path.read_text(encoding="utf-8") if path.is_file() else recipe.to_toml(loaded)
    out.result(loaded.to_dict() | {"toml": text}, text)
