"""Which body of an op runs: a literal table, the first row that can run wins.

Every row answers ``can_run(request)`` with None, or with the reason why it cannot; ``reference``
is last and always can. ``ZAYA_KERNELS=name`` in the environment forces a row (to compare, or to
step around a broken driver).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from zaya_kernels import native, onednn, reference
from zaya_kernels.packed import PackedWeight, pack, pack_fast
from zaya_kernels.request import Request
from zaya_kernels.triton import launch
from zaya_quant.qtensor import Quantized

ENVIRONMENT = "ZAYA_KERNELS"


@dataclass(frozen=True, slots=True)
class Row:
    """One body of an op.

    Attributes:
        name: what ``ZAYA_KERNELS`` calls it.
        can_run: None, or why it cannot.
        body: what runs.
        pack: for quantized weights only, which it turns, once, into what ``body`` reads fastest.
    """

    name: str
    can_run: Callable[[Request], str | None]
    body: Callable[..., Tensor]
    pack: Callable[[Quantized], PackedWeight] | None = None


def _always(_: Request) -> str | None:
    return None


OPS: Mapping[str, tuple[Row, ...]] = {
    "linear": (
        Row("triton", launch.can_run, launch.linear),
        Row("onednn", onednn.can_run, onednn.linear),
        Row("native_fast", native.can_run_fast, native.linear_fast, pack_fast),
        Row("native", native.can_run, native.linear, pack),
        Row("reference", _always, reference.linear),
    ),
    "moe_ffn": (
        Row("triton", launch.can_run, launch.moe_ffn),
        Row("native_fast", native.can_run_fast, native.moe_ffn_fast, pack_fast),
        Row("native", native.can_run, native.moe_ffn, pack),
        Row("reference", _always, reference.moe_ffn),
    ),
}


def choose(op: str, request: Request) -> Row:
    """The row that runs ``op`` for this request.

    Forcing a row that packs leaves float weights, which every model has too, on their way.

    Raises:
        ValueError: the environment forces a row that does not exist or cannot run.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    rows = [row for row in OPS[op] if forced in ("", row.name)]
    if not rows:
        names = ", ".join(sorted({row.name for row in OPS[op]}))
        raise ValueError(f"{ENVIRONMENT}={forced}: {op} has no such kernel; it has {names}")
    if request.spec is None and all(row.pack for row in rows):
        rows = list(OPS[op])
    reasons: list[str] = []
    for row in rows:
        reason = row.can_run(request)
        if reason is None:
            return row
        reasons.append(f"{row.name}: {reason}")
    raise ValueError(f"{ENVIRONMENT}={forced}: cannot run {op} ({'; '.join(reasons)})")


def explain(request: Request | None = None) -> Iterator[tuple[str, str, str]]:
    """(op, kernel, "in use" or why it is not) for every row, for ``doctor``."""
    request = request or Request()
    for op, rows in OPS.items():
        chosen = choose(op, request)
        for row in rows:
            reason = row.can_run(request) or f"{chosen.name} comes first"
            yield op, row.name, "in use" if row is chosen else reason
