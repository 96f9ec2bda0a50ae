"""Plain rounding, as the gguf package does; for comparison and exact interchange.

Nothing is searched: the largest weight of a group gives its scale (``zaya_quant.blocks.absmax``).
Block types for which that package has no quantizer take the search of ``rtn``.
"""

from __future__ import annotations

from torch import Tensor

from zaya_quant import blocks
from zaya_quant.methods import rtn
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import Spec
from zaya_quant.stats import InputStats


def quantize(weight: Tensor, spec: Spec, stats: InputStats | None = None) -> Quantized:
    """``weight [out, in]`` rounded plainly; ``stats`` are not looked at.

    Raises:
        ValueError: a weight that is not finite, or a scale that overflows.
    """
    if blocks.has_plain_rounding(spec):
        return blocks.absmax(weight, spec)
    return rtn.quantize(weight, spec)
