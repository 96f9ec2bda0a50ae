"""Conversion speed and memory, side by side with what the machine can read and hash.

    python tools/synthetic.py --preset 8b --layout hybrid --out DIR
    python benchmarks/convert.py DIR --runs 3

Every run is a fresh process, after one pass over the input that is not counted. Printed: medians
of wall seconds, MB of input per second, peak resident memory, and the ratio to two ceilings taken
in the same run: reading the input once with two threads, and reading and sha256-hashing it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

BLOCK = 8 << 20


def read_file(path: Path, hashing: bool) -> int:
    """Read a file once, hashing it or not; returns its size in bytes."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            size += len(block)
            if hashing:
                digest.update(block)
    return size


def ceiling(files: list[Path], hashing: bool) -> float:
    """MB/s of reading all files, one thread per core."""
    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        total = sum(pool.map(lambda path: read_file(path, hashing), files))
    return total / 1e6 / (time.perf_counter() - started)


def convert(model: Path, out: Path, extra: list[str]) -> dict[str, float]:
    """Run the command line once in a fresh process; its JSON result."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "zaya_convert", "quantize", str(model), "-o", str(out),
               "--method", "rtn"]  # fmt: skip
    done = subprocess.run([*command, "--json", "-q", *extra], check=True, capture_output=True)
    return json.loads(done.stdout)


def main() -> None:
    """Parse the command line, run, print one table."""
    parser = argparse.ArgumentParser(description="Conversion speed and memory.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the output (default: a temporary one)")
    parser.add_argument("extra", nargs="*", help="further flags of quantize, after --")
    options = parser.parse_args()
    files = sorted(options.model.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files) / 1e6
    ceiling(files, hashing=False)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        for _ in range(options.runs):
            reading, hashing = ceiling(files, False), ceiling(files, True)
            result = convert(options.model, Path(folder) / "artifact", options.extra)
            rows.append(
                {
                    "seconds": result["seconds"],
                    "MB/s": size / result["seconds"],
                    "peak MiB": result["peak_memory_bytes"] / 2**20,
                    "ceiling: read MB/s": reading,
                    "ceiling: read + sha256 MB/s": hashing,
                    "share of read + sha256": size / result["seconds"] / hashing,
                }
            )
    print(f"{size:,.0f} MB of input, {os.cpu_count()} cores, {options.runs} runs")
    for name in rows[0]:
        values = [row[name] for row in rows]
        figures = statistics.median(values), min(values), max(values)
        print(f"{name:30} median {figures[0]:9.2f}   min {figures[1]:9.2f}   max {figures[2]:9.2f}")


if __name__ == "__main__":
    main()
