"""``verify``: is the artifact what was written?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zaya_convert import manifest, models
from zaya_convert.cli.output import Output, output_options, size
from zaya_convert.cli.params import MODEL
from zaya_convert.cli.progress import bytes_bar
from zaya_convert.errors import InputError


@click.command("verify")
@click.argument("artifact", type=MODEL)
@output_options
def command(artifact: str, out: Output) -> None:
    """Check ARTIFACT's checksums and structure against its manifest.

    A changed, missing or unlisted file is an error (exit code 3) that names every file and tensor.
    """
    folder = models.resolve(artifact) if artifact.startswith("hf://") else Path(artifact)
    if not folder.is_dir():
        raise InputError("no such folder", artifact)
    total = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    with bytes_bar(out, "verifying", total) as advance:
        found = manifest.verify(folder, advance)
    checkpoint = models.open_model(str(folder))
    facts: dict[str, Any] = {
        "artifact": str(folder),
        "verdict": "ok",
        "layout": checkpoint.format,
        "files": len(found["files"]),
        "tensors": len(found["tensors"]),
        "bytes": sum(entry["bytes"] for entry in found["files"].values()),
        "source": found.get("source"),
        "tool": found.get("tool"),
    }
    text = (
        f"{folder}: ok, {facts['files']} files and {facts['tensors']} tensors as written "
        f"({size(facts['bytes'])})"
    )
    out.result(facts, text)
