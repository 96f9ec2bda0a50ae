"""GGUF files side by side with llama.cpp's own tools: quality at a size, speed and memory.

    python benchmarks/gguf.py quality MODEL --llama LLAMA --data TEXT --calibration IMATRIX_TEXT
    python benchmarks/gguf.py speed MODEL --llama LLAMA --runs 3

LLAMA is the source folder of a llama.cpp that knows ZAYA1, with llama-quantize (and for quality
llama-imatrix) built in it; it never comes with this repository. MODEL is any model we open.

``quality`` writes MODEL as BF16, lets ``llama-quantize`` make its types of that with an importance
matrix, and ours with the same calibration data; then every file is dequantized by our reader and
compared with MODEL in float32 by one judge. For each of llama.cpp's files one of ours is made of at
most its size (``--target-size``). ``speed`` measures both tools on the same input in turn, each run
a fresh process, plain rounding for Q8_0 and Q4_0 and the search for Q4_K, and prints medians. Ours
ends with everything on disk, theirs with everything handed to the system.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from judge import Cost, Judge, Row, RunError, cli, line, measured, report

from zaya_convert.models import open_model

_ROUTER_AS_IS = ("--tensor-type", "zaya_router=f16", "--tensor-type", r"ffn_gate\.weight=f16")
# name, llama.cpp's type, further arguments
_THEIRS = (
    ("Q4_K_M", "Q4_K_M", ()),
    ("Q4_K_M, router F16", "Q4_K_M", _ROUTER_AS_IS),
    ("Q4_K_S", "Q4_K_S", ()),
    ("Q4_0", "Q4_0", ()),
)
_OURS = ("q4_k_m", "Q4_K", "Q4_0")
# name, llama.cpp's type and arguments, our types of matrices and embedding: what theirs come to
_SPEED = (
    ("Q8_0", "Q8_0", (), "Q8_0", "Q8_0"),
    ("Q4_0", "Q4_0", (), "Q4_0", "Q6_K"),
    ("Q4_0, embedding too", "Q4_0", ("--pure",), "Q4_0", "Q4_0"),
    ("Q4_K", "Q4_K_S", (), "Q4_K", "Q6_K"),
)
_RECIPE = """description = "as llama-quantize has it"
[[rules]]
match = "embedding"
type = "{embedding}"
method = "absmax"
[[rules]]
match = "*"
type = "{matrices}"
method = "absmax"
"""


@dataclass(frozen=True)
class Llama:
    """The tools of a llama.cpp folder."""

    folder: Path
    threads: int

    def imatrix(self, model: Path, text: Path, out: Path) -> None:
        """An importance matrix from a text; one sequence a batch, which ZAYA1's forks need."""
        size = ("-c", 512, "-b", 512, "-ub", 512, "-t", self.threads)
        measured([self._tool("llama-imatrix"), "-m", model, "-f", text, "-o", out, *size])

    def quantize(
        self, model: Path, out: Path, kind: str, *, imatrix: Path | None = None,
        options: Sequence[object] = (),
    ) -> Cost:  # fmt: skip
        """Convert with ``llama-quantize``."""
        weighed = ("--imatrix", imatrix) if imatrix else ()
        command = [self._tool("llama-quantize"), *weighed, *options, model, out, kind]
        return measured([*command, self.threads])[1]

    def _tool(self, name: str) -> Path:
        return self.folder / "build" / "bin" / name


def quality(options: argparse.Namespace, llama: Llama, folder: Path) -> None:
    """Every file against the model, in float32."""
    reference = open_model(options.model)
    judge = Judge(reference, options.data, options.tokens)
    plain = folder / "bf16.gguf"
    cli("export", options.model, "--to", "gguf", "--type", "BF16", "-o", plain)
    imatrix, stats = folder / "imatrix.gguf", folder / "stats.safetensors"
    calibration = ("--data", options.calibration) if options.calibration else ()
    tokens = ("--tokens", options.calibration_tokens)
    cli("calibrate", options.model, *calibration, *tokens, "--sensitivity", "-o", stats,
        "--imatrix", imatrix)  # fmt: skip
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)

    for name, kind, extra in _THEIRS:
        out = folder / "theirs.gguf"
        try:
            cost = llama.quantize(plain, out, kind, imatrix=imatrix, options=extra)
        except RunError as error:
            add(Row(f"llama-quantize {name}", error=str(error)))
            continue
        add(judge.row(f"llama-quantize {name}, imatrix", open_model(str(out)), cost))
        size = rows[-1].bytes
        add(_ours(judge, options.model, folder, stats, f"ours, at most as large as {name}",
                  ("--recipe", "q4_k_m", "--target-size", f"{size}B")))  # fmt: skip
    for recipe in _OURS:
        add(_ours(judge, options.model, folder, stats, f"ours {recipe}", ("--recipe", recipe)))
    notes = [f"calibrated on {options.calibration or 'the bundled set'}"]
    report(judge, rows, notes, options.json)


def _ours(
    judge: Judge, model: str, folder: Path, stats: Path, name: str, options: Sequence[object]
) -> Row:
    out = folder / "ours.gguf"
    out.unlink(missing_ok=True)
    try:
        _, cost = cli("quantize", model, "--format", "gguf", "--stats", stats, "-o", out, *options)
    except RunError as error:
        return Row(name, error=str(error))
    return judge.row(name, open_model(str(out)), cost)


def speed(options: argparse.Namespace, llama: Llama, folder: Path) -> None:
    """Both tools in turn on the same weights; the input is BF16 for both."""
    plain = folder / "bf16.gguf"
    cli("export", options.model, "--to", "gguf", "--type", "BF16", "-o", plain)
    size = plain.stat().st_size / 1e6
    print(f"{size:,.0f} MB of input, {llama.threads} threads, medians of {options.runs} runs")
    print("| | llama-quantize MB/s | ours MB/s | ratio | theirs MB | ours MB | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    recipe = folder / "recipe.toml"
    for name, kind, extra, matrices, embedding in _SPEED:
        recipe.write_text(_RECIPE.format(matrices=matrices, embedding=embedding))
        pairs = _pairs(options, llama, folder, plain, kind, extra)
        theirs, ours = zip(*pairs, strict=True)
        speeds = [size / statistics.median(c.seconds for c in costs) for costs in (theirs, ours)]
        peaks = [max(c.peak_bytes for c in costs) / 1e6 for costs in (theirs, ours)]
        print(
            f"| {name} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {speeds[1] / speeds[0]:.2f} | "
            f"{peaks[0]:,.0f} | {peaks[1]:,.0f} | {peaks[1] / peaks[0]:.2f} |",
            flush=True,
        )


def _pairs(
    options: argparse.Namespace, llama: Llama, folder: Path, plain: Path, kind: str,
    extra: Sequence[object],
) -> Iterator[tuple[Cost, Cost]]:  # fmt: skip
    """What one conversion costs each tool, run after run; the first, uncounted, fills the cache."""
    for run in range(options.runs + 1):
        theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
        _ready([plain])
        first = llama.quantize(plain, theirs, kind, options=extra)
        command = ("quantize", options.model, "--format", "gguf", "--recipe")
        recipe = folder / "recipe.toml"
        _ready(open_model(options.model).files)
        _, second = cli(*command, recipe, "-o", ours, "--threads", llama.threads)
        theirs.unlink()
        ours.unlink()
        if run:
            yield first, second


def _ready(inputs: Sequence[Path]) -> None:
    """Nothing left to write of the run before, and the input in memory, for whoever runs next."""
    os.sync()
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="GGUF beside llama.cpp's own tools.")
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("model", help="any model, float")
    parser.add_argument("--llama", type=Path, required=True, help="folder with build/bin")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where files go (default: a temporary folder)")
    parser.add_argument("--runs", type=int, default=3, help="speed: runs that count")
    parser.add_argument("--data", help="quality: what is judged on")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--calibration", help="quality: what both calibrate on")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--json", type=Path, help="quality: also write the rows there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        task = quality if options.what == "quality" else speed
        task(options, Llama(options.llama, options.threads), Path(name))


if __name__ == "__main__":
    main()
