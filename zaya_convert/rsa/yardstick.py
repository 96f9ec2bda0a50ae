"""The yardstick: the reference itself, its matrices rounded to nearest on a coarse grid.

How much divergence a model bears differs between models by orders of magnitude, so no constant can
bound it. The yardstick turns the question into one about the model at hand: is the candidate
nearer to the reference than three bits a weight, rounded without any care, would be?

It rounds what the candidate rounded: to three bits the matrices that it holds with less than 32 dB,
which six bits reach; to five bits (28 dB) those that it holds better, but not exactly. Where it
holds everything that well, all matrices are rounded to three bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from zaya_convert.checkpoint import Checkpoint, Scaling
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.validate import TensorError
from zaya_quant.methods import method
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import QuantSpec

BITS = 3
FINE_DB = 32.0
_FINE_BITS = 5
_GROUP = 32  # the finest in common use: the strictest yardstick of these bits


@dataclass(frozen=True)
class Rounding:
    """Rounds what is read."""

    bits: int
    before: Scaling | None = None

    def of(self, value: Tensor | Quantized) -> Tensor:
        """The tensor on the grid, as floats of its own dtype."""
        if self.before is not None:
            value = self.before.of(value)
        weight = value if isinstance(value, Tensor) else value.dequantize()
        rounded = method("rtn")(weight.float(), QuantSpec(self.bits, _GROUP), None)
        return rounded.dequantize(weight.dtype)

    def of_moments(self, moments: Tensor) -> Tensor:
        """Rounding leaves the inputs as they are."""
        return moments if self.before is None else self.before.of_moments(moments)


def grids(
    reference: Checkpoint, errors: Sequence[TensorError] = (), bits: int = BITS
) -> dict[TensorKey, int]:
    """To how many bits each matrix is rounded.

    Args:
        errors: of the candidate's matrices; none known: all to ``bits``.
        bits: in place of three.
    """
    keys = [k for k in reference.infos if PART_BY_NAME[k.part].role in ("expert", "attention")]
    held = {row.name: row.sqnr_db for row in errors}
    coarse = {key: bits for key in keys if held.get(key.module, math.inf) < FINE_DB}
    if not coarse:
        return dict.fromkeys(keys, bits)
    fine = {key: max(bits, _FINE_BITS) for key in keys if FINE_DB <= held[key.module] < math.inf}
    return coarse | fine


def rounded(reference: Checkpoint, bits: Mapping[TensorKey, int]) -> Checkpoint:
    """The reference with each of these matrices rounded to so many bits."""
    changes = {key: Rounding(count, reference.scaling.get(key)) for key, count in bits.items()}
    return replace(reference, scaling={**reference.scaling, **changes})
