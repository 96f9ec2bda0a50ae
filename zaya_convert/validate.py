"""The proof: a candidate against its reference, on the same tokens.

The reference runs in the reference runtime with weights streamed from disk, so a model larger than
memory can be judged; so does the candidate, unless another engine is given for it. KL divergence is
the measure to trust; perplexity can hide damage, and a router that chooses another expert is what
breaks a top-1 mixture, so routing is compared too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint, SourceDigest
from zaya_convert.data import Sequences
from zaya_convert.equalize import with_scaling
from zaya_convert.errors import InputError
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.runtime.engine import Engine
from zaya_convert.runtime.model import Evaluation, Model
from zaya_quant.metrics import kl_divergence, perplexity_from_nll, sqnr_db_from_energy

# (what, done, of)
Progress = Callable[[str, int, int], None]

_LEAST_ENERGY = 1e-3  # of a row, in parts of the mean row's
_HEAD_ROWS = 256  # rows of logits held at once; the head is read once per such block
_KL_ROWS = 16  # rows in float64 at once


@dataclass(frozen=True)
class Bounds:
    """Limits a candidate must keep; None asks nothing. KL in nats, the others as shares."""

    max_kl: float | None = None
    max_kl_p99: float | None = None
    min_top1: float | None = None
    min_router: float | None = None
    max_perplexity_ratio: float | None = None


@dataclass(frozen=True)
class Check:
    """One condition and how it turned out; ``limit`` is None for conditions that always hold."""

    name: str
    value: float
    limit: float | None
    passed: bool

    def line(self) -> str:
        """For people."""
        mark = "ok  " if self.passed else "FAIL"
        limit = "" if self.limit is None else f" (limit {self.limit:g})"
        return f"{mark} {self.name}: {self.value:g}{limit}"


@dataclass(frozen=True)
class TensorError:
    """What became of one tensor.

    Attributes:
        role: "expert", "attention" or "float": see ``layout.Part``.
        sqnr_db: signal-to-quantization-noise ratio, in dB; inf: unchanged.
        gain: how much of the reference is in the candidate, <a, b> / <a, a>, in the row where that
            is furthest from 1; rows of next to nothing do not count.
    """

    name: str
    layer: int
    expert: int
    bits: int
    role: str
    sqnr_db: float
    gain: float


@dataclass(frozen=True)
class Report:
    """Everything measured; ``verdict`` decides the exit code.

    ``router_agreement_by_layer`` is the share of tokens sent to the same class, skip included.
    ``skip_rate`` is the candidate's share of routing decisions that chose the skip expert.
    ``reference_digest_matches`` is None when the candidate does not say what it was made from.
    ``engine`` is what ran the candidate, ``dtype`` what the reference runtime computed in.
    ``calibration`` and ``allocation`` are what the candidate's manifest says of them.
    ``undecided`` names checks that had too little evidence; they are not among ``checks``.
    """

    tokens: int
    data: str
    data_digest: str
    dtype: str
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    perplexity_reference: float
    perplexity_candidate: float
    router_agreement: float
    router_agreement_by_layer: list[float]
    skip_rate: float
    skip_rate_reference: float
    bits_per_weight: float
    bytes: int
    bytes_reference: int
    packing: str
    engine: str
    reference_digest_matches: bool | None
    tensors: list[TensorError]
    calibration: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    checks: list[Check] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "pass" when every check did; "inconclusive" when none failed but some are undecided."""
        if not all(check.passed for check in self.checks):
            return "fail"
        return "inconclusive" if self.undecided else "pass"


def validate(
    reference: Checkpoint,
    candidate: Checkpoint,
    sequences: Sequences,
    *,
    dtype: str = "float32",
    engine: Engine[Any] | None = None,
    bounds: Bounds | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Report:
    """Measure ``candidate`` against ``reference``.

    Many GGUF files have fewer rows of vocabulary than their model, because converters drop those
    without a token; such a candidate is compared on the rows that both have.

    Args:
        dtype: "float32" (measures the quantization alone) or "bfloat16" (as people run it).
        engine: what runs the candidate, instead of the reference runtime.

    Raises:
        InputError: the two are not the same architecture, or a weight is not finite.
    """
    tensors, matches = compare_weights(reference, candidate, progress)
    outputs: list[Evaluation] = []
    models: list[Engine[Any]] = [
        Model(reference, getattr(torch, dtype), resident=False),
        engine or Model(candidate, getattr(torch, dtype), resident=False),
    ]
    for name, model in zip(("reference", "candidate"), models, strict=True):

        def report_layers(done: int, of: int, name: str = name) -> None:
            progress(f"running {name}", done, of)

        outputs.append(model.evaluate(sequences.ids, report_layers))
    scores = _compare_logits(models, outputs, sequences.ids, progress)
    routes = [output.routes for output in outputs]
    agreement = (routes[0] == routes[1]).double().mean(dim=1)
    skip = reference.config.experts
    report = Report(
        tokens=sequences.tokens,
        data=sequences.description + _rows(reference, candidate),
        data_digest=sequences.digest,
        dtype=dtype,
        kl_mean=float(scores.kl.mean()),
        kl_p99=float(scores.kl.quantile(0.99)),
        kl_max=float(scores.kl.max()),
        top1_agreement=float(scores.same_top1.double().mean()),
        perplexity_reference=perplexity_from_nll(scores.nll[0]),
        perplexity_candidate=perplexity_from_nll(scores.nll[1]),
        router_agreement=float(agreement.mean()),
        router_agreement_by_layer=agreement.tolist(),
        skip_rate=float((routes[1] == skip).double().mean()),
        skip_rate_reference=float((routes[0] == skip).double().mean()),
        bits_per_weight=8 * candidate.bytes / candidate.weights,
        bytes=candidate.bytes,
        bytes_reference=reference.bytes,
        packing=candidate.format,
        engine=models[1].name,
        reference_digest_matches=matches,
        tensors=[row for row in tensors if row.role != "float"],
        calibration=_stated(candidate, "calibration", _CALIBRATION),
        allocation=_stated(candidate, "allocation", _ALLOCATION),
    )
    report.checks.extend(_checks(report, bounds or Bounds()))
    return report


_CALIBRATION = {"tokens": int, "data": str, "min_tokens": int, "counts": list,
                "below_minimum": list, "fallback": dict}  # fmt: skip
_ALLOCATION = {"target": str, "chosen": dict}


def _stated(candidate: Checkpoint, name: str, fields: Mapping[str, type]) -> dict[str, Any] | None:
    """A part of the candidate's manifest, if it is there and looks as we write it."""
    facts = candidate.manifest.get(name)
    if not isinstance(facts, dict):
        return None
    whole = all(isinstance(facts.get(key), kind) for key, kind in fields.items())
    tables = facts.get("counts") or facts.get("chosen")
    return facts if whole and tables and all(tables) else None


def _check_comparable(reference: Checkpoint, candidate: Checkpoint) -> None:
    ours, theirs = asdict(reference.config), asdict(candidate.config)
    tokens = ("pad_id", "bos_id", "eos_ids", "max_positions")
    if theirs["vocab_rows"] < ours["vocab_rows"]:
        tokens = (*tokens, "vocab_rows")
    different = [
        f"{name}: reference {ours[name]}, candidate {theirs[name]}"
        for name in ours
        if ours[name] != theirs[name] and name not in tokens
    ]
    if different:
        raise InputError(different, "reference and candidate are different models")


def _rows(reference: Checkpoint, candidate: Checkpoint) -> str:
    """On which rows of the vocabulary, when not all; for people."""
    all_rows, rows = reference.config.vocab_rows, candidate.config.vocab_rows
    return "" if rows == all_rows else f", the candidate's {rows:,} of {all_rows:,} rows"


@dataclass(frozen=True)
class _Scores:
    kl: Tensor  # [positions], nats
    same_top1: Tensor  # [positions], bool
    nll: tuple[Tensor, Tensor]  # reference, candidate: [positions with a next token], nats


def _compare_logits(
    models: list[Engine[Any]], outputs: list[Evaluation], ids: list[Tensor], progress: Progress
) -> _Scores:
    hidden = [torch.cat(output.hidden) for output in outputs]
    # The token each position should predict; -1 at the end of a sequence.
    targets = torch.cat([torch.cat([s[1:], s.new_tensor([-1])]) for s in ids])
    rows = min(model.config.vocab_rows for model in models)
    kl, same, nll = [], [], ([], [])
    for start in range(0, len(targets), _HEAD_ROWS):
        part = slice(start, start + _HEAD_ROWS)
        pair = [model.logits(h[part]) for model, h in zip(models, hidden, strict=True)]
        for row in range(0, len(pair[0]), _KL_ROWS):
            a, b = (logits[row : row + _KL_ROWS, :rows] for logits in pair)
            target = targets[part][row : row + _KL_ROWS]
            kl.append(kl_divergence(a, b))
            same.append(a.argmax(dim=-1) == b.argmax(dim=-1))
            for side, logits in zip(nll, (a, b), strict=True):
                side.append(_nll(logits, target))
        progress("comparing logits", min(start + _HEAD_ROWS, len(targets)), len(targets))
    return _Scores(torch.cat(kl), torch.cat(same), (torch.cat(nll[0]), torch.cat(nll[1])))


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p of the next token at the positions that have one, in nats, float64."""
    has_next = targets >= 0
    log_p = torch.log_softmax(logits[has_next].double(), dim=-1)
    return -log_p.gather(1, targets[has_next, None]).squeeze(1)


def compare_weights(
    reference: Checkpoint, candidate: Checkpoint, progress: Progress
) -> tuple[list[TensorError], bool | None]:
    """What became of every tensor but embedding and head, and whether the reference is the source.

    The second is None when the candidate does not say what it was made from.

    Raises:
        InputError: the two are not the same architecture, or a weight is not finite.
    """
    _check_comparable(reference, candidate)
    claimed = candidate.made_from.get("digest")
    digest = SourceDigest()
    scaled = with_scaling(reference, candidate.path)
    errors: list[TensorError] = []
    for done, (key, info) in enumerate(reference.infos.items(), 1):
        if PART_BY_NAME[key.part].role != "embedding":  # too large to be read at once
            errors.append(_tensor_error(scaled, candidate, key))
        if claimed and info.spec is None:
            own = blake3()
            for chunk in reference.chunks(key):
                own.update(chunk)
            digest.add(info, own.hexdigest())
        progress("comparing weights", done, len(reference.infos))
    if not claimed:
        return errors, None
    quantized = any(info.spec for info in reference.infos.values())
    return errors, None if quantized else digest.hexdigest(reference.infos) == claimed


def _tensor_error(reference: Checkpoint, candidate: Checkpoint, key: TensorKey) -> TensorError:
    a = reference.read_float(key, torch.float32)
    b = candidate.read_float(key, torch.float32)
    rows = min(len(a), len(b))  # of the vocabulary
    a, b = a[:rows], b[:rows]
    signal, noise = float(a.square().sum()), float((a - b).square().sum())
    if not math.isfinite(signal + noise):
        raise InputError("holds values that are not finite", str(key))
    spec = candidate.infos[key].spec
    bits = spec.bits if spec else 8 * candidate.infos[key].bytes // max(a.numel(), 1)
    sqnr = sqnr_db_from_energy(signal, noise)
    role = PART_BY_NAME[key.part].role
    return TensorError(key.module, key.layer, key.expert, bits, role, sqnr, _gain(a, b))


def _gain(a: Tensor, b: Tensor) -> float:
    """See ``TensorError``; a vector is one row."""
    a, b = (x.flatten(1) if x.dim() > 1 else x[None] for x in (a, b))
    energy = a.square().sum(1)
    there = energy > _LEAST_ENERGY * energy.mean()
    if not bool(there.any()):
        return 1.0
    gains = (a * b).sum(1)[there] / energy[there]
    return float(gains[(gains - 1).abs().argmax()])


def _checks(report: Report, bounds: Bounds) -> list[Check]:
    ratio = report.perplexity_candidate / report.perplexity_reference
    figures = (report.kl_mean, report.perplexity_reference, report.perplexity_candidate)
    finite = all(math.isfinite(figure) for figure in figures)
    checks = [
        Check("finite", float(finite), None, finite),
        Check("evidence (tokens)", report.tokens, None, report.tokens > 0),
    ]
    at_most = [
        ("KL divergence, mean", report.kl_mean, bounds.max_kl),
        ("KL divergence, 99th percentile", report.kl_p99, bounds.max_kl_p99),
        ("perplexity ratio", ratio, bounds.max_perplexity_ratio),
    ]
    at_least = [
        ("top-1 agreement", report.top1_agreement, bounds.min_top1),
        ("router agreement", report.router_agreement, bounds.min_router),
    ]
    # Written so that NaN fails.
    checks += [Check(n, v, limit, v <= limit) for n, v, limit in at_most if limit is not None]
    checks += [Check(n, v, limit, v >= limit) for n, v, limit in at_least if limit is not None]
    if report.reference_digest_matches is False:
        checks.append(Check("reference is the model the artifact was made from", 0, None, False))
    return checks
