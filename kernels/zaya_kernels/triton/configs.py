"""Tiles of the kernels for each family of targets; ``budget.json`` bounds what they may cost.

A lane holds whole blocks, so that wave32 and wave64 differ only in how many blocks of a row one
step takes, never in the bytes. The tiles of "hopper" were chosen on an H100, those of the others by
what the compiler made of them alone: no spills, 16-byte loads.
"""

from __future__ import annotations

from dataclasses import dataclass


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
