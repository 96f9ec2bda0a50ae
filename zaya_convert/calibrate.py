"""Calibration: run the float model over tokens and keep what its matrices receive.

Tokens come in rounds. The first is the beginning of the data. While some expert has fewer than
``min_tokens`` and data is left, another round takes the documents that promise most for the starved
experts: routing follows the token to a large degree, so each document is scored by how often its
tokens went to them so far. Rounds end when every expert is served, the data ends, or ``max_tokens``
are used.

Every finished layer is on disk, so an interrupted run continues with ``resume``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from zaya_convert import __version__
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.data import Sequences, digest_of, take
from zaya_convert.errors import InputError
from zaya_convert.publish import empty, io_errors, locked
from zaya_convert.runtime.walk import (
    SITES,
    Matrices,
    Pieces,
    Site,
    Spread,
    Walk,
    check_finite_share,
    finite_rows,
)
from zaya_convert.sensitivity import measure
from zaya_convert.stats import EXPERT_SITES, Stats, identity
from zaya_convert.work import check_finite

Progress = Callable[[str, int, int], None]  # (what, done, of)


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        tokens: of the first round.
        max_tokens: in all rounds.
        min_tokens: what every expert should get.
        sensitivity: also measure how much errors of each matrix matter (``sensitivity.measure``).
    """

    tokens: int = 65536
    max_tokens: int = 131072
    min_tokens: int = 256
    sensitivity: bool = False


def calibrate(
    checkpoint: Checkpoint,
    documents: Sequences,
    settings: Settings,
    out: Path,
    *,
    threads: int | None = None,
    max_memory: int | None = None,
    resume: bool = False,
    progress: Progress = lambda what, done, of: None,
) -> Stats:
    """Calibrate a float checkpoint and write the statistics to ``out``.

    Args:
        documents: token sequences to choose from, in order of preference.
        threads: pieces of work at once (default: one per core); never changes the result.
        max_memory: bytes that the streams of activations may take; more go to disk.

    Raises:
        InputError: a quantized checkpoint, or activations that are not finite.
        OutputExistsError, OutputError: see ``publish``.
    """
    if any(info.spec for info in checkpoint.infos.values()):
        raise InputError("is quantized; calibrate the float model", checkpoint.path.name)
    out = out.absolute()
    with io_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial"
    facts = {
        "version": __version__,
        "model": identity(checkpoint),
        "data": documents.digest,
        "settings": asdict(settings),
    }
    fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    with locked(folder, out), io_errors(out):
        _claim(folder, fingerprint, resume)
        run = _Run(checkpoint, settings, folder, threads or os.cpu_count() or 1, max_memory)
        stats = run.collect(documents, progress)
        stats = Stats(stats.arrays, {**stats.facts, **facts}).write(out)
        shutil.rmtree(folder)
    return stats


def _claim(folder: Path, fingerprint: str, resume: bool) -> None:
    """Continue what lies in the folder, or empty it.

    Raises:
        InputError: ``resume``, but it is of another calibration.
    """
    mark = folder / "fingerprint"
    found = mark.read_text() if mark.is_file() else ""
    if resume and found and found != fingerprint:
        raise InputError(
            f"{folder} belongs to another calibration (model, data, settings or version changed); "
            "run without --resume to start over"
        )
    if not (resume and found):
        empty(folder)
        mark.write_text(fingerprint)


@dataclass
class _Run:
    checkpoint: Checkpoint
    settings: Settings
    folder: Path
    threads: int
    max_memory: int | None

    def collect(self, documents: Sequences, progress: Progress) -> Stats:
        config = self.checkpoint.config
        chosen, left = take(documents.ids, self.settings.tokens)
        if not chosen:
            raise InputError("holds no text to calibrate on", documents.description)
        total = _Totals(config.layers, config.experts)
        used: list[Tensor] = []
        rounds = 0
        while chosen:
            rounds += 1
            self._round(rounds, chosen, total, progress)
            used += chosen
            room = self.settings.max_tokens - sum(map(len, used))
            starved = total.counts[:, :-1] < self.settings.min_tokens
            if not bool(starved.any()) or room < 2 or not left:
                break
            order = _ranking(left, total, starved, config.vocab_rows)
            size = min(max(self.settings.tokens // 2, 1024), room)
            chosen, left = take([left[i] for i in order], size)
        arrays = total.arrays()
        if self.settings.sensitivity:
            arrays |= measure(self.checkpoint, used, threads=self.threads, progress=progress)
        arrays["tokens.ids"] = torch.cat(used).int()
        arrays["tokens.lengths"] = torch.tensor([len(ids) for ids in used], dtype=torch.int32)
        facts = {
            "description": documents.description,
            "tokens_digest": digest_of(used),
            "rounds": rounds,
            "not_finite": total.not_finite,
        }
        return Stats(arrays, facts)

    def _round(
        self, number: int, sequences: list[Tensor], total: _Totals, progress: Progress
    ) -> None:
        layers = self.checkpoint.config.layers
        tokens = torch.cat(sequences)
        done = self._finished(number)
        for layer in range(done):
            total.add(layer, load_file(self._file(number, layer)), tokens)
        if done < layers:
            walk = Walk(
                self.checkpoint, sequences, threads=self.threads, folder=self.folder / "streams",
                max_memory=self.max_memory,
            )  # fmt: skip
            walk.restore(self.folder / "walk", lambda layer: layer <= done)
            while walk.layer < layers:
                layer = walk.layer
                collector = _Collector(self.checkpoint)
                try:
                    walk.step(collector)
                except InputError:
                    if problems := _bad_weights(self.checkpoint):
                        raise InputError(problems) from None
                    raise
                if layer >= done:
                    found = collector.arrays(walk.routes[-1])
                    self._file(number, layer).write_bytes(save(found))
                    total.add(layer, found, tokens)
                if layer + 1 < layers:
                    walk.save(self.folder / "walk")
                what = f"calibrating, round {number}" if number > 1 else "calibrating"
                progress(what, layer + 1, layers)
            shutil.rmtree(self.folder / "walk", ignore_errors=True)

    def _file(self, number: int, layer: int) -> Path:
        return self.folder / f"round-{number}-layer-{layer}.safetensors"

    def _finished(self, number: int) -> int:
        """Layers of a round that an interrupted run left whole."""
        layers = range(self.checkpoint.config.layers)
        return next((i for i in layers if not _whole(self._file(number, i))), len(layers))


def _whole(path: Path) -> bool:
    try:
        return bool(load_file(path))
    except Exception:  # whatever is wrong with it, the layer is run again
        return False


def _bad_weights(checkpoint: Checkpoint) -> list[str]:
    """Weights that are not finite: the likeliest reason for activations that are not."""
    problems: list[str] = []
    for key, info in checkpoint.infos.items():
        try:
            check_finite(checkpoint.read_float(key).flatten(), info)
        except InputError as error:
            problems += error.problems
    return problems


class _Collector:
    """The visitor that changes nothing and sums up what it sees in one layer."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._found: dict[tuple[str, int], dict[str, Tensor]] = {}

    def visit(self, site: Site, pieces: Pieces, pooled: Pieces, spread: Spread) -> Matrices:
        """Sum squares and largest magnitudes of the inputs; return the float matrices."""
        matrices = tuple(self.checkpoint.read_float(key, torch.float32) for key in site.keys)
        width = matrices[0].shape[1]
        squares, absmax = torch.zeros(width, dtype=torch.float64), torch.zeros(width)
        count = bad = seen = 0
        for piece in pieces:
            rows, dropped = finite_rows(piece())
            seen += len(rows.inputs) + dropped
            bad += dropped
            if len(rows.inputs):
                squares += rows.inputs.square().sum(0).double()
                absmax = torch.maximum(absmax, rows.inputs.abs().amax(0))
                count += len(rows.inputs)
        check_finite_share(bad, seen, f"layer {site.layer}, {site.name}")
        self._found[site.name, site.expert] = {
            "squares": squares,
            "absmax": absmax,
            "count": torch.tensor(count),
            "not_finite": torch.tensor(bad),
        }
        return Matrices(matrices, matrices)

    def arrays(self, routes: Tensor) -> dict[str, Tensor]:
        """Sums by site, experts stacked, and the routes [tokens]."""
        result = {"routes": routes.int().contiguous()}
        for site in SITES:
            found = [v for (name, _), v in sorted(self._found.items()) if name == site]
            for kind in found[0]:
                values = torch.stack([entry[kind] for entry in found])
                result[f"{site}.{kind}"] = values if site in EXPERT_SITES else values[0]
        return result


class _Totals:
    """Sums over all rounds."""

    def __init__(self, layers: int, experts: int) -> None:
        self.counts = torch.zeros(layers, experts + 1, dtype=torch.int64)
        self.not_finite = 0
        self.routes: list[list[Tensor]] = [[] for _ in range(layers)]
        self.tokens: list[list[Tensor]] = [[] for _ in range(layers)]
        self._sums: dict[str, Tensor] = {}

    def add(self, layer: int, found: dict[str, Tensor], tokens: Tensor) -> None:
        """Add one layer of one round."""
        classes = self.counts.shape[1]
        self.counts[layer] += torch.bincount(found["routes"].long(), minlength=classes)
        self.routes[layer].append(found["routes"].long())
        self.tokens[layer].append(tokens)
        for site in SITES:
            self.not_finite += int(found[f"{site}.not_finite"].sum())
            for kind in ("squares", "absmax", "count"):
                name = f"layers.{layer}.{site}.{kind}"
                new = found[f"{site}.{kind}"]
                old = self._sums.get(name)
                if old is None:
                    self._sums[name] = new
                else:
                    self._sums[name] = torch.maximum(old, new) if kind == "absmax" else old + new

    def arrays(self) -> dict[str, Tensor]:
        """As in the file, without the tokens."""
        result = {"counts": self.counts}
        for layer in range(len(self.counts)):
            for site in SITES:
                name = f"layers.{layer}.{site}"
                count = self._sums[f"{name}.count"].double().clamp_min(1)
                squares = self._sums[f"{name}.squares"]
                count = count[:, None] if squares.ndim == 2 else count
                result[f"{name}.second_moment"] = (squares / count).float()
                result[f"{name}.absmax"] = self._sums[f"{name}.absmax"]
        return result


def _ranking(
    documents: Sequence[Tensor], total: _Totals, starved: Tensor, vocabulary: int
) -> list[int]:
    """Documents by promise for starved experts, best first (ties: earlier first).

    A document's promise is the mean over its tokens of the share of earlier occurrences of that
    token that went to a starved expert, summed over layers. Tokens not seen before promise the
    mean of all tokens, so that new material is not shut out.
    """
    seen = torch.zeros(vocabulary)
    hits = torch.zeros(vocabulary)
    for layer, needy in enumerate(starved):
        if not bool(needy.any()):
            continue
        tokens, routes = torch.cat(total.tokens[layer]), torch.cat(total.routes[layer])
        wanted = torch.cat([needy, needy.new_zeros(1)])[routes]
        seen.index_add_(0, tokens, torch.ones(len(tokens)))
        hits.index_add_(0, tokens, wanted.float())
    mean = float(hits.sum() / seen.sum().clamp_min(1))
    promise = torch.where(seen > 0, hits / seen.clamp_min(1), mean)
    scores = [float(promise[ids].mean()) for ids in documents]
    return sorted(range(len(documents)), key=lambda i: -scores[i])


def coverage(stats: Stats) -> dict[str, Any]:
    """The coverage table and what is wrong with it, for reports."""
    counts = stats.counts
    return {
        "tokens": stats.tokens,
        "min_tokens": stats.min_tokens,
        "skip_rate": stats.skip_rate,
        "least": int(counts[:, :-1].min()),
        "below_minimum": [
            {"layer": layer, "expert": expert, "tokens": tokens}
            for layer, expert, tokens in stats.below()
        ],
        "counts": counts.tolist(),
    }
