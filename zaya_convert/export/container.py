"""Weight files with planned places, filled in any order by any thread.

Every format lays its arrays out before a weight is read: sizes are exact, so headers have a known
length, and are written last, when the few things are known that only the weights tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from zaya_convert.export.arrays import Array, Region


@dataclass(frozen=True)
class Outcome:
    """What is known of an output only once its weights are written.

    Attributes:
        source_digest: of the float model it was made from; "" when that is unknown.
        dtypes: arrays whose final dtype differs from the planned one (of the same width).
        checksums: sha256 of what each region holds, in the order of the plan.
        widened: names of the tensors whose scales are bf16 though the plan says fp16.
    """

    source_digest: str = ""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    checksums: tuple[str, ...] = ()
    widened: tuple[str, ...] = ()


class Container(Protocol):
    """The weight files of one output."""

    files: PlannedFiles

    def finish(self, outcome: Outcome) -> dict[str, bytes]:
        """Write the headers.

        Returns:
            Further files of the container, by name.
        """
        ...


@dataclass(frozen=True)
class PlannedFile:
    """One file: its name, where its data begins, and the offset of every array in that."""

    name: str
    data_start: int
    arrays: Sequence[Array]
    offsets: Sequence[int]
    alignment: int = 1

    @property
    def size(self) -> int:
        """Bytes of the whole file, which ends at a multiple of the alignment."""
        end = self.offsets[-1] + self.arrays[-1].bytes if self.arrays else 0
        return self.data_start + -(-end // self.alignment) * self.alignment


class PlannedFiles:
    """Files created at their full size, and written to by region."""

    def __init__(self, folder: Path, files: Sequence[PlannedFile]) -> None:
        self.planned = tuple(files)
        self._place: dict[str, tuple[int, int]] = {}
        self.descriptors: list[int] = []
        for index, file in enumerate(files):
            for array, offset in zip(file.arrays, file.offsets, strict=True):
                self._place[array.name] = (index, file.data_start + offset)
            (folder / file.name).parent.mkdir(exist_ok=True)
            descriptor = os.open(folder / file.name, os.O_RDWR | os.O_CREAT, 0o666)
            self.descriptors.append(descriptor)
            os.ftruncate(descriptor, file.size)

    @property
    def names(self) -> list[str]:
        """The files' names."""
        return [file.name for file in self.planned]

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.size for file in self.planned)

    def file_of(self, array: str) -> str:
        """The name of the file that holds an array."""
        return self.planned[self._place[array][0]].name

    def write(self, region: Region, data: memoryview | bytes | bytearray, offset: int = 0) -> None:
        """Write bytes of a region, beginning ``offset`` bytes into it. Safe from any thread."""
        file, start = self._place[region.array.name]
        view = memoryview(data)
        for position, count in region.runs(offset, len(view)):
            self.write_at(file, start + position, view[:count])
            view = view[count:]

    def write_at(self, file: int, position: int, data: memoryview | bytes | bytearray) -> None:
        """Write bytes at a position of a file."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self.descriptors[file], view, position)
            position, view = position + count, view[count:]

    def pad(self) -> None:
        """Fill what lies between arrays with zeros, which damage to a partial file may not be."""
        for index, file in enumerate(self.planned):
            position = file.data_start
            for array, offset in zip(file.arrays, file.offsets, strict=True):
                self.write_at(index, position, bytes(file.data_start + offset - position))
                position = file.data_start + offset + array.bytes
            self.write_at(index, position, bytes(file.size - position))

    def read(self, region: Region, size: int = 32 << 20) -> Iterator[bytes]:
        """Read a region back, in pieces of at most ``size`` bytes."""
        file, start = self._place[region.array.name]
        for offset in range(0, region.bytes, size):
            runs = region.runs(offset, min(size, region.bytes - offset))
            yield b"".join(os.pread(self.descriptors[file], n, start + at) for at, n in runs)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def offsets(arrays: Sequence[Array], alignment: int = 1) -> list[int]:
    """Where arrays begin that follow each other at multiples of the alignment."""
    found, end = [], 0
    for array in arrays:
        found.append(-(-end // alignment) * alignment)
        end = found[-1] + array.bytes
    return found


def split(arrays: Sequence[Array], limit: int | None) -> list[list[Array]]:
    """Arrays file by file, none larger than ``limit`` bytes unless a single array is."""
    files: list[list[Array]] = [[]]
    filled = 0
    for array in arrays:
        if limit is not None and files[-1] and filled + array.bytes > limit:
            files.append([])
            filled = 0
        files[-1].append(array)
        filled += array.bytes
    return files
