"""Files as memory."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


def map_file(path: Path) -> Tensor:
    """The bytes of a file, uint8 [size], read when they are first used and shared by processes.

    Asks for large pages, in which weights are read faster.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    with path.open("rb") as file:
        # A private copy: torch has no tensors that must not be written to.
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            whole.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(whole, dtype=torch.uint8)
