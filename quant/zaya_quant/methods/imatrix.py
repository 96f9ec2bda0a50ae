"""Round to nearest on scales that are searched with the inputs' second moments as weights.

The squared error of input channel c counts E[x_c^2] times: the output error of the layer if its
input channels were uncorrelated. This is what llama.cpp does with an importance matrix, here on
any grid. One pass over the weights; the cheapest use of calibration data.
"""

from __future__ import annotations

from torch import Tensor

from zaya_quant.methods import rtn
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import Spec
from zaya_quant.stats import InputStats


def quantize(weight: Tensor, spec: Spec, stats: InputStats | None = None) -> Quantized:
    """``weight [out, in]`` rounded to nearest on scales searched under the second moments.

    Raises:
        ValueError: no statistics; a weight that is not finite, or needs wider scales.
    """
    if stats is None:
        raise ValueError("imatrix needs second moments; calibrate first, or use the method rtn")
    return rtn.quantize_searched(weight, spec, stats.second_moment)
