"""What a checkpoint is, told from its headers: no weights are read and no torch is needed."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zaya_convert.checkpoint import Checkpoint


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Layout, dimensions, parameters, sizes and notes of an open checkpoint.

    ``problems`` is empty, since opening is strict and fails listing all of them; ``notes`` says
    where a legacy configuration was overruled by its tensors.

    ``bytes`` counts tensors, scales included; ``bits_per_weight`` is over all weights.
    """
    infos = checkpoint.infos
    total = checkpoint.weights
    size = checkpoint.bytes
    config = asdict(checkpoint.config)
    return {
        "path": str(checkpoint.path),
        "layout": checkpoint.format,
        **{name: list(value) if isinstance(value, tuple) else value
           for name, value in config.items()},
        "parameters_total": total,
        "parameters_active": active_parameters(checkpoint),
        "bytes": size,
        "bits_per_weight": 8 * size / total,
        "dtypes": sorted({i.stored_dtype for i in infos.values() if i.spec is None}),
        "storage": storage(checkpoint),
        "quantized": any(info.spec for info in infos.values()),
        "files": [path.name for path in checkpoint.files],
        "tokenizer": checkpoint.has_tokenizer,
        "source": dict(checkpoint.made_from),
        "notes": list(checkpoint.notes),
        "problems": [],
    }  # fmt: skip


def active_parameters(checkpoint: Checkpoint) -> int:
    """Parameters that work on one token.

    Everything outside the experts (attention, convolutions, router, norms, scales, and the
    embedding once, as the tied head), and one expert per layer: total - L·(E-1)·3·d·F. An untied
    model has a head of its own; of its embedding only one row is used: less (V-1)·d.
    """
    config = checkpoint.config
    expert = 3 * config.hidden * config.expert_width
    total = checkpoint.weights
    idle = config.layers * (config.experts - 1) * expert
    if not config.tied:
        idle += (config.vocab_rows - 1) * config.hidden
    return total - idle


def storage(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Tensors, weights and bytes by how they are stored."""
    rows: dict[str, dict[str, Any]] = {}
    for info in checkpoint.infos.values():
        kind = info.stored_dtype if info.spec is None else info.spec.label
        row = rows.setdefault(kind, {"kind": kind, "tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += info.numel
        row["bytes"] += info.bytes
    return list(rows.values())
