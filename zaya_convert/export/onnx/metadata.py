"""What a graph's ``metadata_props`` say: where it came from, and how each tensor is quantized.

The graph itself tells bits, groups and symmetry; that scales were fp16 or bf16 before they became
float32, which decides what they can become again, only stands here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, groupby, repeat
from typing import TYPE_CHECKING

from zaya_convert import __version__
from zaya_convert.errors import InputError
from zaya_convert.export.container import Outcome
from zaya_convert.layout import TensorKey
from zaya_quant.spec import QuantSpec, Spec

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

PREFIX = "zaya_convert."
SPECS = PREFIX + "specs"


def specs_of(plan: Plan, outcome: Outcome) -> dict[TensorKey, Spec | None]:
    """How every tensor is quantized, once that is known of its scales."""
    widened = set(outcome.widened)
    found: dict[TensorKey, Spec | None] = {}
    for step in plan.steps:
        spec = step.spec
        if isinstance(spec, QuantSpec) and str(step.key) in widened:
            spec = replace(spec, scale_dtype="bfloat16")
        found[step.key] = spec
    return found


def entries(plan: Plan, outcome: Outcome, specs: Mapping[TensorKey, Spec | None]) -> dict[str, str]:
    """All ``metadata_props``."""
    found = {
        "version": __version__,
        "packing": plan.packing,
        "source.digest": outcome.source_digest,
        "source.model": plan.origin,
        "recipe": json.dumps(plan.how, sort_keys=True) if plan.how else "",
        "skip_mode": "zero",
    }
    return {PREFIX + name: value for name, value in found.items() if value} | {
        SPECS: write_specs(specs.values())
    }


def write_specs(specs: Iterable[Spec | None]) -> str:
    """Specs of all tensors in the order of execution, as runs of equal ones: ``[[spec, n], ...]``.

    ``null`` for floats.
    """
    runs = [[spec and spec.to_dict(), len([*run])] for spec, run in groupby(specs)]
    return json.dumps(runs, separators=(",", ":"))


def read_specs(text: str, keys: Iterable[TensorKey]) -> dict[TensorKey, QuantSpec | None]:
    """The inverse of ``write_specs``.

    Raises:
        InputError: not what it writes, or of another number of tensors.
    """
    try:
        runs = [(spec and QuantSpec.from_dict(spec), count) for spec, count in json.loads(text)]
        # lazily: a count may be absurd
        specs = chain.from_iterable(repeat(spec, count) for spec, count in runs)
        return dict(zip(keys, specs, strict=True))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{SPECS} is damaged: {error}", "metadata") from None
