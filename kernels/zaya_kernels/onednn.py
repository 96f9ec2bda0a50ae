"""``linear`` in fp32 through oneDNN, which PyTorch carries but uses for narrower types only.

Its AVX-512 kernels run on every x86 maker's processors; the ones that PyTorch takes for fp32 are
about half as fast on AMD's. Sums are in fp32, in another order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zaya_kernels.request import Request


def can_run(request: Request) -> str | None:
    """None, or why not."""
    if request.device != "cpu" or request.dtype != torch.float32:
        return "for fp32 on the CPU only"
    if request.exact or request.spec is not None:
        return "sums in fp32, float weights only"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, _OP):
        return "this build of PyTorch has no oneDNN"
    return None


_OP = "_linear_pointwise"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [..., in], weight [out, in], all fp32."""
    if not x.numel() or not weight.numel():
        return torch.nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
