"""What is meant by a quantization: bits, group, symmetry and the type of the scale.

A weight is a matrix ``[out, in]``. Every run of ``group_size`` consecutive inputs of one row
shares one scale (and, when asymmetric, one zero point)::

    value = (code - zero) * scale        zero = 0 when symmetric

Bits per weight count what a file has to hold: the codes, one scale per group, and one zero point
of ``bits`` bits per group when asymmetric.  int4, group 32, fp16 scale: 4 + 16/32 = 4.5.

**ggml block types.** Q4_0, Q5_0 and Q8_0 are such grids (symmetric, group 32, fp16 scale); the
others have grids of their own, which ``BlockSpec`` names and ``zaya_quant.blocks`` computes.

This module imports no torch, so that plans can be made without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ALLOWED_BITS = (2, 3, 4, 5, 6, 8)
PER_CHANNEL = -1
SCALE_BITS = {"float16": 16, "bfloat16": 16, "float32": 32}

# ggml block types by name: weights per block, bytes per block (ggml-common.h).
BLOCK_TYPES = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class QuantSpec:
    """Bits, group, symmetry and scale type of one quantized matrix; invalid ones cannot exist."""

    bits: int
    group_size: int  # a positive multiple of 16, or -1: one group per row
    symmetric: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not _is_int(self.bits) or self.bits not in ALLOWED_BITS:
            raise ValueError(f"bits is {self.bits!r}; allowed: {', '.join(map(str, ALLOWED_BITS))}")
        grouped = _is_int(self.group_size) and self.group_size > 0 and self.group_size % 16 == 0
        per_channel = _is_int(self.group_size) and self.group_size == PER_CHANNEL
        if not grouped and not per_channel:
            raise ValueError(
                f"group_size is {self.group_size!r}; allowed: a positive multiple of 16, "
                f"or {PER_CHANNEL} for one group per output channel"
            )
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric is {self.symmetric!r}; allowed: True, False")
        if self.scale_dtype not in SCALE_BITS:
            raise ValueError(
                f"scale_dtype is {self.scale_dtype!r}; allowed: {', '.join(SCALE_BITS)}"
            )

    @property
    def ggml_type(self) -> str:
        """The block type with just this grid, or ""."""
        return next((name for name, spec in CANONICAL.items() if spec == self), "")

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    @property
    def label(self) -> str:
        """For people: ``int4 group 32 symmetric float16``."""
        group = "per channel" if self.group_size == PER_CHANNEL else f"group {self.group_size}"
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"int{self.bits} {group} {kind} {self.scale_dtype}"

    def group_length(self, in_features: int) -> int:
        """Inputs per group; the last group of a row may be shorter."""
        if in_features < 1:
            raise ValueError(f"in_features is {in_features}; it must be positive")
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups per row, a shorter last one counted."""
        length = self.group_length(in_features)
        return -(-in_features // length)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Codes, scales and zero points, divided by the number of weights."""
        if out_features < 1:
            raise ValueError(f"out_features is {out_features}; it must be positive")
        per_group = SCALE_BITS[self.scale_dtype] + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.groups(in_features) / in_features

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantSpec:
        """The inverse of ``to_dict``; unknown keys are refused."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(f"unknown keys {unknown}; allowed: {', '.join(known)}")
        missing = [name for name in ("bits", "group_size") if name not in data]
        if missing:
            raise ValueError(f"missing keys {missing}")
        return cls(**data)


@dataclass(frozen=True)
class BlockGrid:
    """Geometry of a block type with a grid of its own; see ``zaya_quant.blocks``.

    Attributes:
        bits: of one code.
        sub_group: weights that share one scale.
        symmetric: no offset beside the scale.
        sub_bits: bits of the integer that scales a super-block's fp16 number for each sub-group;
            0 when the sub-group is the block and its scale is the fp16 number itself.
        codebook: codes name values of a table instead of whole numbers.
    """

    bits: int
    sub_group: int
    symmetric: bool = False
    sub_bits: int = 0
    codebook: bool = False

    @property
    def signed(self) -> bool:
        """Codes may be negative."""
        return self.symmetric and not self.codebook

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        return _range(self.bits, self.signed)

    @property
    def sub_range(self) -> tuple[int, int]:
        """The smallest and the largest integer of a sub-group, which is signed if symmetric."""
        return _range(self.sub_bits, self.symmetric)


def _range(bits: int, signed: bool) -> tuple[int, int]:
    low = -(1 << (bits - 1)) if signed else 0
    return low, low + (1 << bits) - 1


BLOCK_GRIDS = {
    "Q4_1": BlockGrid(4, 32),
    "Q5_1": BlockGrid(5, 32),
    "Q3_K": BlockGrid(3, 16, symmetric=True, sub_bits=6),
    "Q4_K": BlockGrid(4, 32, sub_bits=6),
    "Q5_K": BlockGrid(5, 32, sub_bits=6),
    "Q6_K": BlockGrid(6, 16, symmetric=True, sub_bits=8),
    "IQ4_NL": BlockGrid(4, 32, symmetric=True, codebook=True),
    "IQ4_XS": BlockGrid(4, 32, symmetric=True, sub_bits=6, codebook=True),
}


@dataclass(frozen=True)
class BlockSpec:
    """A ggml block type whose grid no ``QuantSpec`` describes; invalid ones cannot exist."""

    type: str

    def __post_init__(self) -> None:
        if self.type not in BLOCK_GRIDS:
            raise ValueError(f"type is {self.type!r}; allowed: {', '.join(BLOCK_GRIDS)}")

    @property
    def ggml_type(self) -> str:
        """The block type's name."""
        return self.type

    @property
    def grid(self) -> BlockGrid:
        """Geometry."""
        return BLOCK_GRIDS[self.type]

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.grid.bits

    @property
    def group_size(self) -> int:
        """Weights of a block: a row is a whole number of them."""
        return BLOCK_TYPES[self.type][0]

    @property
    def label(self) -> str:
        """For people: the type's name."""
        return self.type

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Everything in a block, divided by its weights."""
        weights, size = BLOCK_TYPES[self.type]
        return 8 * size / weights

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return asdict(self)


Spec = QuantSpec | BlockSpec

# The canonical grids: one and the same in GGUF, ONNX and compressed-tensors.
CANONICAL = {"Q4_0": QuantSpec(4, 32), "Q5_0": QuantSpec(5, 32), "Q8_0": QuantSpec(8, 32)}


# What llama.cpp takes where rows are no whole number of a type's blocks.
_FALLBACK = {
    "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
}  # fmt: skip


def fitting(spec: Spec, columns: int) -> Spec:
    """The spec, or where rows of ``columns`` are no whole number of its blocks its fallback."""
    fits = not isinstance(spec, BlockSpec) or columns % spec.group_size == 0
    return spec if fits else spec_of_type(_FALLBACK.get(spec.ggml_type, "Q8_0"))


def spec_of_type(name: str) -> Spec:
    """The spec of a ggml block type.

    Raises:
        ValueError: no such type.
    """
    if name in CANONICAL:
        return CANONICAL[name]
    if name not in BLOCK_GRIDS:
        raise ValueError(f"no block type {name!r}; there are {', '.join(BLOCK_TYPES)}")
    return BlockSpec(name)


def holding_type(spec: Spec, columns: int) -> str:
    """The block type whose bytes hold rows of ``columns`` codes of this grid exactly, or "".

    A symmetric grid fits into Q4_0, Q5_0 or Q8_0 when its scales are fp16 and no block of 32
    crosses a group: the scale of a group is then repeated for each of its blocks.
    """
    if isinstance(spec, BlockSpec):
        return spec.type if columns % BLOCK_TYPES[spec.type][0] == 0 else ""
    size = BLOCK_TYPES["Q4_0"][0]
    whole = columns % size == 0 and (spec.group_size == PER_CHANNEL or spec.group_size % size == 0)
    if not whole or not spec.symmetric or spec.scale_dtype != "float16":
        return ""
    return "Q4_0" if spec.bits <= 4 else "Q5_0" if spec.bits == 5 else "Q8_0"
