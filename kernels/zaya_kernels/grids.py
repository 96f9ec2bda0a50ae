"""Grids of the Triton kernels, and how others are brought to them without changing a value."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from zaya_quant.qtensor import Quantized, QuantTensor
from zaya_quant.spec import PER_CHANNEL, QuantSpec, Spec

BITS = (4, 8)
GROUPS = (128, 64, 32)


def common(spec: Spec | None) -> QuantSpec | None:
    """The grid of 4 or 8 bits in groups of 32, 64 or 128 that holds another one's values.

    Narrow codes fit wider ones as they are, and a long group is several that share its scale.
    None where there is no such grid: groups of 16, ggml's other block types, floats.
    """
    if not isinstance(spec, QuantSpec):
        return None
    length = GROUPS[0] if spec.group_size == PER_CHANNEL else spec.group_size
    group = next((own for own in GROUPS if length % own == 0), None)
    if group is None:
        return None
    return replace(spec, bits=next(bits for bits in BITS if bits >= spec.bits), group_size=group)


def to_common(value: Quantized) -> QuantTensor:
    """The same values on the grid of ``common``.

    Raises:
        ValueError: there is none.
    """
    spec = common(value.spec)
    if spec is None or not isinstance(value, QuantTensor):
        raise ValueError(f"kernels have no grid for {value.spec.label}")
    if spec == value.spec:
        return value
    columns = value.shape[1]
    each = -(-value.spec.group_length(columns) // spec.group_size)

    def spread(of_group: Tensor) -> Tensor:
        return of_group.repeat_interleave(each, dim=1)[:, : spec.groups(columns)].contiguous()

    zeros = None if value.zeros is None else spread(value.zeros)
    return QuantTensor(value.codes, spread(value.scales), zeros, spec)
