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
    """Check ARTIFACT's checksums and structure against its manifest, or a GGUF file's own.

    A changed, missing or unlisted file is an error (exit code 3) that names every file and tensor.
    """
    folder = models.resolve(artifact) if artifact.startswith("hf://") else Path(artifact)
    if folder.is_file() and folder.suffix == ".gguf":
        _verify_file(folder, out)
        return
    if not folder.is_dir():
        raise InputError("no such folder", artifact)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
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
    tensors = f" and {facts['tensors']} tensors" if facts["tensors"] else ""
    text = f"{folder}: ok, {facts['files']} files{tensors} as written ({size(facts['bytes'])})"
    out.result(facts, text)


def _verify_file(path: Path, out: Output) -> None:
    from zaya_convert.export.gguf.read import verify_file

    with bytes_bar(out, "verifying", path.stat().st_size) as advance:
        checkpoint = verify_file(path, advance)
    facts: dict[str, Any] = {
        "artifact": str(path),
        "verdict": "ok",
        "layout": checkpoint.format,
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.infos),
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "source": checkpoint.manifest.get("source"),
        "tool": checkpoint.manifest.get("tool"),
    }
    tensors, total = facts["tensors"], size(facts["bytes"])
    out.result(facts, f"{path}: ok, {tensors} tensors as written ({total})")
