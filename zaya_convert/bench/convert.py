"""Conversion, side by side with what the machine can read and hash.

Every run is a fresh process, after one pass over the input that is not counted. The ceilings are
taken before every run: reading the input once with a thread for each core, and reading and hashing
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.threads import Threads

BLOCK = 8 << 20


@dataclass(frozen=True)
class Converted:
    """Medians over the runs.

    Attributes:
        megabytes: of input.
        speed: MB of input a second.
        peak_bytes: resident memory.
        read_speed: the ceiling of reading, MB/s.
        hash_speed: the ceiling of reading and hashing, MB/s.
        share: of the ceiling of hashing.
        all_seconds: of every run.
    """

    name: str
    megabytes: float
    seconds: float
    speed: float
    peak_bytes: int
    read_speed: float
    hash_speed: float
    share: float
    all_seconds: Sequence[float]


def measure_convert(
    checkpoint: Checkpoint, runs: int = 3, extra: Sequence[str] = (), folder: Path | None = None
) -> Converted:
    """Quantize a model a few times, rounding to nearest.

    Args:
        extra: further flags of ``quantize``.
        folder: where to write (default: the system's folder for temporary files).

    Raises:
        InputError: ``quantize`` failed, and its message.
    """
    files = checkpoint.files
    size = sum(path.stat().st_size for path in files) / 1e6
    ceiling(files, hashing=False)
    rows: list[tuple[float, float, float, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for _ in range(runs):
            reading, hashing = ceiling(files, False), ceiling(files, True)
            result = _quantize(checkpoint.path, Path(place) / "artifact", extra)
            rows.append((result["seconds"], result["peak_memory_bytes"], reading, hashing))
    taken, peak, reading, hashing = (
        statistics.median(column) for column in zip(*rows, strict=True)
    )
    return Converted(
        checkpoint.path.name, size, taken, size / taken, int(peak), reading, hashing,
        size / taken / hashing, [row[0] for row in rows],
    )  # fmt: skip


def ceiling(files: Sequence[Path], hashing: bool) -> float:
    """MB/s of reading all files, one thread per core."""
    started = time.perf_counter()
    with Threads(os.cpu_count() or 1) as pool:
        total = sum(pool.map(lambda path: _read_file(path, hashing), files))
    return total / 1e6 / (time.perf_counter() - started)


def _read_file(path: Path, hashing: bool) -> int:
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            size += len(block)
            if hashing:
                digest.update(block)
    return size


def _quantize(model: Path, out: Path, extra: Sequence[str]) -> dict[str, float]:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "zaya_convert", "quantize", str(model), "-o", str(out),
               "--method", "rtn", "--json", "-q", *extra]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"quantize failed: {done.stderr.strip()}", model.name)
    return json.loads(done.stdout)
