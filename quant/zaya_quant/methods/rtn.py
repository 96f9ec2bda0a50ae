"""Round to nearest on the best scale of a search: looks at weights only, needs no data.

The search is that of ``zaya_quant.affine``, or of ``zaya_quant.block_search`` for block types with
grids of their own; every input channel weighs the same.

Symmetric specs and block types run in the native library when it loads; its results are
bit-identical to the reference, so which one ran never shows in a file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zaya_quant import affine, native
from zaya_quant.block_search import quantize_blocks, quantize_natively
from zaya_quant.qtensor import Quantized, QuantTensor
from zaya_quant.spec import BlockSpec, QuantSpec, Spec
from zaya_quant.stats import InputStats


def quantize(weight: Tensor, spec: Spec, stats: InputStats | None = None) -> Quantized:
    """``weight [out, in]`` rounded to nearest on searched scales; ``stats`` are not looked at."""
    return quantize_searched(weight, spec)


def quantize_searched(weight: Tensor, spec: Spec, importance: Tensor | None = None) -> Quantized:
    """On the best scales found under ``importance [in]``, by the fastest body there is."""
    if isinstance(spec, BlockSpec):
        fast = weight.device.type == "cpu" and native.available()[0]
        return (quantize_natively if fast else quantize_blocks)(weight, spec, importance)
    return quantize_affine(weight, spec, importance)


def quantize_affine(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> QuantTensor:
    """``affine.quantize_affine`` on the fastest body there is."""
    if _runs_natively(weight, spec):
        return native.quantize(weight, spec, importance)
    return affine.quantize_affine(weight, spec, importance)


def needs_wider_scales(weight: Tensor, spec: QuantSpec) -> bool:
    """``affine.needs_wider_scales`` on the fastest body there is."""
    if not _runs_natively(weight, spec):
        return affine.needs_wider_scales(weight, spec)
    span = native.absmax_span(weight, spec.group_length(weight.shape[1]))
    return affine.leaves_fp16_range(torch.tensor(span) / spec.qmax)


def _runs_natively(weight: Tensor, spec: QuantSpec) -> bool:
    return spec.symmetric and weight.device.type == "cpu" and native.available()[0]
