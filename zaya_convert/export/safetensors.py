"""The safetensors container.

The header of a shard is padded with spaces to hold the longest dtype names, because one thing is
only known after the weights were read: whether a matrix's scales fit fp16 or had to become bf16,
which has the same size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_convert.export.arrays import Array
from zaya_convert.export.container import Outcome, PlannedFile, PlannedFiles, offsets, split

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

INDEX = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 2_000_000_000
_METADATA = {"format": "pt"}


class ShardSet:
    """The safetensors files of one output folder."""

    def __init__(self, folder: Path, arrays: Sequence[Array], shard_bytes: int | None) -> None:
        """Lay the arrays out and create the files at their full size."""
        shards = split(arrays, shard_bytes or DEFAULT_SHARD_BYTES)
        self.files = PlannedFiles(
            folder, [_planned(i, len(shards), shard) for i, shard in enumerate(shards)]
        )

    def finish(self, outcome: Outcome) -> dict[str, bytes]:
        """Write the headers; returns the index, when there is more than one shard."""
        planned = self.files.planned
        for i, file in enumerate(planned):
            header = _header(file.arrays, outcome.dtypes).ljust(file.data_start - 8)
            self.files.write_at(i, 0, len(header).to_bytes(8, "little") + header)
        if len(planned) == 1:
            return {}
        arrays = [array for file in planned for array in file.arrays]
        weight_map = {array.name: self.files.file_of(array.name) for array in arrays}
        index = {
            "metadata": {"total_size": sum(array.bytes for array in arrays)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        return {INDEX: (json.dumps(index, indent=1) + "\n").encode()}


def container(plan: Plan, folder: Path) -> ShardSet:
    """The files of a plan; what every packing on safetensors answers."""
    return ShardSet(folder, plan.arrays, plan.shard_bytes)


def _planned(index: int, total: int, shard: Sequence[Array]) -> PlannedFile:
    name = f"model-{index + 1:05d}-of-{total:05d}.safetensors"
    start = 8 + _header_length(shard)
    return PlannedFile("model.safetensors" if total == 1 else name, start, shard, offsets(shard))


def _header_length(shard: Sequence[Array]) -> int:
    widest = {array.name: "BF16" for array in shard if array.dtype == "F16"}
    return -(-len(_header(shard, widest)) // 8) * 8


def _header(shard: Sequence[Array], dtypes: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": _METADATA}
    offset = 0
    for array in shard:
        table[array.name] = {
            "dtype": dtypes.get(array.name, array.dtype),
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.bytes],
        }
        offset += array.bytes
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
