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

from zaya_quant.spec import BLOCK_TYPES, BlockSpec, QuantSpec

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

    def rows(self, part: slice | Tensor) -> QuantTensor:
        """Some rows."""
        zeros = None if self.zeros is None else self.zeros[part]
        return QuantTensor(self.codes[part], self.scales[part], zeros, self.spec)

    def parameters(self) -> Tensor:
        """Every float number beside the codes, flat: what must be finite."""
        return self.scales.flatten()

    def validate_codes(self) -> None:
        """Raise ValueError when a code or a zero point lies outside the range of the spec.

        Not part of construction: it reads every code.
        """
        _in_range("codes", self.codes, self.spec)
        if self.zeros is not None:
            _in_range("zeros", self.zeros, self.spec)


# values of the codes of IQ4_NL and IQ4_XS: ggml's kvalues_iq4nl
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class BlockTensor:
    """A matrix on the grid of a ggml block type, as logical values; ``blocks`` packs it.

    ::

                codes     offsets  sub_scales  sub_mins  value
        Q4_1    0..15     m                              d code + m
        Q5_1    0..31     m                              d code + m
        Q3_K    -4..3              -32..31               (d sub_scale) code
        Q4_K    0..15     dmin     0..63       0..63     (d sub_scale) code - (dmin sub_min)
        Q5_K    0..31     dmin     0..63       0..63     (d sub_scale) code - (dmin sub_min)
        Q6_K    -32..31            -128..127             (d sub_scale) code
        IQ4_NL  0..15                                    d IQ4_NL_LEVELS[code]
        IQ4_XS  0..15              -32..31               (d sub_scale) IQ4_NL_LEVELS[code]

    ``codes [out, in]``, ``sub_scales`` and ``sub_mins [out, groups]`` are int8 where they may be
    negative, else uint8; ``scales`` (d) and ``offsets [out, blocks]`` are float16.  What a type
    does not have is None.

    Computed in float32, every product and difference rounded, as ggml and the gguf package do.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    sub_scales: Tensor | None
    sub_mins: Tensor | None
    spec: BlockSpec

    def __post_init__(self) -> None:
        grid = self.spec.grid
        _expect("codes", self.codes, torch.int8 if grid.signed else torch.uint8, None)
        rows, columns = self.codes.shape
        size = BLOCK_TYPES[self.spec.type][0]
        if columns % size:
            raise ValueError(f"{columns} columns are no whole number of blocks of {size}")
        per_block, per_group = (rows, columns // size), (rows, columns // grid.sub_group)
        _expect("scales", self.scales, torch.float16, per_block)
        for name, tensor, wanted, dtype, shape in (
            ("offsets", self.offsets, not grid.symmetric, torch.float16, per_block),
            ("sub_scales", self.sub_scales, grid.sub_bits > 0,
             torch.int8 if grid.symmetric else torch.uint8, per_group),
            ("sub_mins", self.sub_mins, grid.sub_bits > 0 and not grid.symmetric, torch.uint8,
             per_group),
        ):  # fmt: skip
            if wanted != (tensor is not None):
                raise ValueError(f"{name} {'missing' if wanted else 'given'} for {self.spec.type}")
            if tensor is not None:
                _expect(name, tensor, dtype, shape)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        rows, columns = self.codes.shape
        return rows, columns

    def steps(self) -> Tensor:
        """What a code counts in: float32 ``[out, groups]``."""
        if self.sub_scales is None:
            return self.scales.float()
        return self._per_group(self.scales) * self.sub_scales.float()

    def bases(self) -> Tensor | None:
        """What is added to code times step: float32 ``[out, groups]``; None when symmetric."""
        if self.offsets is None:
            return None
        if self.sub_mins is None:
            return self.offsets.float()
        return -(self._per_group(self.offsets) * self.sub_mins.float())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values ``[out, in]``, computed in float32 and then cast."""
        length = self.spec.grid.sub_group
        if self.spec.grid.codebook:
            levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32)
            values = levels[self.codes.long()]
        else:
            values = self.codes.float()
        values = values.unflatten(1, (-1, length)) * self.steps().unsqueeze(2)
        bases = self.bases()
        if bases is not None:
            values += bases.unsqueeze(2)
        return values.flatten(1).to(dtype)

    def rows(self, part: slice | Tensor) -> BlockTensor:
        """Some rows."""
        tensors = (self.codes, self.scales, self.offsets, self.sub_scales, self.sub_mins)
        return BlockTensor(*(None if t is None else t[part] for t in tensors), self.spec)  # type: ignore[arg-type]

    def parameters(self) -> Tensor:
        """Every float number beside the codes, flat: what must be finite."""
        found = [t.flatten() for t in (self.scales, self.offsets) if t is not None]
        return torch.cat(found)

    def validate_codes(self) -> None:
        """Raise ValueError when a code or a sub-group's integer lies outside its range."""
        grid = self.spec.grid
        _within("codes", self.codes, *grid.code_range)
        for name, tensor in (("sub_scales", self.sub_scales), ("sub_mins", self.sub_mins)):
            if tensor is not None:
                _within(name, tensor, *grid.sub_range)

    def _per_group(self, per_block: Tensor) -> Tensor:
        size, length = BLOCK_TYPES[self.spec.type][0], self.spec.grid.sub_group
        return per_block.float().repeat_interleave(size // length, dim=1)


Quantized = QuantTensor | BlockTensor


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
    _within(name, tensor, spec.qmin, spec.qmax, f"{spec.bits}-bit codes must lie in ")


def _within(name: str, tensor: Tensor, least: int, most: int, what: str = "allowed: ") -> None:
    if tensor.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(tensor))
    if low < least or high > most:
        raise ValueError(f"{name} span {low}..{high}; {what}{least}..{most}")
