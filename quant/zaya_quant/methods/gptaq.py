"""GPTQ towards what the float model computes, not towards the float weights (GPTAQ, 2504.02692).

Once earlier layers are quantized a matrix receives x where the float model has r. It should then
give W r, so the weights to round are those that come closest to that on x::

    T = argmin mean |T x - W r|^2 = W + strength · W · drift · inverse(H + damping)

with drift = mean (r - x) x^T. GPTAQ derives its update by carrying this term through the order of
columns; solving for T first has the same minimum and leaves GPTQ as it is. ``strength`` below 1
keeps part of the gain and less of the noise of few tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zaya_quant.affine import check_weight
from zaya_quant.methods import gptq
from zaya_quant.products import times_transposed
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import Spec
from zaya_quant.stats import InputStats

STRENGTH = 0.5


def quantize(weight: Tensor, spec: Spec, stats: InputStats | None = None) -> Quantized:
    """``weight [out, in]`` rounded so that its output stays what the float model's is.

    Raises:
        ValueError: as ``gptq.quantize``.
    """
    if stats is None or stats.hessian is None:
        raise ValueError("gptaq needs a Hessian; calibrate first, or use the method rtn")
    check_weight(weight)
    return gptq.quantize_towards(corrected(weight, stats), spec, stats)


def corrected(weight: Tensor, stats: InputStats, strength: float = STRENGTH) -> Tensor:
    """The weights T [out, in] of the formula above, fp32; the weights themselves without drift."""
    weight = weight.float()
    pull = stats.pull()
    if pull is None:
        return weight
    correction = times_transposed(weight, pull.t())
    if not bool(torch.isfinite(correction).all()):
        return weight
    return weight + strength * correction
