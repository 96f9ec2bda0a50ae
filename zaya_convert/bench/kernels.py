"""Products with quantized weights on the CPU, beside ceilings and peers.

Decode reads more weights than any cache holds: many experts in turn, or one large head. Its ceiling
is a pure read of the same bytes. Prefill computes; its ceiling is the fastest dense product of
torch's, fp32 or int8, measured beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from ctypes import byref, c_int64
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from zaya_convert.bench import ggml, peers
from zaya_convert.bench.measure import CEILING, PEER, Call, Case, Contender
from zaya_convert.runtime.mapping import fresh
from zaya_kernels import native, table
from zaya_kernels.library import Region, Run, check, library, options
from zaya_kernels.packed import PackedWeight, pack, packed_bytes
from zaya_kernels.reference import Expert, Weight
from zaya_kernels.request import Request
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        width: of hidden states, and of experts.
        experts: of the bank that prefill routes to.
        rotated_bytes: least size of what decode reads before it comes back to the same.
        head_rows: outputs of the head.
        tokens: of prefill.
        dense: edge of the dense products.
    """

    width: int = 2048
    experts: int = 16
    rotated_bytes: int = 320 << 20
    head_rows: int = 131072
    tokens: int = 256
    dense: int = 2048


SMALL = Sizes(256, 4, 1 << 20, 4096, 32, 256)
SPECS = (QuantSpec(4, 32), QuantSpec(4, 128), QuantSpec(8, 32))
_ROWS = 1024
NATIVE = ("native_fast", "native")


def cases(sizes: Sizes, threads: int, llama: Path | None = None) -> Iterator[Case]:
    """Every case, made when it is asked for: each holds some hundred MB.

    Raises:
        InputError: ``llama`` is no folder with ggml's libraries.
    """
    libraries = None if llama is None else ggml.load(llama)
    ceilings = dense_products(sizes.dense)
    for spec in SPECS:
        yield experts_decode(spec, sizes, threads, libraries)
        for rows in (2 * sizes.width, sizes.head_rows):
            yield linear_decode(spec, rows, sizes, threads, libraries)
        yield experts_prefill(spec, sizes, threads, ceilings, libraries)
        yield linear_prefill(spec, sizes, threads, ceilings, libraries)


def random_weight(rows: int, columns: int, spec: QuantSpec) -> QuantTensor:
    """Codes of every value; speed does not depend on them."""
    codes = torch.randint(spec.qmin, spec.qmax + 1, (rows, columns), dtype=torch.int8)
    scales = (torch.rand(rows, spec.groups(columns)) + 0.5) / (spec.qmax * columns**0.5)
    return QuantTensor(codes, scales.half(), None, spec)


def read(weights: Sequence[Weight], threads: int) -> Call:
    """A call that only reads the bytes of some matrices, one after the other."""
    regions = (Region * len(weights))(*(region(weight) for weight in weights))
    return partial(library().zk_read, regions, len(weights), threads)


def region(weight: Weight) -> tuple[int, int]:
    """Where the bytes of a matrix are, packed or float, and how many."""
    data = weight.data if isinstance(weight, PackedWeight) else weight
    assert isinstance(data, Tensor)
    return data.data_ptr(), data.nbytes


def experts_decode(
    spec: QuantSpec, sizes: Sizes, threads: int, libraries: ggml.Libraries | None
) -> Case:
    """One token by one expert after another."""
    first = packed_experts(spec, sizes.width, 1)[0]
    each = sum(matrix.nbytes for matrix in first)
    count = max(2, -(-sizes.rotated_bytes // each))
    bank = packed_experts(spec, sizes.width, count)
    x, share = torch.randn(1, sizes.width), torch.ones(1)
    ids = [torch.tensor([index]) for index in range(count)]
    contenders = [
        Contender(row.name, [partial(row.body, x, i, share, experts.__getitem__) for i in ids])
        for row, experts in _experts_of(bank, spec)
    ]
    contenders += [
        Contender("native_fast, native call", [_call_of(three, x, share) for three in bank]),
        Contender("read of the same bytes", [read(three, threads) for three in bank], CEILING),
    ]
    found, notes = _expert_peers(spec, count, x, ids, threads, libraries)
    name = f"expert FFN, 1 token, {_label(spec)}, {count} experts of {sizes.width} in turn"
    return Case(name, each, 2 * 3 * sizes.width**2, [*contenders, *found], notes)


def packed_rows(spec: QuantSpec, rows: int, columns: int, count: int = 1) -> list[PackedWeight]:
    """Matrices of many rows: those of a small one again and again, as their bytes are.

    One lies behind the other in large pages, as in the files that the runtime maps.
    """
    few = math.gcd(rows, _ROWS)
    one = pack(random_weight(few, columns, spec))
    times = rows // few
    memory = fresh(count * times * one.nbytes).view(count, times, one.nbytes)
    memory.copy_(one.data)
    return [PackedWeight((rows, columns), spec, False, own.view(-1)) for own in memory]


def packed_experts(spec: QuantSpec, width: int, count: int) -> list[list[PackedWeight]]:
    """Gate, up and down of some experts: the same codes, each in memory of its own."""
    matrices = packed_rows(spec, width, width, 3 * count)
    return [matrices[3 * index : 3 * index + 3] for index in range(count)]


def _call_of(expert: Sequence[PackedWeight], x: Tensor, share: Tensor) -> Call:
    """What the decode step does for an expert, without the op around it: as ggml is called."""
    packed = [_over(matrix, "native_fast") for matrix in expert]  # lives as long as the call
    runs, order = (Run * 1)((*(matrix.address for matrix in packed), 0, 1)), (c_int64 * 1)(0)
    out = torch.empty_like(x)

    def call() -> Tensor:
        check(library().zk_moe_ffn(
            runs, 1, order, x.data_ptr(), share.data_ptr(), out.data_ptr(),
            byref(options(packed[0].fast)),
        ))  # fmt: skip
        return out

    return call


def _experts_of(
    bank: Sequence[Sequence[PackedWeight]], spec: QuantSpec
) -> Iterator[tuple[table.Row, list[Expert]]]:
    """Our rows with the experts as each takes them, over the same bytes."""
    for row in _bodies("moe_ffn", spec):
        yield row, [Expert(*(_over(matrix, row.name) for matrix in three)) for three in bank]


def _over(matrix: PackedWeight, name: str) -> PackedWeight:
    return PackedWeight(matrix.shape, matrix.spec, name == "native_fast", matrix.data)


def linear_decode(
    spec: QuantSpec, rows: int, sizes: Sizes, threads: int, libraries: ggml.Libraries | None
) -> Case:
    """One token by one matrix after another, or by a single one that is larger than caches."""
    x = torch.randn(1, sizes.width)
    each = packed_bytes((rows, sizes.width), spec)
    head = rows == sizes.head_rows
    count = 1 if head else max(2, -(-sizes.rotated_bytes // each))
    contenders, packed = _linears(spec, rows, count, x)
    contenders.append(
        Contender("read of the same bytes", [read([one], threads) for one in packed], CEILING)
    )
    found, notes = _linear_peers(spec, rows, count, x, threads, libraries)
    what = "head" if head else "linear"
    name = f"{what} {rows} × {sizes.width}, 1 token, {_label(spec)}"
    if not head:
        name += f", {count} matrices in turn"
    return Case(name, each, 2 * rows * sizes.width, [*contenders, *found], notes)


def experts_prefill(
    spec: QuantSpec,
    sizes: Sizes,
    threads: int,
    ceilings: Sequence[Contender],
    libraries: ggml.Libraries | None,
) -> Case:
    """Many tokens, each by one of some experts."""
    x = torch.randn(sizes.tokens, sizes.width)
    ids, shares = torch.randint(sizes.experts, (sizes.tokens,)), torch.ones(sizes.tokens)
    bank = packed_experts(spec, sizes.width, sizes.experts)
    total = sum(matrix.nbytes for three in bank for matrix in three)
    contenders = [
        Contender(row.name, [partial(row.body, x, ids, shares, experts.__getitem__)])
        for row, experts in _experts_of(bank, spec)
    ]
    found, notes = _expert_peers(spec, sizes.experts, x, [ids], threads, libraries)
    name = f"expert FFN, {sizes.tokens} tokens, {sizes.experts} experts, {_label(spec)}"
    operations = 2 * 3 * sizes.tokens * sizes.width**2
    return Case(name, total, operations, [*contenders, *found, *ceilings], notes)


def linear_prefill(
    spec: QuantSpec,
    sizes: Sizes,
    threads: int,
    ceilings: Sequence[Contender],
    libraries: ggml.Libraries | None,
) -> Case:
    """Many tokens by one matrix."""
    rows, x = 2 * sizes.width, torch.randn(sizes.tokens, sizes.width)
    contenders, packed = _linears(spec, rows, 1, x)
    found, notes = _linear_peers(spec, rows, 1, x, threads, libraries)
    name = f"linear {rows} × {sizes.width}, {sizes.tokens} tokens, {_label(spec)}"
    operations = 2 * sizes.tokens * rows * sizes.width
    return Case(name, packed[0].nbytes, operations, [*contenders, *found, *ceilings], notes)


def dense_products(edge: int) -> list[Contender]:
    """torch's dense products, in fp32 through oneDNN and in int8 where it has one."""
    operations = 2 * edge**3
    a, b = torch.randn(edge, edge), torch.randn(edge, edge)
    row = table.choose("linear", Request())
    made = [Contender("dense fp32 product", [lambda: row.body(a, b)], CEILING, operations)]
    narrow = [torch.randint(-8, 8, (edge, edge), dtype=torch.int8) for _ in range(2)]
    product = partial(torch.ops.aten._int_mm, *narrow)
    try:
        product()
    except RuntimeError:
        return made
    int8 = Contender("dense int8 product", [product], CEILING, operations)
    return [*made, int8]


def _bodies(op: str, spec: QuantSpec) -> list[table.Row]:
    """Our packing rows that can run."""
    request = Request(spec=spec, fast=True)
    return [row for row in table.OPS[op] if row.name in NATIVE and row.refusal(request) is None]


def _linears(
    spec: QuantSpec, rows: int, count: int, x: Tensor
) -> tuple[list[Contender], list[PackedWeight]]:
    packed = packed_rows(spec, rows, x.shape[1], count)
    made = [
        Contender(row.name, [partial(native.linear, x, _over(one, row.name)) for one in packed])
        for row in _bodies("linear", spec)
    ]
    return made, packed


def _expert_peers(
    spec: QuantSpec,
    count: int,
    x: Tensor,
    ids: Sequence[Tensor],
    threads: int,
    libraries: ggml.Libraries | None,
) -> tuple[list[Contender], list[str]]:
    found: list[Contender] = []
    notes: list[str] = []
    if peers.has_onnxruntime():
        call_of = peers.qmoe(spec.bits, spec.group_size, count, x.shape[1], x, threads)
        found.append(Contender("onnxruntime QMoE", [call_of(i) for i in ids], PEER))
    else:
        notes.append("onnxruntime QMoE: not installed (extra: onnx)")
    for kind in _ggml_types(spec, x):
        for name, call_of in libraries.experts(kind, count, x, threads) if libraries else ():
            found.append(Contender(name, [call_of(i) for i in ids], PEER))
    return found, notes


def _ggml_types(spec: QuantSpec, x: Tensor) -> list[str]:
    """ggml's types of about as many bits, where its blocks fit."""
    if spec.group_size != 32:
        return []
    return [spec.ggml_type, *(["Q4_K"] if spec.bits == 4 and x.shape[1] % 256 == 0 else [])]


def _linear_peers(
    spec: QuantSpec,
    rows: int,
    count: int,
    x: Tensor,
    threads: int,
    libraries: ggml.Libraries | None,
) -> tuple[list[Contender], list[str]]:
    found: list[Contender] = []
    notes: list[str] = []
    if count > 1:
        notes.append("onnxruntime MatMulNBits: a session for each matrix would be threads for each")
    elif peers.has_onnxruntime():
        call = peers.matmul_nbits(spec.bits, spec.group_size, rows, x, threads)
        found.append(Contender("onnxruntime MatMulNBits", [call], PEER))
    else:
        notes.append("onnxruntime MatMulNBits: not installed (extra: onnx)")
    try:
        name, calls = peers.torch_packed(spec.bits, spec.group_size, rows, count, x)
        calls[0]()
        found.append(Contender(name, calls, PEER))
    except (RuntimeError, AttributeError) as error:
        notes.append(f"torch int{spec.bits}pack: {str(error).splitlines()[0]}")
    for kind in _ggml_types(spec, x):
        for name, own in libraries.products(kind, rows, count, x, threads) if libraries else ():
            found.append(Contender(name, own, PEER))
    return found, notes


def _label(spec: QuantSpec) -> str:
    return f"int{spec.bits} group {spec.group_size}"
