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

from zaya_kernels import onednn, reference
from zaya_kernels.request import Request

ENVIRONMENT = "ZAYA_KERNELS"


@dataclass(frozen=True, slots=True)
class Row:
    """One body of an op."""

    name: str
    can_run: Callable[[Request], str | None]
    body: Callable[..., Tensor]


def _always(_: Request) -> str | None:
    return None


OPS: Mapping[str, tuple[Row, ...]] = {
    "linear": (
        Row("onednn", onednn.can_run, onednn.linear),
        Row("reference", _always, reference.linear),
    ),
    "moe_ffn": (Row("reference", _always, reference.moe_ffn),),
}


def choose(op: str, request: Request) -> Row:
    """The row that runs ``op`` for this request.

    Raises:
        ValueError: the environment forces a row that does not exist or cannot run.
    """
    forced = os.environ.get(ENVIRONMENT, "")
    rows = [row for row in OPS[op] if forced in ("", row.name)]
    if not rows:
        names = ", ".join(sorted({row.name for row in OPS[op]}))
        raise ValueError(f"{ENVIRONMENT}={forced}: {op} has no such kernel; it has {names}")
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
