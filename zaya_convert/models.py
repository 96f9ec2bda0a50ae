"""From what a person types as MODEL to an open ``Checkpoint``."""

from __future__ import annotations

import re
from pathlib import Path

from zaya_convert import fused_quants
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.export import PACKINGS, packing
from zaya_convert.files import read_json
from zaya_convert.hub import MODEL_ID, fetch_model

BUNDLED = Path(__file__).parent / "bundled" / "zaya1-tiny"


def open_model(name: str | None) -> Checkpoint:
    """Open a folder, a weight file in a folder, a Hub id, or (None) the bundled checkpoint.

    Raises:
        InputError: nothing there, or something that cannot be trusted.
    """
    path = resolve(name)
    if _is_gguf(path):
        return packing("gguf").open_artifact(path)
    folder = path
    config = read_json(folder / "config.json")
    if fused_quants.recognises(folder, config):
        return fused_quants.open_fused(folder)
    for packing_name in PACKINGS:
        module = packing(packing_name)
        if module.recognises(config):
            return module.open_artifact(folder)
    found = config["quantization_config"]
    method = found.get("quant_method") if isinstance(found, dict) else found
    raise InputError(
        f"is quantized as {method!r}, which cannot be read; known: {', '.join(PACKINGS)}",
        folder.name,
    )


def resolve(name: str | None) -> Path:
    """The local folder, or GGUF file, of a model.

    Fetches ``hf://org/name[@revision][/file.gguf]`` if it is not cached.
    """
    if name is None:
        return BUNDLED
    if name.startswith("hf://"):
        return fetch_model(name)
    if not name:  # an unset variable, say; Path would take it for the working directory
        raise InputError("MODEL is empty")
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        path = path.parent
    if path.exists() and not path.is_dir():
        raise InputError("is no folder, and no .gguf, .safetensors or .json file", name)
    if not path.is_dir():
        hint = f"; for the Hub write hf://{name}" if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else ""
        raise InputError(f"no such folder{hint}", name)
    if not (path / "config.json").is_file() and not _is_gguf(path):
        raise InputError("has no config.json and no GGUF file", name)
    return path


def _is_gguf(path: Path) -> bool:
    """Whether a model is a GGUF file, or a folder whose weights are."""
    if path.is_file():
        return True
    return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))


def origin(name: str | None) -> str:
    """The public name of a model, for provenance: its Hub id, or "" for a local folder."""
    if name is None:
        return BUNDLED.name
    match = MODEL_ID.fullmatch(name)
    return match["repo"] if match else ""
