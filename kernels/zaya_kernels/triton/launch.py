"""The bodies of the table: choose a kernel and its tile, sort tokens by expert, launch.

Nothing here waits for the device when experts come as a ``PackedExperts``. Any other bank is
asked for the experts that the ids name, which does wait, and what it gives is stacked anew in
every call: right, and meant for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zaya_kernels.grids import common
from zaya_kernels.reference import Expert, Weight
from zaya_kernels.request import Request
from zaya_kernels.triton import configs
from zaya_kernels.triton.layout import Packed, PackedExperts, pack_experts, packed_once

# The decode kernel computes each token by itself. Up to so many tokens that is the faster way on an
# H100; one matrix for all is then read once for each of them, so it must be small, too.
MOE_DECODE_TOKENS = 16
DECODE_TOKENS = 8
DECODE_OUTPUTS = 2**14
FEW_TOKENS = 32  # tokens of an expert up to which the small tile is taken


def can_run(request: Request) -> str | None:
    """None, or why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (extra: gpu)"
    if request.device != "cuda" and not interpreting():
        return "needs a CUDA or ROCm device, or TRITON_INTERPRET=1"
    spec = request.spec
    if spec is None or common(spec) != spec:
        return "for 4 and 8 bits in groups of 32, 64 or 128"
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "for fp16, bf16 and fp32 activations"
    if request.exact or request.observed:
        return "sums in fp32, shows no intermediate values"
    return None


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; see ``reference.linear``."""
    packed = packed_once(weight, x.device)
    flat = _rows(x, packed.columns)
    out = x.new_empty(len(flat), packed.rows)
    linear_into(out, flat, packed, bias)
    return out.view(*x.shape[:-1], packed.rows)


def moe_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: Callable[[int], Expert],
    observe: object = None,
) -> Tensor:
    """Top-1 mixture of SwiGLU experts; see ``reference.moe_ffn``.

    ids that are no expert of a ``PackedExperts`` (-1, or the number of experts) skip: they cost
    nothing and their rows are 0.
    """
    if observe is not None:
        raise ValueError("the fused kernels show no intermediate values")
    if not isinstance(experts, PackedExperts):
        used = [e for e in ids.unique().tolist() if e >= 0]  # sorted
        if not used:
            return torch.zeros_like(x)
        names = torch.tensor(used, device=ids.device)
        ids = torch.where(ids < 0, -1, torch.searchsorted(names, ids))
        experts = pack_experts([experts(e) for e in used], x.device)
    flat = _rows(x, experts.down.rows)
    out = torch.zeros_like(flat)
    moe_ffn_into(out, flat, ids, weights, experts)
    return out


def linear_into(out: Tensor, x: Tensor, packed: Packed, bias: Tensor | None = None) -> None:
    """``linear`` into given memory: x [m, in], out [m, out], rows contiguous."""
    if not len(x):
        return
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        few = len(x) <= DECODE_TOKENS and out.numel() <= DECODE_OUTPUTS
        if few or len(x) == 1:
            _decode(out, x, packed, bias=bias)
        else:
            _prefill(out, x, packed, _tile(x, len(x)), bias=bias)


def moe_ffn_into(
    out: Tensor, x: Tensor, ids: Tensor, weights: Tensor, experts: PackedExperts
) -> None:
    """``moe_ffn`` into given memory, which must be 0 where there are many tokens."""
    count = len(x)
    if not count:
        return
    ids, weights = ids.contiguous(), weights.contiguous()
    gate_up, down = experts.gate_up, experts.down
    with torch.cuda.device_of(x):
        if count <= MOE_DECODE_TOKENS:
            hidden = x.new_empty(count, down.columns, dtype=torch.float32)
            _decode(hidden, x, gate_up, ids=ids, swiglu=True)
            _decode(out, hidden, down, ids=ids, shares=weights)
            return
        tile = _tile(x, count // experts.count)
        routes = route(ids, experts.count, tile.block_m)
        hidden = x.new_empty(count, down.columns)
        _prefill(hidden, x, gate_up, tile, routes=routes, swiglu=True)
        _prefill(out, hidden, down, tile, routes=routes, shares=weights)


class Routes(NamedTuple):
    """Tokens sorted by expert and cut into tiles; see ``device.prefill``."""

    order: Tensor
    expert: Tensor
    first: Tensor
    last: Tensor


def route(ids: Tensor, experts: int, block_m: int) -> Routes:
    """Cut tokens into tiles of one expert each, on the device and without waiting for it.

    As many tiles as there could be are made; those too many have ``expert == experts``.
    """
    device = ids.device
    valid = (ids >= 0) & (ids < experts)
    ordered, order = torch.sort(torch.where(valid, ids.long(), experts), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(experts + 1, device=device))
    first, last = bounds[:-1], bounds[1:]
    tiles = (last - first + block_m - 1) // block_m
    ends = tiles.cumsum(0)
    most = min(len(ids), len(ids) // block_m + experts)
    tile = torch.arange(most, device=device)
    expert = torch.searchsorted(ends, tile, right=True)
    known = expert.clamp(max=experts - 1)
    within = tile - (ends - tiles)[known]
    start = first[known] + within * block_m
    numbers = (order, expert, start, last[known])
    return Routes(*(t.to(torch.int32) for t in numbers))


def interpreting() -> bool:
    """Whether triton runs kernels on the CPU, in Python."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@cache
def kernels() -> ModuleType:
    """The module of the kernels, imported when the first of them is launched."""
    from zaya_kernels.triton import device

    return device


def target(device: torch.device) -> tuple[str, str, str]:
    """(name, backend, arch) of a GPU: ("NVIDIA H100 80GB HBM3", "cuda", "90")."""
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip is None:
        return facts.name, "cuda", f"{facts.major}{facts.minor}"
    return facts.name, "hip", facts.gcnArchName.partition(":")[0]


def tiles(device: torch.device) -> configs.Tiles:
    """Tiles for a device."""
    return _using[-1] if _using else _tiles(device)


@contextmanager
def using(chosen: configs.Tiles) -> Iterator[None]:
    """Launch with given tiles, to compare them."""
    _using.append(chosen)
    try:
        yield
    finally:
        _using.pop()


_using: list[configs.Tiles] = []
# What the last launch of each kernel ran: triton tells its registers and spills. Interpreted: None.
compiled: dict[str, Any] = {}


@cache
def _tiles(device: torch.device) -> configs.Tiles:
    return (
        configs.FAMILIES["interpreter"] if interpreting() else configs.for_device(*target(device))
    )


def _tile(x: Tensor, tokens_each: int) -> configs.Prefill:
    mine = tiles(x.device)
    return mine.few if tokens_each <= FEW_TOKENS else mine.many


def _rows(x: Tensor, columns: int) -> Tensor:
    flat = x.reshape(-1, columns)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _numbers(packed: Packed, rows: int) -> dict[str, int]:
    groups = packed.scales.shape[-1]
    return {"columns": packed.columns, "rows": rows, "blocks": packed.blocks, "groups": groups}


def _decode(
    out: Tensor,
    x: Tensor,
    packed: Packed,
    *,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    shares: Tensor | None = None,
    swiglu: bool = False,
) -> None:
    tile, rows = tiles(x.device).decode, out.shape[1]
    compiled["decode"] = kernels().decode[(-(-rows // tile.block_n), len(x))](
        x, packed.words, packed.scales, packed.zeros, bias, ids, shares, out,
        **_numbers(packed, rows), experts=_experts(packed),
        x_stride=x.stride(0), out_stride=out.stride(0),
        bits=packed.spec.bits, group=packed.spec.group_size, swiglu=swiglu,
        block_n=tile.block_n, block_b=tile.block_b, num_warps=tile.warps,
    )  # fmt: skip


def _prefill(
    out: Tensor,
    x: Tensor,
    packed: Packed,
    tile: configs.Prefill,
    *,
    bias: Tensor | None = None,
    routes: Routes | None = None,
    shares: Tensor | None = None,
    swiglu: bool = False,
) -> None:
    rows = out.shape[1]
    order, expert, first, last = routes or (None, None, None, None)
    count = -(-len(x) // tile.block_m) if expert is None else len(expert)
    compiled["prefill"] = kernels().prefill[(count, -(-rows // tile.block_n))](
        x, packed.words, packed.scales, packed.zeros, bias, order, expert, first, last, shares,
        out, tokens=len(x), **_numbers(packed, rows), experts=_experts(packed),
        x_stride=x.stride(0), out_stride=out.stride(0),
        bits=packed.spec.bits, group=packed.spec.group_size, swiglu=swiglu,
        compute=_compute(x.dtype), block_m=tile.block_m, block_n=tile.block_n,
        block_b=tile.block_b, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _experts(packed: Packed) -> int:
    return packed.words.shape[0] if packed.words.ndim == 3 else 1


def _compute(dtype: torch.dtype) -> Any:
    """What ``tl.dot`` multiplies; the interpreter multiplies no bf16."""
    language = kernels().tl
    if dtype == torch.bfloat16 and interpreting():
        return language.float32
    names = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
    return getattr(language, names[dtype])
