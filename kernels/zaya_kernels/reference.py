"""The reference body of every op: plain torch, any device, any dtype, any shape.

Weights arrive as they are stored: a ``QuantTensor``, dequantized to the dtype of the activations,
or a float tensor, in whose dtype the product is computed before it is rounded to that of the
activations. float64 weights with float32 activations are the exact mode: the rounding then hides
the order of summation, so a row's result does not depend on how many rows stand beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_kernels.packed import PackedWeight
from zaya_quant.qtensor import BlockTensor, Quantized, QuantTensor

if TYPE_CHECKING:
    from zaya_kernels.triton.layout import Packed

Weight: TypeAlias = "Tensor | Quantized | PackedWeight | Packed"

# Rows of one expert computed at once. It bounds the intermediate [rows, 2F] when routing is skewed.
ROWS = 4096


class Expert(NamedTuple):
    """The three matrices of one SwiGLU expert: gate and up [F, d], down [d, F]."""

    gate: Weight
    up: Weight
    down: Weight


# Called with (expert, rows it receives [m, d], input of its down projection [m, F]).
ExpertObserver = Callable[[int, Tensor, Tensor], None]


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as a float tensor: as it is, or dequantized to ``dtype``."""
    return weight if isinstance(weight, Tensor) else weight.dequantize(dtype)


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, in the dtype of x.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None.

    Returns:
        [..., out].
    """
    matrix = dense(weight, x.dtype)
    wide_bias = None if bias is None else bias.to(matrix.dtype)
    return F.linear(x.to(matrix.dtype), matrix, wide_bias).to(x.dtype)


def embedding(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix.

    Args:
        ids: [n] integers, each the number of a row.
        weight: [rows, columns].
        dtype: of the result.

    Returns:
        [n, columns].
    """
    if isinstance(weight, Tensor):
        return weight[ids].to(dtype)
    if isinstance(weight, PackedWeight):
        return weight.rows(ids).to(dtype)
    if isinstance(weight, QuantTensor | BlockTensor):
        return weight.rows(ids).dequantize(dtype)
    return weight.select(ids).dequantize(dtype)


def moe_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Callable[[int], Expert],
    observe: ExpertObserver | None = None,
) -> Tensor:
    """Top-1 mixture of SwiGLU experts: ``down(silu(gate x) * up x) * weight`` for each row.

    Each expert that is used is fetched exactly once, in ascending order, and rows that no expert
    takes (``ids`` -1: the skip expert, padding) come out exactly 0.

    Args:
        x: [n, d].
        ids: [n] integers, the expert of each row or -1.
        weights: [n], the router's probability of that expert.
        experts: fetches the matrices of one expert.
        observe: sees what each expert's projections receive (calibration).

    Returns:
        [n, d] in the dtype of x.
    """
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    order = torch.argsort(ids, stable=True)
    used, counts = torch.unique_consecutive(ids[order], return_counts=True)
    runs = zip(used.tolist(), order.split(counts.tolist()), strict=True)
    for expert, run in runs:
        if expert < 0:
            continue
        gate, up, down = experts(expert)
        for rows in run.split(ROWS):
            inputs = x[rows]
            hidden = F.silu(linear(inputs, gate)) * linear(inputs, up)
            if observe is not None:
                observe(expert, inputs, hidden)
            out[rows] = linear(hidden, down) * weights[rows, None].to(x.dtype)
    return out
