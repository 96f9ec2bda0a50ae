"""Quality of every method and recipe on one checkpoint, side by side in one run.

    python benchmarks/quality.py MODEL --data CALIB --valid VALID --json FILE
    python benchmarks/quality.py       # the bundled checkpoint, its calibration and held-out text

Calibrates once, quantizes with `zaya-convert quantize` in a fresh process each, all of them on that
calibration, and judges in float32 (see ``judge.py``). Beside them stand the noise floor (the
unquantized model run in bf16) and bits chosen for each matrix at the size of int4. On shared cores,
set OMP_NUM_THREADS=1 and OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait cost several
times the time.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from judge import Judge, Row, RunError, cli, line, report

from zaya_convert.models import BUNDLED, open_model
from zaya_quant.methods import METHODS

# What is quantized, and the flags of `quantize` that say so.
SHAPES = {
    "int4 g32, int8 attention": ("int4", 32),
    "int4 g128, int8 attention": ("mixed", None),
    "int4 g32": ("int4-small", 32),
    "int4 g128": ("int4-small", 128),
}
MIXED = ("int4 g32, int8 attention", "int4 g128, int8 attention")  # at the size of these


class Run:
    """One checkpoint, its statistics and its judge."""

    def __init__(self, model: str, judge: Judge, folder: Path, only: str) -> None:
        self.model, self.judge, self.folder, self.only = model, judge, folder, only
        self.stats = folder / "stats.safetensors"
        self.rows: list[Row] = []

    def calibrate(self, data: str | None, tokens: int | None) -> str:
        """Make the statistics; a sentence on them."""
        flags = ["--data", data] if data else []
        flags += ["--tokens", str(tokens), "--max-tokens", str(tokens)] if tokens else []
        found, cost = cli("calibrate", self.model, *flags, "--sensitivity", "-o", self.stats)
        return (
            f"calibrated once, with sensitivity, on {found['tokens']:,} tokens of "
            f"{found['description']} in {cost.seconds:.1f} s ({cost.cpu_seconds:.1f} s of CPU), "
            f"{cost.peak_bytes / 1e6:.0f} MB"
        )

    def quantize(self, name: str, *flags: object) -> None:
        """One row: quantize in a fresh process, then judge what was written."""
        if not re.search(self.only, name):
            return
        out = self.folder / "artifact"
        words = ["quantize", self.model, "--stats", self.stats, "-o", out, "--overwrite"]
        try:
            _, cost = cli(*words, *flags)
            self.add(self.judge.row(name, open_model(str(out)), cost))
        except RunError as error:
            self.add(Row(name, error=str(error)))

    def size(self, *flags: object) -> int:
        """Bytes that a plan takes."""
        return cli("quantize", self.model, *flags, "--dry-run")[0]["bytes"]

    def add(self, row: Row) -> None:
        """Keep a row and tell of it."""
        self.rows.append(row)
        print(line(row), file=sys.stderr, flush=True)


def shape_flags(shape: str) -> list[object]:
    """The flags of `quantize` for one of SHAPES."""
    name, group = SHAPES[shape]
    return ["--recipe", name, *(["--group-size", group] if group else [])]


def measure(run: Run) -> None:
    """All rows, in the order of the table."""
    run.add(run.judge.floor())
    run.quantize("int8, rtn", "--recipe", "int8")
    for shape in SHAPES:
        for method in METHODS:
            run.quantize(f"{shape}, {method}", *shape_flags(shape), "--method", method)
    for shape in MIXED:
        bits = 8 * run.size(*shape_flags(shape)) / run.judge.reference.weights
        target = f"{bits:.6f}"
        run.quantize(f"mixed at {bits:.3f} bits", "--recipe", "mixed", "--target-bpw", target)


def main() -> None:
    """Parse the command line, run, print one table."""
    parser = argparse.ArgumentParser(description="Quality of our methods and recipes.")
    parser.add_argument("model", nargs="?", default=str(BUNDLED), help="default: zaya1-tiny")
    parser.add_argument("--data", help="calibration text (default: as `calibrate`)")
    parser.add_argument("--calibration-tokens", type=int, metavar="N", help="no more, no fewer")
    parser.add_argument("--valid", help="text to judge on (default: as `validate`)")
    parser.add_argument("--tokens", type=int, default=16384, help="to judge on")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to run, by name")
    parser.add_argument("--out", type=Path, help="where a temporary folder is made")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    judge = Judge(open_model(options.model), options.valid, options.tokens)
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
        run = Run(options.model, judge, Path(folder), options.only)
        note = run.calibrate(options.data, options.calibration_tokens)
        measure(run)
    report(judge, run.rows, [note], options.json)


if __name__ == "__main__":
    main()
