"""``torch.ops.zaya``: the table's ops on packed weights, each one node of a graph.

    linear(x, weight, form, bias)                        x @ weight.T + bias
    moe_ffn(x, ids, shares, experts, gate_up, down)      top-1 mixture of SwiGLU experts
    embedding(ids, weight, form, dtype)                  rows of a matrix

A packed matrix is a few plain tensors and a ``Form``, the numbers that say what they mean:

    layout   tensors
    tiles    [nbytes] uint8, as ``packed`` has it: for the native kernels, on the CPU
    words    the words, scales and zeros of ``triton.layout``, the bytes of each as uint8
    floats   the matrix itself

Experts are stacked in front. Bytes are uint8 so that no ``Module.to(dtype)`` converts them.
``pack`` and ``pack_experts`` choose the layout that the table's choice for the coming calls reads:
tiles hold every grid as it is stored, words those of ``grids``, and what is left becomes floats.
Each call takes the table's choice for its layout, the dtype of the activations and their device.
There are no gradients: where one would be needed, a call raises RuntimeError.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_kernels.grids import common, to_common
from zaya_kernels.packed import ALIGNMENT, PackedWeight
from zaya_kernels.reference import Expert, Weight
from zaya_kernels.request import FLOATS, TILES, WORDS, Request
from zaya_kernels.table import ENVIRONMENT, Row, choose
from zaya_kernels.triton import layout as words
from zaya_quant.qtensor import SCALE_DTYPES, Quantized
from zaya_quant.spec import BLOCK_TYPES, BlockSpec, QuantSpec, Spec

LAYOUTS = (TILES, WORDS, FLOATS)
_SCALES = tuple(SCALE_DTYPES)
_BLOCKS = ("", *BLOCK_TYPES)
_MIXED = "mixed"  # two layouts: for rows that read any
_FLOAT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ID_TYPES = (torch.int32, torch.int64)


class Form(NamedTuple):
    """What the tensors of a matrix mean; with floats, only the first three numbers count."""

    layout: int  # of LAYOUTS
    rows: int  # of gate and up together
    columns: int
    bits: int = 0
    group: int = 0
    symmetric: int = 0
    scale: int = 0  # of SCALE_DTYPES
    block: int = 0  # of _BLOCKS: a ggml block type, whose grid replaces the four above
    fast: int = 0  # activations may be rounded to int8

    @property
    def spec(self) -> Spec | None:
        """The grid, None for floats."""
        return _spec(self.bits, self.group, self.symmetric, self.scale, self.block)

    @property
    def held_as(self) -> str:
        """The name of the layout."""
        return LAYOUTS[self.layout]


@dataclass(frozen=True)
class Matrix:
    """A packed matrix: what ``linear`` and ``embedding`` take."""

    tensors: list[Tensor]
    form: Form


@dataclass(frozen=True)
class Experts:
    """The packed experts of one layer: what ``moe_ffn`` takes; gate rows come before up rows."""

    tensors: list[Tensor]
    gate_up: Form
    down: Form


# Not ``custom_op``, whose handling of gradients costs several times what a small product does.
_LIBRARY = torch.library.Library("zaya", "DEF")


def _op(schema: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register a function as an op, on CPUs and on GPUs (which ROCm's torch calls CUDA, too)."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(schema.partition("(")[0], function, key)
        return function

    return register


def pack(value: Tensor | Quantized, request: Request, op: str = "linear") -> Matrix:
    """Pack a matrix for calls such as ``request``, on its device.

    Args:
        value: [out, in].
        request: dtype, device and ``fast`` of the coming calls; its spec does not count.
        op: what will be called.

    Raises:
        ValueError: the environment forces a kernel that cannot run, or a code is out of its range.
    """
    if isinstance(value, Tensor):
        return _floats(value, request)
    near = common(value.spec)
    row = choose(op, replace(request, spec=near or value.spec))
    if row.pack is not None:
        data = row.pack(value).data
        form = _form(row.layout, value.shape, value.spec, request.fast)
        return Matrix([F.pad(data, (0, -len(data) % ALIGNMENT))], form)
    if near is None:
        return _floats(value.dequantize(request.dtype), request)
    value = to_common(value)
    value.validate_codes()
    packed = words.pack(value).to(torch.device(request.device))
    parts = (packed.words, packed.scales, packed.zeros)
    form = _form(WORDS, value.shape, near, request.fast)
    return Matrix([part.view(torch.uint8) for part in parts if part is not None], form)


def pack_experts(
    experts: Sequence[Sequence[Tensor | Quantized]], request: Request
) -> list[tuple[list[int], Experts]]:
    """Pack the experts of one layer: (which, their bank) for each form that occurs among them.

    Args:
        experts: gate and up [F, d] and down [d, F] of each.
        request: as for ``pack``.
    """
    banks: dict[tuple[Form, Form], tuple[list[int], list[tuple[Matrix, Matrix]]]] = {}
    for index, three in enumerate(experts):
        gate, up, down = (pack(matrix, request, "moe_ffn") for matrix in three)
        if gate.form != up.form:  # of several grids, which no kernel takes
            gate, up = (_as_floats(matrix, request.dtype) for matrix in (gate, up))
        # tiles of two matrices lie behind each other, everything else is rows
        joined = [torch.cat(pair) for pair in zip(gate.tensors, up.tensors, strict=True)]
        both = Matrix(joined, gate.form._replace(rows=gate.form.rows + up.form.rows))
        which, found = banks.setdefault((both.form, down.form), ([], []))
        which.append(index)
        found.append((both, down))
    made: list[tuple[list[int], Experts]] = []
    for (gate_up, down), (which, found) in banks.items():
        columns = zip(*((*b.tensors, *d.tensors) for b, d in found), strict=True)
        made.append((which, Experts([torch.stack(column) for column in columns], gate_up, down)))
    return made


@_op("linear(Tensor x, Tensor[] weight, int[] form, Tensor? bias=None) -> Tensor")
def linear(
    x: Tensor, weight: Sequence[Tensor], form: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of x.

    Args:
        x: [..., in].
        weight: of a ``Matrix`` [out, in].
        form: of it.
        bias: [out] or None.

    Returns:
        [..., out].

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _refuse_gradients(x, bias)
    means = _linear_form(x, form, bias)
    row = _choice("linear", x.dtype, x.device, means, means.held_as)
    return row.body(x, _open(weight, means), bias)


@torch.library.register_fake("zaya::linear")
def _(
    x: Tensor, weight: Sequence[Tensor], form: Sequence[int], bias: Tensor | None = None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], Form(*form).rows)


@_op(
    "moe_ffn(Tensor x, Tensor ids, Tensor shares, Tensor[] experts, int[] gate_up, int[] down)"
    " -> Tensor"
)
def moe_ffn(
    x: Tensor,
    ids: Tensor,
    shares: Tensor,
    experts: Sequence[Tensor],
    gate_up: Sequence[int],
    down: Sequence[int],
) -> Tensor:
    """``down(silu(gate x) * up x) * share`` for each row; rows with id -1 cost nothing and are 0.

    Args:
        x: [n, d].
        ids: [n] integers, the expert of each row or -1.
        shares: [n], the router's probability of that expert.
        experts: of an ``Experts``.
        gate_up: of it.
        down: of it.

    Returns:
        [n, d] in the dtype of x.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _refuse_gradients(x, shares)
    forms = _expert_forms(x, ids, shares, gate_up, down)
    held_as = forms[0].held_as if forms[0].layout == forms[1].layout else _MIXED
    row = _choice("moe_ffn", x.dtype, x.device, forms[0], held_as)
    return row.body(x, ids, shares, _open_experts(experts, *forms))


@torch.library.register_fake("zaya::moe_ffn")
def _(
    x: Tensor,
    ids: Tensor,
    shares: Tensor,
    experts: Sequence[Tensor],
    gate_up: Sequence[int],
    down: Sequence[int],
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_op("embedding(Tensor ids, Tensor[] weight, int[] form, ScalarType dtype) -> Tensor")
def embedding(
    ids: Tensor, weight: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Rows of a matrix.

    Args:
        ids: [...] integers.
        weight: of a ``Matrix`` [rows, columns].
        form: of it.
        dtype: of the result.

    Returns:
        [..., columns].

    Raises:
        ValueError: dtypes do not fit.
        IndexError: on the CPU, an id is no row.
    """
    _expect("ids", ids.dtype, _ID_TYPES)
    _expect("rows", dtype, _FLOAT_TYPES)
    means, flat = Form(*form), ids.flatten()
    if ids.device.type == "cpu" and len(flat):
        least, most = (int(bound) for bound in torch.aminmax(flat))
        if least < 0 or most >= means.rows:
            raise IndexError(f"ids span {least}..{most}; there are {means.rows} rows")
    row = _choice("embedding", dtype, ids.device, means, means.held_as)
    return row.body(flat, _open(weight, means), dtype).view(*ids.shape, means.columns)


@torch.library.register_fake("zaya::embedding")
def _(ids: Tensor, weight: Sequence[Tensor], form: Sequence[int], dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, Form(*form).columns, dtype=dtype)


def _refuse_gradients(*inputs: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError("the zaya ops have no gradients; call them under torch.no_grad()")


def _expect(name: str, dtype: torch.dtype, allowed: Sequence[torch.dtype]) -> None:
    if dtype not in allowed:
        raise ValueError(f"{name} of {dtype}; allowed: {', '.join(map(str, allowed))}")


def _linear_form(x: Tensor, form: Sequence[int], bias: Tensor | None) -> Form:
    """The form, after a look at what kernels read unseen."""
    _expect("x", x.dtype, _FLOAT_TYPES)
    means = Form(*form)
    if x.ndim < 1 or x.shape[-1] != means.columns:
        raise ValueError(f"x {list(x.shape)} does not end in the weight's {means.columns} columns")
    if bias is not None and bias.shape != (means.rows,):
        raise ValueError(f"bias {list(bias.shape)} for {means.rows} outputs")
    return means


def _expert_forms(
    x: Tensor, ids: Tensor, shares: Tensor, gate_up: Sequence[int], down: Sequence[int]
) -> tuple[Form, Form]:
    """Both forms, likewise."""
    _expect("x", x.dtype, _FLOAT_TYPES)
    _expect("ids", ids.dtype, _ID_TYPES)
    forms = Form(*gate_up), Form(*down)
    if x.ndim != 2 or x.shape[1] != forms[0].columns:
        raise ValueError(f"x {list(x.shape)} is not [n, {forms[0].columns}], as the experts are")
    if ids.shape != x.shape[:1] or shares.shape != x.shape[:1]:
        raise ValueError(
            f"ids {list(ids.shape)} and shares {list(shares.shape)} for {x.shape[0]} rows"
        )
    return forms


def _choice(op: str, dtype: torch.dtype, device: torch.device, form: Form, held_as: str) -> Row:
    return _chosen(op, dtype, device.type, form, held_as, os.environ.get(ENVIRONMENT, ""))


@lru_cache(1024)
def _chosen(op: str, dtype: torch.dtype, device: str, form: Form, held_as: str, forced: str) -> Row:
    """``choose``, which looks at files and devices, once for each question."""
    request = Request(dtype, device, form.spec, fast=bool(form.fast), layout=held_as)
    return choose(op, request)


@lru_cache(1024)
def _spec(bits: int, group: int, symmetric: int, scale: int, block: int) -> Spec | None:
    if block:
        return BlockSpec(_BLOCKS[block])
    return QuantSpec(bits, group, bool(symmetric), _SCALES[scale]) if bits else None


def _form(held_as: str, shape: tuple[int, int], spec: Spec, fast: bool) -> Form:
    form = Form(LAYOUTS.index(held_as), *shape, fast=int(fast))
    if isinstance(spec, BlockSpec):
        return form._replace(block=_BLOCKS.index(spec.type))
    return form._replace(
        bits=spec.bits, group=spec.group_size, symmetric=int(spec.symmetric),
        scale=_SCALES.index(spec.scale_dtype),
    )  # fmt: skip


def _floats(matrix: Tensor, request: Request) -> Matrix:
    rows, columns = matrix.shape
    moved = matrix.to(request.device, request.dtype)
    return Matrix([moved], Form(LAYOUTS.index(FLOATS), rows, columns))


def _open(tensors: Sequence[Tensor], form: Form) -> Weight:
    """What the bodies of the table take."""
    if len(tensors) != _count(form):
        raise ValueError(f"{len(tensors)} tensors for a matrix that is {_count(form)}")
    spec = form.spec
    if spec is None:
        return tensors[0]
    if form.held_as == TILES:
        device, shape = tensors[0].device.type, (form.rows, form.columns)
        if device != "cpu":
            raise ValueError(f"these weights were packed for the CPU; pack them for {device!r}")
        return PackedWeight(shape, spec, bool(form.fast), tensors[0])
    assert isinstance(spec, QuantSpec)
    codes, scales, *zeros = tensors
    return words.Packed(
        codes.view(torch.int32),
        scales.view(SCALE_DTYPES[spec.scale_dtype]),
        zeros[0] if zeros else None,
        spec,
        form.columns,
    )


class _Bank:
    """Experts one at a time, for bodies that compute with matrices."""

    def __init__(self, tensors: Sequence[Tensor], gate_up: Form, down: Form) -> None:
        count = _count(gate_up)
        self._gate_up, self._down = tensors[:count], tensors[count:]
        self._half, self._form = gate_up._replace(rows=gate_up.rows // 2), down

    def __call__(self, expert: int) -> Expert:
        gates = [tensor[expert].chunk(2) for tensor in self._gate_up]
        gate, up = (_open(half, self._half) for half in zip(*gates, strict=True))
        return Expert(gate, up, _open([tensor[expert] for tensor in self._down], self._form))


def _open_experts(
    tensors: Sequence[Tensor], gate_up: Form, down: Form
) -> _Bank | words.PackedExperts:
    if gate_up.held_as == down.held_as == WORDS:
        count = _count(gate_up)
        both, last = _open(tensors[:count], gate_up), _open(tensors[count:], down)
        assert isinstance(both, words.Packed)
        assert isinstance(last, words.Packed)
        return words.PackedExperts(both, last)
    return _Bank(tensors, gate_up, down)


def _count(form: Form) -> int:
    """How many tensors hold a matrix."""
    return 1 if form.held_as != WORDS else 2 + (not form.symmetric)


def _as_floats(matrix: Matrix, dtype: torch.dtype) -> Matrix:
    weight = _open(matrix.tensors, matrix.form)
    if isinstance(weight, Tensor):
        return matrix
    form = Form(LAYOUTS.index(FLOATS), matrix.form.rows, matrix.form.columns)
    return Matrix([weight.dequantize(dtype)], form)
