"""How the Triton kernels read a quantized matrix: 16 bytes a thread along the inputs.

A *block* is four 32-bit words, 32 codes of 4 bits or 16 of 8 bits. With ``per`` codes to a word,
code ``s`` of word ``i`` belongs to input ``4 s + i`` of the block::

    words   [rows, 4 * blocks]  int32, unsigned codes, code s at bit ``bits * s``
    scales  [rows, groups]      as they were stored
    zeros   [rows, groups]      uint8, or None: the middle of the range (symmetric codes)

So what lies at one bit of a block's four words are four neighbouring inputs: their activations
are one vector load, and no thread needs another's weights. Inputs are padded to whole groups.
Experts are stacked in front: ``[experts, rows, ...]``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_kernels.reference import Expert, Weight
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

WORDS = 4  # 32-bit words of a block: 16 bytes, the widest load of every target


@dataclass(frozen=True)
class Packed:
    """One matrix, or equal ones of several experts, as the kernels read it."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: QuantSpec
    columns: int

    @property
    def rows(self) -> int:
        """Outputs of one matrix."""
        return self.words.shape[-2]

    @property
    def blocks(self) -> int:
        """Blocks in a row."""
        return self.words.shape[-1] // WORDS

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one matrix."""
        return self.rows, self.columns

    def select(self, part: int | slice | Tensor) -> Packed:
        """One of several matrices, or some rows of one."""
        zeros = None if self.zeros is None else self.zeros[part]
        return replace(self, words=self.words[part], scales=self.scales[part], zeros=zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values ``[out, in]``, for bodies that compute with floats."""
        return unpack(self).dequantize(dtype)

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(
            self, words=self.words.to(device), scales=self.scales.to(device), zeros=zeros
        )


@dataclass(frozen=True)
class PackedExperts:
    """The experts of one layer: gate rows, then up rows, and down."""

    gate_up: Packed
    down: Packed

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.down.words.shape[0]

    def __call__(self, expert: int) -> Expert:
        """One expert as logical values, so that a bank serves every other body too."""
        both = unpack(self.gate_up.select(expert))
        half = both.shape[0] // 2
        gate, up = both.rows(slice(None, half)), both.rows(slice(half, None))
        return Expert(gate, up, unpack(self.down.select(expert)))


def pack(weight: QuantTensor) -> Packed:
    """Repack a matrix of 4- or 8-bit codes."""
    spec, (rows, columns) = weight.spec, weight.shape
    codes = weight.codes
    if spec.symmetric:
        codes = (codes.to(torch.int16) - spec.qmin).to(torch.uint8)
    padding = spec.groups(columns) * spec.group_size - columns
    codes = F.pad(codes, (0, padding))
    by_word = codes.view(rows, -1, 32 // spec.bits, WORDS).transpose(-1, -2)
    if spec.bits == 4:
        by_word = by_word[..., 0::2] | by_word[..., 1::2] << 4
    words = by_word.contiguous().view(torch.int32).view(rows, -1)
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    return Packed(words, weight.scales.contiguous(), zeros, spec, columns)


def unpack(packed: Packed) -> QuantTensor:
    """The inverse of ``pack``."""
    spec = packed.spec
    per, rows = 32 // spec.bits, packed.rows
    by_word = packed.words.contiguous().view(torch.uint8).view(rows, -1, WORDS, 4)
    if spec.bits == 4:
        by_word = torch.stack((by_word & 15, by_word >> 4), -1).flatten(-2)
    codes = by_word.view(rows, -1, WORDS, per).transpose(-1, -2).reshape(rows, -1)
    codes = codes[:, : packed.columns]
    if spec.symmetric:
        codes = (codes.to(torch.int16) + spec.qmin).to(torch.int8)
    return QuantTensor(codes.contiguous(), packed.scales, packed.zeros, spec)


def pack_experts(experts: Sequence[Expert], device: torch.device) -> PackedExperts:
    """Repack the experts of one layer; all must have one form."""
    gate_ups = [
        _join([packed_once(e.gate, device), packed_once(e.up, device)], torch.cat) for e in experts
    ]
    downs = [packed_once(e.down, device) for e in experts]
    return PackedExperts(_join(gate_ups, torch.stack), _join(downs, torch.stack))


def packed_once(weight: Weight, device: torch.device) -> Packed:
    """A matrix repacked on ``device``, remembered for as long as the matrix lives.

    Raises:
        TypeError: the weight is neither a ``QuantTensor`` nor repacked.
    """
    if isinstance(weight, Packed):
        return weight
    if not isinstance(weight, QuantTensor):
        raise TypeError(f"triton kernels take integer grids, not {type(weight).__name__}")
    key = (id(weight), device)
    if key not in _PACKED:
        _PACKED[key] = pack(weight).to(device)
        weakref.finalize(weight, _PACKED.pop, key, None)
    return _PACKED[key]


# By identity: QuantTensor compares its tensors, which no dictionary can use.
_PACKED: dict[tuple[int, torch.device], Packed] = {}


def _join(parts: list[Packed], how: Callable[[list[Tensor]], Tensor]) -> Packed:
    """Concatenate or stack matrices of one form."""
    first = parts[0]
    if any((p.spec, p.columns) != (first.spec, first.columns) for p in parts):
        raise ValueError("the matrices of one layer's experts must share one grid and one width")
    zeros = [p.zeros for p in parts if p.zeros is not None]
    words, scales = how([p.words for p in parts]), how([p.scales for p in parts])
    return replace(first, words=words, scales=scales, zeros=how(zeros) if zeros else None)
