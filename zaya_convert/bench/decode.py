"""Generation on the CPU: how near to what memory allows, and llama.cpp beside it.

Weights are packed and activations rounded to int8, as ``generate`` runs them. Every decode step is
followed by a pure read of the weights that it read, where they lie: some memory is faster than
other. Rounds take turns with llama.cpp's.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from zaya_convert.bench.kernels import region
from zaya_convert.bench.measure import seconds
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.runtime.model import Model
from zaya_convert.runtime.weights import Weights
from zaya_kernels.library import Region, load

_WARMING = 2  # steps of a round that are not counted


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        tokens: steps of a round.
        prompt: tokens of the prompt.
        rounds: of a prefill and of decoding behind it.
        batches: sizes of batches that are decoded too.
        blocks: steps that do not take the native step, to compare; 0: none.
        threads: of torch's and ours.
        llama: a folder with ``llama-bench`` in it, for models that are GGUF files.
    """

    tokens: int = 32
    prompt: int = 128
    rounds: int = 3
    batches: Sequence[int] = (4, 16)
    blocks: int = 6
    threads: int = 1
    llama: Path | None = None


@dataclass(frozen=True)
class Decoded:
    """Medians; rates are tokens a second.

    Attributes:
        step: "native", or why single tokens take the way of blocks.
        loading: seconds to the first token.
        resident_bytes: what the process held then.
        peak_bytes: what it held at most until then.
        bytes_per_token: weights that a step reads, skipped layers left out.
        skipped: share of layers that the steps skipped.
        decode_best: of the fastest tenth of the steps.
        read_seconds: a pure read of the same bytes; None without the native library.
        share: ``read_seconds`` of a step's time.
        by_blocks: decode without the native step; None when that was not measured.
        batches: decode of all sequences of a batch together, by its size.
        llama_decode: llama.cpp's.
        llama_prefill: llama.cpp's.
    """

    name: str
    dtype: str
    threads: int
    prompt: int
    tokens: int
    step: str
    loading: float
    resident_bytes: int
    peak_bytes: int
    bytes_per_token: int
    skipped: float
    decode: float
    decode_best: float
    gigabytes: float
    read_seconds: float | None
    share: float | None
    prefill: float
    by_blocks: float | None
    batches: Mapping[int, float]
    llama_decode: float | None = None
    llama_prefill: float | None = None


@torch.no_grad()
def measure_decode(
    checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype = torch.bfloat16
) -> Decoded:
    """Measure a model.

    Raises:
        InputError: llama.cpp is asked for but cannot run the model.
    """
    torch.set_num_threads(plan.threads)
    run = _Run(checkpoint, plan, dtype)
    prefills: list[float] = []
    peers: list[tuple[float, float]] = []
    run.prefill()
    for _ in range(plan.rounds):
        prefills.append(run.prefill())
        run.decode(1, plan.tokens)
        if plan.llama is not None:
            peers.append(_llama(plan.llama, checkpoint, plan))
    steps, reads = run.steps, run.reads
    size, skips = round(statistics.mean(run.sizes)), statistics.mean(run.skips)
    step, read = statistics.median(steps), statistics.median(reads) if reads else None
    batches = {size: size / statistics.median(run.steps_of(size)) for size in plan.batches}
    blocks = run.by_blocks()
    llama = [statistics.median(rates) for rates in zip(*peers, strict=True)] or [None, None]
    return Decoded(
        name=checkpoint.path.name, dtype=str(dtype).removeprefix("torch."), threads=plan.threads,
        prompt=plan.prompt, tokens=plan.tokens, step=run.model.step_refusal or "native",
        loading=run.loading, resident_bytes=run.resident, peak_bytes=run.peak,
        bytes_per_token=size, skipped=skips / checkpoint.config.layers, decode=1 / step,
        decode_best=1 / sorted(steps)[len(steps) // 10], gigabytes=size / step / 1e9,
        read_seconds=read, share=None if read is None else read / step,
        prefill=statistics.median(prefills), by_blocks=blocks, batches=batches,
        llama_prefill=llama[0], llama_decode=llama[1],
    )  # fmt: skip


class _Run:
    """A model in memory, and what its steps took."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, dtype: torch.dtype) -> None:
        self.plan = plan
        draw = torch.Generator().manual_seed(0)
        rows = checkpoint.config.vocab_rows
        self.prompt = torch.randint(rows, (1, plan.prompt), generator=draw)
        started = time.perf_counter()
        self.model = Model(checkpoint, dtype, fast=True)
        self._forward(self.prompt[:, :1])
        self.loading = time.perf_counter() - started
        self.resident = _resident_bytes()
        self.peak = max(_peak_bytes(), self.resident)  # the kernel counts late
        self.weights = Read(self.model.weights)
        self.steps: list[float] = []
        self.reads: list[float] = []
        self.sizes: list[int] = []  # bytes that a step read
        self.skips: list[int] = []  # layers of a step without an expert

    def prefill(self) -> float:
        """Tokens a second."""
        return self.plan.prompt / seconds(lambda: self._forward(self.prompt))

    def decode(self, batch: int, count: int) -> list[float]:
        """Seconds of the steps behind the prompt; those of single sequences are kept."""
        model, cache = self.model, self.model.new_cache()
        logits = model.forward(self.prompt, cache=cache, last_only=True).logits
        cache = cache.fork(batch)
        tokens = logits[:, -1].topk(batch).indices.view(batch, 1)  # each goes its own way
        taken: list[float] = []
        for index in range(_WARMING + count):
            started = time.perf_counter()
            output = model.forward(tokens, cache=cache, last_only=True)
            tokens = output.logits[:, -1].argmax(-1, keepdim=True)
            spent = time.perf_counter() - started
            if index < _WARMING:
                continue
            taken.append(spent)
            if batch == 1:
                self._count(output.routes[..., 0, 0].tolist())
        if batch == 1:
            self.steps += taken
        return taken

    def _count(self, experts: list[int]) -> None:
        """Note what a step read, and read it once more."""
        regions = self.weights.of(experts)
        self.sizes.append(sum(size for _, size in regions))
        self.skips.append(experts.count(self.model.config.experts))
        library, _ = load()
        if library is not None:
            given = (Region * len(regions))(*regions)
            read = partial(library.zk_read, given, len(regions), self.plan.threads)
            self.reads.append(seconds(read))

    def steps_of(self, batch: int) -> list[float]:
        """Seconds of a batch's steps."""
        return self.decode(batch, max(2, self.plan.tokens // 4))

    def by_blocks(self) -> float | None:
        """Tokens a second without the native step, where there is one."""
        if not self.plan.blocks or self.model.step_refusal:
            return None
        self.model.step_refusal, self.model._step = "not now", None  # pyright: ignore[reportPrivateUsage]
        try:
            kept = len(self.steps)
            taken = self.decode(1, self.plan.blocks)
            for own in (self.steps, self.reads, self.sizes, self.skips):
                del own[kept:]
        finally:
            self.model.step_refusal = ""
        return 1 / statistics.median(taken)

    def _forward(self, ids: Tensor) -> None:
        self.model.forward(ids, cache=self.model.new_cache(), last_only=True)


class Read:
    """Where the weights lie that a token reads.

    Of the embedding that is one row, which does not count, unless the head is the same matrix.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        layers = range(weights.checkpoint.config.layers)
        head = weights.packed_head()
        last = [head] if head is not None else [block for _, block in weights.head_blocks()]
        self._whole = [*(part for layer in layers for part in weights.layer(layer).values()), *last]

    def of(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """(address, bytes) of every matrix.

        Args:
            experts: the token's in each layer; a skip reads nothing.
        """
        count = self._weights.checkpoint.config.experts
        chosen = [
            matrix
            for layer, expert in enumerate(experts)
            if expert < count
            for matrix in self._weights.expert(layer, expert)
        ]
        return [region(weight) for weight in (*self._whole, *chosen)]


def _llama(folder: Path, checkpoint: Checkpoint, plan: Plan) -> tuple[float, float]:
    """Prefill and decode of llama-bench, tokens a second."""
    program = next(iter(sorted(folder.rglob("llama-bench"))), None)
    if program is None:
        raise InputError("has no llama-bench", str(folder))
    command = [
        *(str(program), "-m", str(checkpoint.path), "-o", "json", "-r", "1"),
        *("-t", str(plan.threads), "-p", str(plan.prompt), "-n", str(plan.tokens)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["it failed"]
        raise InputError(f"llama-bench cannot run it: {reason[-1]}", checkpoint.path.name)
    rates = {row["n_gen"] > 0: row["avg_ts"] for row in json.loads(done.stdout)}
    return rates[False], rates[True]


def _resident_bytes() -> int:
    """What the process holds now (Linux), else at most until now."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _peak_bytes()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) << 10


def _peak_bytes() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
