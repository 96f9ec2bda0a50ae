"""The native bodies: products on packed codes of any grid, on the CPU.

Two rows of the table. Both turn activations into integers, 32 of them sharing a scale, and sum
products of integers. ``native`` keeps 24 bits of the largest of the 32, which is about as near to
the true sum as sums in fp32 are. ``native_fast`` keeps 8: about 0.5 % of a product's norm, and as
fast as memory is when few rows are computed.

Weights are best packed once (``Row.pack``); those that are not are packed for the one call, and
float weights go to the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from zaya_kernels import reference
from zaya_kernels.library import Run, check, library, load, options
from zaya_kernels.packed import PackedWeight, pack
from zaya_kernels.reference import Expert, Weight
from zaya_kernels.request import TILES, Request
from zaya_quant.qtensor import Quantized

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run(request: Request) -> str | None:
    """None, or why not."""
    found, reason = load()
    if found is None:
        return reason
    if request.spec is None and request.layout != TILES:
        return "for quantized weights only"
    if request.device != "cpu" or request.dtype not in _DTYPES:
        return "for fp32, bf16 and fp16 on the CPU only"
    if request.exact:
        return "is as near as sums in fp32"
    if request.observed:
        return "shows no intermediate values"
    return None


def can_run_fast(request: Request) -> str | None:
    """``can_run`` where activations may be rounded."""
    reason = can_run(request)
    return reason if reason or request.fast else "rounds activations to int8"


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
    *,
    fast: bool = False,
    isa: str | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` in the dtype of x; see ``reference.linear``.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out] or None.
        fast: for weights that are not packed yet.
        isa: one of ``supported_isas``; None: the best.

    Returns:
        [..., out].
    """
    packed = _packed(weight, fast)
    if packed is None:
        return reference.linear(x, weight, bias)
    rows, columns = packed.shape
    if x.shape[-1] != columns:
        raise ValueError(f"x has {x.shape[-1]} columns; the weight has {columns}")
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"a bias {list(bias.shape)} for {rows} outputs")
    source = _floats(x)
    wide_bias = None if bias is None else _floats(bias)
    out = torch.empty(*x.shape[:-1], rows)
    count = out.numel() // rows if rows else 0
    status = library().zk_linear(
        packed.address,
        source.data_ptr(),
        count,
        None if wide_bias is None else wide_bias.data_ptr(),
        out.data_ptr(),
        ctypes.byref(options(packed.fast, isa)),
    )
    check(status)
    return _in_dtype(out, x.dtype)


def moe_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Callable[[int], Expert],
    *,
    fast: bool = False,
    isa: str | None = None,
) -> Tensor:
    """Top-1 mixture of SwiGLU experts; see ``reference.moe_ffn``.

    All experts whose three matrices are packed are computed in one call.
    """
    chosen, source = ids.tolist(), _floats(x)
    shape = x.shape
    if len(shape) != 2 or not shape[0] == len(chosen) == weights.numel():
        raise ValueError(f"{len(chosen)} ids and {weights.numel()} weights for x {list(shape)}")
    order, runs = _by_expert(chosen)
    found: list[_Found] = []
    others: dict[int, Expert] = {}
    skipped = 0
    for expert, begin, end in runs:
        if expert < 0:
            skipped = end
            continue
        matrices = experts(expert)
        packed = _all_packed(matrices, fast)
        if packed is None:
            others[expert] = matrices
        else:
            found.append((packed, begin, end))
    if others:  # rare: some layers of some recipes
        taken = torch.tensor(sorted(others))
        out = reference.moe_ffn(
            x, ids.masked_fill(~torch.isin(ids, taken), -1), weights, others.__getitem__
        ).float()
    else:
        out = torch.empty_like(source)
        if skipped:
            out[order[:skipped]] = 0
    for group in _alike(found):
        _run(group, order, source, _floats(weights), out, isa)
    return _in_dtype(out, x.dtype)


def embedding(ids: Tensor, weight: Weight, dtype: torch.dtype) -> Tensor:
    """Rows of a matrix; see ``reference.embedding``."""
    if not isinstance(weight, PackedWeight):
        return reference.embedding(ids, weight, dtype)
    return weight.rows(ids).to(dtype)


linear_fast = partial(linear, fast=True)
moe_ffn_fast = partial(moe_ffn, fast=True)


def with_packed(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A ``linear`` that takes packed weights, and gives others to ``body``."""

    def run(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        chosen = linear if isinstance(weight, PackedWeight) else body
        return chosen(x, weight, bias)

    return run


def _packed(weight: Weight, fast: bool) -> PackedWeight | None:
    if isinstance(weight, PackedWeight):
        return weight
    return pack(weight, fast) if isinstance(weight, Quantized) else None


_FIRST = (ctypes.c_int64 * 1)(0)


def _by_expert(
    chosen: Sequence[int],
) -> tuple[ctypes.Array[ctypes.c_int64], list[tuple[int, int, int]]]:
    """Rows in the order of their experts, and of each expert (expert, begin, end) in that order."""
    if len(chosen) == 1:  # what follows would take microseconds
        return _FIRST, [(chosen[0], 0, 1)]
    # Lists: tensors would take longer to sort a few rows than those take to compute.
    order = sorted(range(len(chosen)), key=chosen.__getitem__)
    runs: list[tuple[int, int, int]] = []
    end = 0
    for expert, rows in groupby(order, key=chosen.__getitem__):
        begin, end = end, end + len(list(rows))
        runs.append((expert, begin, end))
    return (ctypes.c_int64 * len(order))(*order), runs


def _all_packed(expert: Expert, fast: bool) -> list[PackedWeight] | None:
    found: list[PackedWeight] = []
    for matrix in expert:
        packed = _packed(matrix, fast)
        if packed is None:
            return None
        found.append(packed)
    return found


_Found = tuple[Sequence[PackedWeight], int, int]


def _alike(found: list[_Found]) -> list[list[_Found]]:
    """Grouped by shapes and precision, which one call must share, in their order.

    Groups are contiguous in the order of rows, as the library wants them.
    """
    groups: list[list[_Found]] = []
    for entry in found:
        before = groups[-1][-1] if groups else None
        if before and before[2] == entry[1] and _kind(before) == _kind(entry):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _kind(entry: _Found) -> tuple[object, ...]:
    """Tiles of two matrices differ in size where their grids do."""
    return tuple((packed.shape, packed.fast) for packed in entry[0])


def _run(
    group: list[_Found],
    order: ctypes.Array[ctypes.c_int64],
    x: Tensor,
    weights: Tensor,
    out: Tensor,
    isa: str | None,
) -> None:
    gate, up, down = group[0][0]
    width, hidden = x.shape[1], gate.shape[0]
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    if (gate.shape, up.shape, down.shape) != shapes:
        raise ValueError(
            f"an expert's gate {gate.shape}, up {up.shape} and down {down.shape} "
            f"do not fit rows of {width}"
        )
    entries = [
        (gate.address, up.address, down.address, begin, end)
        for (gate, up, down), begin, end in group
    ]
    runs = (Run * len(entries))(*entries)
    status = library().zk_moe_ffn(
        runs,
        len(group),
        order,
        x.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
        ctypes.byref(options(gate.fast and up.fast and down.fast, isa)),
    )
    check(status)


def _floats(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.float32 and tensor.is_contiguous():
        return tensor  # what follows takes microseconds even where there is nothing to do
    return tensor.detach().to(torch.float32).contiguous()


def _in_dtype(out: Tensor, dtype: torch.dtype) -> Tensor:
    return out if dtype == torch.float32 else out.to(dtype)
