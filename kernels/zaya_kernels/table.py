"""Which body of an op runs: a literal table, the first row that can run wins.

Every row answers ``can_run(request)`` with None, or with the reason why it cannot; ``reference``
is last and always can. ``ZAYA_KERNELS=name`` in the environment forces a row (to compare, or to
step around a broken driver) of every op that has one by this name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from zaya_kernels import native, onednn, reference
from zaya_kernels.packed import PackedWeight, pack, pack_fast
from zaya_kernels.request import FLOATS, TILES, WORDS, Request
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
        layout: how weights lie that it reads beside logical values; "": any way.
        pack: for quantized weights only, which it turns, once, into what ``body`` reads fastest.
    """

    name: str
    can_run: Callable[[Request], str | None]
    body: Callable[..., Tensor]
    layout: str = ""
    pack: Callable[[Quantized], PackedWeight] | None = None

    def refusal(self, request: Request) -> str | None:
        """None, or why it cannot run."""
        if self.layout and request.layout not in ("", self.layout):
            return f"reads {self.layout}; these weights lie as {request.layout}"
        return self.can_run(request)


def _always(_: Request) -> str | None:
    return None


OPS: Mapping[str, tuple[Row, ...]] = {
    "linear": (
        Row("triton", launch.can_run, launch.linear, WORDS),
        Row("onednn", onednn.can_run, onednn.linear, FLOATS),
        Row("native_fast", native.can_run_fast, native.linear_fast, TILES, pack_fast),
        Row("native", native.can_run, native.linear, TILES, pack),
        Row("reference", _always, reference.linear),
    ),
    "moe_ffn": (
        Row("triton", launch.can_run, launch.moe_ffn, WORDS),
        Row("native_fast", native.can_run_fast, native.moe_ffn_fast, TILES, pack_fast),
        Row("native", native.can_run, native.moe_ffn, TILES, pack),
        Row("reference", _always, reference.moe_ffn),
    ),
    "embedding": (
        Row("native", native.can_run, native.embedding, TILES, pack),
        Row("reference", _always, reference.embedding),
    ),
}


def choose(op: str, request: Request) -> Row:
    """The row that runs ``op`` for this request.

    Forcing a row that packs leaves float weights, which every model has too, on their way.

    Raises:
        ValueError: the environment forces a row that does not exist or cannot run.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    names = {row.name for rows in OPS.values() for row in rows}
    if forced and forced not in names:
        known = ", ".join(sorted(names))
        raise ValueError(f"{ENVIRONMENT}={forced}: there is no such kernel; there are {known}")
    rows = [row for row in OPS[op] if forced == row.name] or list(OPS[op])
    if request.spec is None and not request.layout and all(row.pack for row in rows):
        rows = list(OPS[op])
    reasons: list[str] = []
    for row in rows:
        reason = row.refusal(request)
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
            reason = row.refusal(request) or f"{chosen.name} comes first"
            yield op, row.name, "in use" if row is chosen else reason
