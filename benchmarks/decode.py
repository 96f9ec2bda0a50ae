"""Generation on the CPU: how near to what memory allows, and llama.cpp beside it.

    python benchmarks/decode.py MODEL --threads 2 [--llama FOLDER] [--json FILE]

MODEL is what ``generate`` takes. Every decode step is followed by a pure read of as many bytes as
the step has weights to read; prefill and decode are greedy, in bf16 with packed weights, as
``generate`` runs them. FOLDER is a llama.cpp that knows ZAYA1 with ``llama-bench`` built in it;
MODEL must be a GGUF file then, and both take turns. Medians of one run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zaya_convert.config import ModelConfig
from zaya_convert.models import open_model
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.weights import Weights
from zaya_kernels.library import library, supported_isas


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def resident_bytes() -> int:
    """What the process holds now (Linux), else at most until now."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def peak_bytes() -> int:
    """What the process held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bytes_per_token(config: ModelConfig, weights: Weights) -> int:
    """Weights that one token reads where no layer skips it: one expert a layer, and the head."""
    total = 0
    for layer in range(config.layers):
        total += sum(part.nbytes for part in weights.layer(layer).values())
        total += sum(matrix.nbytes for matrix in weights.expert(layer, 0))  # pyright: ignore
    head = weights.packed_head()
    if head is not None:
        return total + head.nbytes
    return total + sum(block.nbytes for _, block in weights.head_blocks())


class Ours:
    """The runtime, its weights in memory."""

    def __init__(self, model: str, prompt: int, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        checkpoint = open_model(model)
        started = time.perf_counter()
        self.model, self.threads = Model(checkpoint, torch.bfloat16, fast=True), threads
        self.prompt = torch.randint(min(checkpoint.config.vocab_rows, 256_000), (1, prompt))
        self.forward(self.prompt[:, :1])
        self.loading = time.perf_counter() - started
        self.resident, self.peak = resident_bytes(), peak_bytes()
        self.bytes = bytes_per_token(checkpoint.config, self.model.weights)
        self.read = torch.ones(-(-self.bytes // 64) * 64, dtype=torch.uint8)

    def forward(self, ids: torch.Tensor) -> None:
        """Run tokens that stand alone."""
        self.model.forward(ids, cache=self.model.new_cache(), last_only=True)

    def prefill(self) -> float:
        """Tokens a second."""
        return self.prompt.shape[1] / seconds(lambda: self.forward(self.prompt))

    def decode(
        self, count: int, batch: int, native: bool = True
    ) -> tuple[list[float], list[float]]:
        """Seconds of steps behind the prompt, and of the pure reads between them."""
        model, cache = self.model, self.model.new_cache()
        logits = model.forward(self.prompt, cache=cache, last_only=True).logits
        cache = cache.fork(batch)
        tokens = logits[:, -1].topk(batch).indices.view(batch, 1)  # each goes its own way
        steps: list[float] = []
        reads: list[float] = []
        if not native:
            model.step_refusal, model._step = "not now", None
        for _ in range(count):
            started = time.perf_counter()
            logits = model.forward(tokens, cache=cache, last_only=True).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            steps.append(time.perf_counter() - started)
            reads.append(seconds(self._read))
        model.step_refusal = ""
        return steps[2:], reads[2:]

    def _read(self) -> None:
        library().zk_read(self.read.data_ptr(), self.read.numel(), self.threads)


def llama(folder: str, model: str, options: argparse.Namespace) -> tuple[float, float]:
    """Prefill and decode of llama-bench, tokens a second."""
    command = [
        *(str(Path(folder) / "build/bin/llama-bench"), "-m", model, "-o", "json", "-r", "1"),
        *("-t", str(options.threads), "-p", str(options.prompt), "-n", str(options.new)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rates = {row["n_gen"] > 0: row["avg_ts"] for row in json.loads(done.stdout)}
    return rates[False], rates[True]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures; times in seconds, rates in tokens a second."""
    ours = Ours(options.model, options.prompt, options.threads)
    if ours.model.step_refusal:
        raise SystemExit(f"no native step: {ours.model.step_refusal}")
    ours.forward(ours.prompt)
    prefills: list[float] = []
    steps: list[float] = []
    reads: list[float] = []
    peers: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        prefills.append(ours.prefill())
        taken, pure = ours.decode(options.new, 1)
        steps, reads = steps + taken, reads + pure
        if options.llama:
            peers.append(llama(options.llama, options.model, options))
    blocks, _ = ours.decode(options.blocks, 1, native=False) if options.blocks > 2 else ([], [])
    step, read = statistics.median(steps), statistics.median(reads)
    figures: dict[str, Any] = {
        "model": Path(options.model).name,
        "threads": options.threads,
        "isa": supported_isas()[-1],
        "prompt": options.prompt,
        "loading": ours.loading,
        "resident_bytes": ours.resident,
        "peak_bytes": ours.peak,
        "weight_bytes_per_token": ours.bytes,
        "decode": 1 / step,
        "decode_best": 1 / min(steps),
        "pure_read": 1 / read,
        "pure_read_best": 1 / min(reads),
        "of_pure_read": read / step,
        "prefill": statistics.median(prefills),
    }
    if blocks:
        figures["decode_by_torch"] = 1 / statistics.median(blocks)
    for batch in options.batches:
        taken, _ = ours.decode(max(4, options.new // 4), batch)
        figures[f"decode_batch_{batch}"] = batch / statistics.median(taken)
    if peers:
        prefill, decode = (statistics.median(rates) for rates in zip(*peers, strict=True))
        figures |= {"llama_prefill": prefill, "llama_decode": decode}
    return figures


def show(figures: dict[str, Any]) -> None:
    """As a table."""
    size = figures["weight_bytes_per_token"]
    rows = [
        ("weights read for a token, MB", size / 1e6),
        ("memory when loaded, MB", figures["resident_bytes"] / 1e6),
        ("memory at most while loading, MB", figures["peak_bytes"] / 1e6),
        ("decode, tokens/s", figures["decode"]),
        ("decode, GB/s of weights", figures["decode"] * size / 1e9),
        ("pure read of as many bytes, GB/s", figures["pure_read"] * size / 1e9),
        ("share of the pure read, %", 100 * figures["of_pure_read"]),
        ("decode by torch operations, tokens/s", figures.get("decode_by_torch")),
        (f"prefill of {figures['prompt']}, tokens/s", figures["prefill"]),
        *(
            (f"decode, {name.rpartition('_')[2]} sequences, tokens/s", value)
            for name, value in figures.items()
            if name.startswith("decode_batch_")
        ),
        ("llama.cpp decode, tokens/s", figures.get("llama_decode")),
        ("llama.cpp prefill, tokens/s", figures.get("llama_prefill")),
    ]
    print(f"{figures['model']}, {figures['threads']} threads, {figures['isa']}")
    print("\n".join(["| | |", "| --- | ---: |"]))
    for name, value in rows:
        if value is not None:
            print(f"| {name} | {value:,.1f} |")


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Speed of generation on the CPU.")
    parser.add_argument("model", help="what generate takes; with --llama a GGUF file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens behind it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=6, help="steps by torch; 0: none")
    parser.add_argument("--batches", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--llama", help="folder of llama.cpp")
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    figures = measure(options)
    show(figures)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
