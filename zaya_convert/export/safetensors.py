"""The safetensors container: shards with planned offsets, filled in any order by any thread.

The header of a shard is written last but its length is fixed first, padded with spaces to hold the
longest dtype names, because one thing is only known after the weights were read: whether a
matrix's scales fit fp16 or had to become bf16, which has the same size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from zaya_convert.export.arrays import Array, Region

INDEX = "model.safetensors.index.json"
_METADATA = {"format": "pt"}


class ShardSet:
    """The weight files of one output folder."""

    def __init__(self, folder: Path, arrays: Sequence[Array], shard_bytes: int) -> None:
        """Lay the arrays out and create the files at their full size."""
        shards = _split(arrays, shard_bytes)
        total = len(shards)
        self.names = [_shard_name(i, total) for i in range(total)]
        self._shards = shards
        self._starts = [8 + _header_length(shard) for shard in shards]
        self._place: dict[str, tuple[int, int]] = {}
        self.descriptors: list[int] = []
        for i, shard in enumerate(shards):
            offset = self._starts[i]
            for array in shard:
                self._place[array.name] = (i, offset)
                offset += array.bytes
            descriptor = os.open(folder / self.names[i], os.O_RDWR | os.O_CREAT, 0o666)
            self.descriptors.append(descriptor)
            os.ftruncate(descriptor, offset)

    def write(self, region: Region, data: memoryview | bytes | bytearray, offset: int = 0) -> None:
        """Write bytes of a region, beginning ``offset`` bytes into it. Safe from any thread."""
        shard, start = self._place[region.array.name]
        position, view = start + region.offset + offset, memoryview(data)
        while view:
            count = os.pwrite(self.descriptors[shard], view, position)
            position, view = position + count, view[count:]

    def read(self, region: Region, size: int = 32 << 20) -> Iterator[bytes]:
        """Read a region back, in pieces of at most ``size`` bytes."""
        shard, start = self._place[region.array.name]
        for offset in range(0, region.bytes, size):
            count = min(size, region.bytes - offset)
            yield os.pread(self.descriptors[shard], count, start + region.offset + offset)

    def finish(self, dtypes: Mapping[str, str]) -> dict[str, bytes]:
        """Write the headers.

        Args:
            dtypes: arrays whose final dtype differs from the planned one (of the same width).

        Returns:
            Further files of the container: the index, when there is more than one shard.
        """
        for i, shard in enumerate(self._shards):
            header = _header(shard, dtypes).ljust(self._starts[i] - 8)
            os.pwrite(self.descriptors[i], len(header).to_bytes(8, "little") + header, 0)
        if len(self.names) == 1:
            return {}
        weight_map = {name: self.names[shard] for name, (shard, _) in self._place.items()}
        size = sum(array.bytes for shard in self._shards for array in shard)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        return {INDEX: (json.dumps(index, indent=1) + "\n").encode()}

    def close(self) -> None:
        """Close the files."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def _split(arrays: Sequence[Array], shard_bytes: int) -> list[list[Array]]:
    shards: list[list[Array]] = [[]]
    filled = 0
    for array in arrays:
        if shards[-1] and filled + array.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(array)
        filled += array.bytes
    return shards


def _shard_name(index: int, total: int) -> str:
    if total == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"


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
