"""A quantized matrix as logical values, one code per element; packing belongs to the exporters.

::

    codes   [out, in]      int8, signed (symmetric)  or  uint8 (asymmetric)
    scales  [out, groups]  in spec.scale_dtype; may be negative; 0 only for a group of zeros
    zeros   [out, groups]  uint8 (asymmetric)  or  None

    value[r, c] = (codes[r, c] - zeros[r, c // G]) * scales[r, c // G]      in float32

The difference of two 8-bit integers is exact in float32 and the product is rounded once, which
is what GGUF, ONNX Runtime and compressed-tensors compute in float32 as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zaya_quant.spec import QuantSpec

SCALE_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class QuantTensor:
    """Codes, scales and zero points of one matrix; see the top of this file."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: QuantSpec

    def __post_init__(self) -> None:
        spec = self.spec
        _expect("codes", self.codes, torch.int8 if spec.symmetric else torch.uint8, None)
        rows, columns = self.codes.shape
        per_group = (rows, spec.groups(columns))
        _expect("scales", self.scales, SCALE_DTYPES[spec.scale_dtype], per_group)
        if spec.symmetric:
            if self.zeros is not None:
                raise ValueError("zeros given for a symmetric spec")
        elif self.zeros is None:
            raise ValueError("zeros missing for an asymmetric spec")
        else:
            _expect("zeros", self.zeros, torch.uint8, per_group)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values ``[out, in]``, computed in float32 and then cast."""
        values = self.codes.to(torch.float32)
        if self.zeros is not None:
            values = values - expand_groups(self.zeros.to(torch.float32), self.spec, self.shape[1])
        scales = self.scales.to(torch.float32)
        return (values * expand_groups(scales, self.spec, self.shape[1])).to(dtype)

    def validate_codes(self) -> None:
        """Raise ValueError when a code or a zero point lies outside the range of the spec.

        Not part of construction: it reads every code.
        """
        _in_range("codes", self.codes, self.spec)
        if self.zeros is not None:
            _in_range("zeros", self.zeros, self.spec)


def expand_groups(per_group: Tensor, spec: QuantSpec, in_features: int) -> Tensor:
    """``[out, groups]`` repeated to ``[out, in]``; the last group may be shorter."""
    length = spec.group_length(in_features)
    return per_group.repeat_interleave(length, dim=1)[:, :in_features]


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int] | None) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {dtype}")
    if tensor.ndim != 2:
        raise ValueError(f"{name} has {tensor.ndim} dimensions; expected 2")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {shape}")


def _in_range(name: str, tensor: Tensor, spec: QuantSpec) -> None:
    if tensor.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(tensor))
    if low < spec.qmin or high > spec.qmax:
        raise ValueError(
            f"{name} span {low}..{high}; {spec.bits}-bit codes must lie in {spec.qmin}..{spec.qmax}"
        )
