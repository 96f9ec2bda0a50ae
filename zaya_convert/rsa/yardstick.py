"""The yardstick: the reference itself, its matrices rounded to nearest on a coarse grid.

How much divergence a model bears differs between models by orders of magnitude, so no constant can
bound it. The yardstick turns the question into one about the model at hand: is the candidate
nearer to the reference than three bits a weight, rounded without any care, would be?
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from zaya_convert.checkpoint import Checkpoint, Scaling
from zaya_convert.layout import PART_BY_NAME
from zaya_quant.methods import method
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import QuantSpec

BITS = 3
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


def rounded(reference: Checkpoint, bits: int = BITS) -> Checkpoint:
    """The reference with every expert and attention matrix rounded to ``bits``."""
    changes = {
        key: Rounding(bits, reference.scaling.get(key))
        for key in reference.infos
        if PART_BY_NAME[key.part].role in ("expert", "attention")
    }
    return replace(reference, scaling={**reference.scaling, **changes})
