"""Memory in large pages, in which weights are read faster, where the system has such."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def map_file(path: Path) -> Tensor:
    """The bytes of a file, uint8 [size], read when they are first used and shared by processes.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with path.open("rb") as file:
        # A private copy: torch has no tensors that must not be written to.
        return _in_large_pages(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def fresh(size: int) -> Tensor:
    """Memory of this process alone, uint8 [size], zeros."""
    return _in_large_pages(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _in_large_pages(memory: mmap.mmap) -> Tensor:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
