"""Tiles of the kernels for each family of targets; ``budget.json`` bounds what they may cost.

A lane holds whole blocks, so that wave32 and wave64 differ only in how many blocks of a row one
step takes, never in the bytes. The tiles of "hopper" were chosen on an H100, those of the others by
what the compiler made of them alone: no spills, 16-byte loads.

``zaya-convert bench --gpu`` times others. A device whose tiles were tuned has a file of its own,
``tuned/NAME.json``: the ``tuned`` part of that command's report. ``ZAYA_TILES=FILE`` in the
environment takes such a file, or a whole report, from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = "ZAYA_TILES"
TUNED = Path(__file__).with_name("tuned")


@dataclass(frozen=True, slots=True)
class Decode:
    """Tile of the decode kernel: rows, blocks of a row, warps."""

    block_n: int
    block_b: int
    warps: int


@dataclass(frozen=True, slots=True)
class Prefill:
    """Tile of the prefill kernel: tokens, rows, blocks of a row, warps, stages of its pipeline."""

    block_m: int
    block_n: int
    block_b: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tiles of one family; ``few`` serves prompts with few tokens for each expert."""

    decode: Decode
    few: Prefill
    many: Prefill


FAMILIES = {
    "cuda": Tiles(Decode(4, 64, 4), Prefill(16, 32, 4, 4, 2), Prefill(64, 32, 4, 4, 2)),
    # sm90 and sm100: matrix instructions of a whole warp group
    "hopper": Tiles(Decode(4, 64, 4), Prefill(16, 64, 4, 4, 2), Prefill(64, 64, 4, 4, 2)),
    "cdna": Tiles(Decode(8, 64, 4), Prefill(16, 64, 4, 4, 1), Prefill(64, 64, 4, 4, 1)),
    "rdna": Tiles(Decode(8, 32, 4), Prefill(32, 64, 4, 8, 1), Prefill(32, 64, 4, 8, 1)),
    # Programs are what costs there, not elements.
    "interpreter": Tiles(Decode(64, 32, 4), Prefill(16, 64, 8, 4, 1), Prefill(64, 64, 8, 4, 1)),
}


def family(backend: str, arch: str) -> str:
    """The family of a target: backend "cuda" or "hip", arch such as "90" or "gfx942"."""
    if backend == "cuda":
        return "hopper" if 90 <= int(arch) < 120 else "cuda"
    return "cdna" if arch.startswith("gfx9") else "rdna"


def slug(device: str) -> str:
    """A device's name as that of a file: ``NVIDIA H100 80GB HBM3`` → ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def for_device(device: str, backend: str, arch: str) -> Tiles:
    """Tiles of a device: those tuned for it, else those of its family.

    Raises:
        ValueError: ``ZAYA_TILES`` names a file that holds none.
    """
    own = TUNED / f"{slug(device)}.json"
    chosen = os.environ.get(ENVIRONMENT) or (str(own) if own.is_file() else "")
    return load(Path(chosen)) if chosen else FAMILIES[family(backend, arch)]


def load(path: Path) -> Tiles:
    """Tiles from a file as ``to_json`` describes them, or from a report that holds one.

    Raises:
        ValueError: there is no such file, or it holds no tiles.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tiles = found.get("tuned", found)["tiles"]
        kinds = {"decode": Decode, "few": Prefill, "many": Prefill}
        return Tiles(**{name: kind(**tiles[name]) for name, kind in kinds.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no tiles ({type(error).__name__}: {error})") from None


def to_json(tiles: Tiles) -> dict[str, Any]:
    """``{"decode": {...}, "few": {...}, "many": {...}}``."""
    return asdict(tiles)
