"""What ``quality.py`` and ``peers.py`` share: measured processes, one judge, one table.

The judge computes the figures of ``zaya-convert validate`` in float32, for many candidates: the
reference runs once. It adds the standard error of the mean KL divergence. Tokens of one sequence
are not independent, so the error is that of a mean over sequences.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.data import load_sequences
from zaya_convert.runtime.model import Model
from zaya_quant.metrics import kl_divergence, perplexity_from_nll

LAUNCHER = Path(__file__).parent / "launch.py"
HEADER = (
    "name", "bytes", "bits per weight", "KL mean ± error", "KL p99", "top-1", "router",
    "perplexity", "s", "CPU s", "MB",
)  # fmt: skip
_ROWS = 256  # rows of logits held at once


class RunError(Exception):
    """A process failed."""


@dataclass(frozen=True)
class Cost:
    """What a process took; the CPU time is the figure to trust on a shared machine."""

    seconds: float = 0
    cpu_seconds: float = 0
    peak_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
            max(self.peak_bytes, other.peak_bytes),
        )


def measured(
    command: Sequence[object], env: Mapping[str, str] | None = None, log: Path | None = None
) -> tuple[str, Cost]:
    """Run a command; its stdout and what it took.

    Args:
        env: variables to add to the environment.
        log: where its stderr goes; also its stdout, which is not returned then.

    Raises:
        RunError: it failed; the message ends with the last it said.
    """
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as said,
        tempfile.NamedTemporaryFile("r") as cost,
    ):
        done = subprocess.run(
            [sys.executable, "-S", str(LAUNCHER), cost.name, *map(str, command)],
            stdin=subprocess.DEVNULL, stdout=said if log else out, stderr=said,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        out.seek(0)
        said.seek(0)
        text = said.read()
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(text)
        if done.returncode:
            raise RunError(f"exit {done.returncode}: {' '.join(text.split())[-300:]}")
        return out.read(), Cost(*json.load(cost))


def cli(*words: object) -> tuple[dict[str, Any], Cost]:
    """Run a ``zaya-convert`` command; its JSON result and what it took."""
    out, cost = measured([sys.executable, "-m", "zaya_convert", *words, "--json", "-q"])
    return json.loads(out), cost


@dataclass(frozen=True)
class Scores:
    """A candidate against the reference; KL divergence in nats."""

    kl_mean: float
    kl_error: float
    kl_p99: float
    top1_agreement: float
    router_agreement: float
    perplexity: float


@dataclass(frozen=True)
class Row:
    """One line of the table; ``error`` says why there are no scores."""

    name: str
    bytes: int = 0
    bits_per_weight: float = 0
    scores: Scores | None = None
    cost: Cost = field(default_factory=Cost)
    error: str = ""


class Judge:
    """Compares candidates with one reference, in float32, on the same tokens."""

    def __init__(self, reference: Checkpoint, data: str | None, tokens: int) -> None:
        self.reference = reference
        self.sequences = load_sequences(reference, data, tokens=tokens, length=512)
        self.ids = self.sequences.ids
        self.model = Model(reference, resident=False)
        self.hidden, self.routes = self._run(self.model)

    def scores(self, candidate: Checkpoint, dtype: torch.dtype = torch.float32) -> Scores:
        """Run ``candidate`` and compare."""
        model = Model(candidate, dtype, resident=False)
        hidden, routes = self._run(model)
        targets = torch.cat([torch.cat([ids[1:], ids.new_tensor([-1])]) for ids in self.ids])
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(targets), _ROWS):
            part = slice(start, start + _ROWS)
            ours, theirs = self.model.logits(self.hidden[part]), model.logits(hidden[part])
            has_next = targets[part] >= 0
            log_p = torch.log_softmax(theirs[has_next].double(), dim=-1)
            nll = -log_p.gather(1, targets[part][has_next, None]).squeeze(1)
            same = ours.argmax(dim=-1) == theirs.argmax(dim=-1)
            found.append((kl_divergence(ours, theirs), same.double(), nll))
        kl, same, nll = (torch.cat(values) for values in zip(*found, strict=True))
        return Scores(
            kl_mean=float(kl.mean()),
            kl_error=self._error(kl),
            kl_p99=float(kl.quantile(0.99)),
            top1_agreement=float(same.mean()),
            router_agreement=float((routes == self.routes).double().mean()),
            perplexity=perplexity_from_nll(nll),
        )

    def row(self, name: str, candidate: Checkpoint, cost: Cost, size: int | None = None) -> Row:
        """A candidate's line; ``size`` in bytes when the folder does not tell."""
        size = candidate.bytes if size is None else size
        return Row(name, size, 8 * size / self.reference.weights, self.scores(candidate), cost)

    def floor(self) -> Row:
        """The reference itself in bfloat16, as people run it: what no candidate needs to beat."""
        row = Row("unquantized, run in bf16", self.reference.bytes)
        bits = 8 * row.bytes / self.reference.weights
        return replace(
            row, bits_per_weight=bits, scores=self.scores(self.reference, torch.bfloat16)
        )

    def _run(self, model: Model) -> tuple[Tensor, Tensor]:
        result = model.evaluate(self.ids)
        return torch.cat(result.hidden), result.routes

    def _error(self, kl: Tensor) -> float:
        """Standard error of the mean over tokens, sequences being what was drawn."""
        lengths = [len(ids) for ids in self.ids]
        sums = torch.stack([part.sum() for part in kl.split(lengths)])
        spread = sums - kl.mean() * torch.tensor(lengths)
        count = len(lengths)
        return float((spread.square().sum() * count / max(count - 1, 1)).sqrt() / len(kl))


def report(judge: Judge, rows: Sequence[Row], notes: Sequence[str], path: Path | None) -> None:
    """Print the table and what it was measured on; write the same as JSON."""
    data = judge.sequences
    facts = [f"{data.tokens:,} tokens of {data.description}, float32", *notes]
    print(table(rows) + "\n\n" + "; ".join(facts))
    if path:
        found = {"notes": facts, "data_digest": data.digest, "rows": [asdict(row) for row in rows]}
        path.write_text(json.dumps(found, indent=2) + "\n")


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    rule = "| --- |" + " ---: |" * (len(HEADER) - 1)
    return "\n".join([_cells(HEADER), rule, *map(line, rows)])


def line(row: Row) -> str:
    """One line of the table; also what is printed as soon as the row is known."""
    if row.scores is None:
        said = re.sub(r"\x1b\[[\d;]*m|[|\s]+", " ", row.error)
        return _cells([row.name, said, *[""] * (len(HEADER) - 2)])
    scores, cost = row.scores, row.cost
    took = [f"{cost.seconds:.1f}", f"{cost.cpu_seconds:.1f}", f"{cost.peak_bytes / 1e6:.0f}"]
    return _cells(
        [
            row.name,
            f"{row.bytes:,}",
            f"{row.bits_per_weight:.3f}",
            f"{scores.kl_mean:.3e} ± {scores.kl_error:.1e}",
            f"{scores.kl_p99:.2e}",
            f"{100 * scores.top1_agreement:.2f} %",
            f"{100 * scores.router_agreement:.2f} %",
            f"{scores.perplexity:.4f}",
            *(took if cost.seconds else ["", "", ""]),
        ]
    )


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
