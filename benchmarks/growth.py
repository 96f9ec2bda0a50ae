"""How time and memory of a calibrated conversion grow with tokens, layers and experts.

    python benchmarks/growth.py WORKDIR [--hidden 1024] [--json FILE]
    python benchmarks/growth.py WORKDIR --only "3 layers" --hidden 2048 --tokens 32768   # 8B shapes

Makes synthetic checkpoints (shapes of ZAYA1-8B, scaled by ``--hidden``; random tokens), and runs
``zaya-convert quantize --method gptq`` on each as a user would, calibration included. One figure is
varied at a time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 8192


def cases(tokens: int) -> Iterator[tuple[str, int, int, int]]:
    """(name, layers, experts, tokens)."""
    for layers in (1, 2, 3, 4):
        yield f"{layers} layers", layers, 16, tokens
    for experts in (8, 32):
        yield f"{experts} experts", 2, experts, tokens
    for count in (tokens // 2, tokens * 2):
        yield f"{count:,} tokens", 2, 16, count


def run(folder: Path, hidden: int, layers: int, experts: int, tokens: int) -> dict[str, float]:
    """One conversion: wall seconds of the whole command, and its peak resident memory."""
    model, out = folder / "model", folder / "out"
    shutil.rmtree(folder, ignore_errors=True)
    shape = {
        "hidden": hidden, "expert-width": hidden, "heads": hidden // 256, "kv-heads": 2,
        "layers": layers, "experts": experts, "vocab-rows": VOCABULARY, "head-dim": 128,
    }  # fmt: skip
    options = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    make = [sys.executable, str(ROOT / "tools/synthetic.py"), "--preset", "8b", "--out", str(model)]
    subprocess.run([*make, *options], check=True, stdout=subprocess.DEVNULL)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "zaya_convert", "quantize", str(model), "--bits", "4", "--method",
         "gptq", "--tokens", str(tokens), "--max-tokens", str(tokens), "--json", "-q",
         "-o", str(out)],
        check=True, stdout=subprocess.PIPE,
    )  # fmt: skip
    seconds = time.monotonic() - started
    memory = json.loads(done.stdout)["peak_memory_bytes"]
    shutil.rmtree(folder)
    return {"seconds": seconds, "peak_memory_bytes": memory}


def main() -> None:
    """Parse, run, print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", help="run the cases of this name alone, e.g. '3 layers'")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| case | layers | experts | tokens | seconds | peak memory |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, layers, experts, tokens in cases(arguments.tokens):
        if arguments.only and name != arguments.only:
            continue
        found = run(arguments.workdir / "growth", arguments.hidden, layers, experts, tokens)
        rows.append({"case": name, "layers": layers, "experts": experts, "tokens": tokens, **found})
        print(
            f"| {name} | {layers} | {experts} | {tokens:,} | {found['seconds']:.1f} "
            f"| {found['peak_memory_bytes'] / 1e9:.2f} GB |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
