"""The yardstick: the reference itself, its matrices rounded to nearest on a coarse grid.

How much divergence a model bears differs between models by orders of magnitude, so no constant can
bound it. The yardstick turns the question into one about the model at hand: is the candidate
nearer to the reference than three bits a weight, rounded without any care, would be? It rounds the
matrices that the candidate rounded too: those it holds with less than 40 dB, which is what eight
bits reach; and all matrices where the candidate holds them all better than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from zaya_convert.checkpoint import Checkpoint, Scaling
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.validate import TensorError
from zaya_quant.methods import method
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import QuantSpec

BITS = 3
FINE_DB = 40.0
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


def scope(reference: Checkpoint, errors: Sequence[TensorError] = ()) -> list[TensorKey]:
    """Which matrices to round.

    Args:
        errors: of the candidate's matrices; none known: all.
    """
    keys = [k for k in reference.infos if PART_BY_NAME[k.part].role in ("expert", "attention")]
    coarse = {row.name for row in errors if row.sqnr_db < FINE_DB}
    return [key for key in keys if key.module in coarse] or keys


def rounded(reference: Checkpoint, keys: Iterable[TensorKey], bits: int = BITS) -> Checkpoint:
    """The reference with these matrices rounded to ``bits``."""
    changes = {key: Rounding(bits, reference.scaling.get(key)) for key in keys}
    return replace(reference, scaling={**reference.scaling, **changes})
