"""The torch ops on packed weights: what they compute, and that a graph holds them as one node."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import tolerances
from zaya_kernels import library, ops, packed, reference, table
from zaya_kernels.grids import common, to_common
from zaya_kernels.reference import Expert
from zaya_kernels.request import Request
from zaya_quant.affine import quantize_affine
from zaya_quant.qtensor import BlockTensor, QuantTensor
from zaya_quant.spec import BlockSpec, QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")

# Words hold the second on another grid, and have none for the last.
SPECS = (QuantSpec(4, 32), QuantSpec(3, -1), QuantSpec(4, 64, False), QuantSpec(8, 16))
DTYPES = (torch.float32, torch.bfloat16)
WIDTH, HIDDEN, EXPERTS = 200, 48, 5


def matrix(rows: int, columns: int, spec: QuantSpec, seed: int = 0) -> QuantTensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_affine(values / columns**0.5, spec)


def experts(spec: QuantSpec, count: int = EXPERTS) -> list[list[QuantTensor]]:
    shapes = ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    return [
        [matrix(*shape, spec, 3 * e + i) for i, shape in enumerate(shapes)] for e in range(count)
    ]


def expected_ffn(x: Tensor, ids: Tensor, shares: Tensor, bank: list[list[QuantTensor]]) -> Tensor:
    return reference.moe_ffn(x.float(), ids, shares.float(), lambda e: Expert(*bank[e]))


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def inputs(spec: QuantSpec, dtype: torch.dtype) -> dict[str, tuple[object, ...]]:
    """Arguments of every op."""
    request = Request(dtype)
    weight = ops.pack(matrix(HIDDEN, WIDTH, spec), request)
    ((_, bank),) = ops.pack_experts(experts(spec), request)
    ids = torch.tensor([2, -1, 0, 2])
    return {
        "linear": (draw(2, 3, WIDTH, dtype=dtype), weight.tensors, weight.form,
                   draw(HIDDEN, dtype=dtype)),
        "moe_ffn": (draw(4, WIDTH, dtype=dtype), ids, draw(4, dtype=dtype).abs(), bank.tensors,
                    bank.gate_up, bank.down),
        "embedding": (torch.tensor([[0, 5], [47, 5]]), weight.tensors, weight.form, dtype),
    }  # fmt: skip


def run(op: str, arguments: Sequence[object]) -> Tensor:
    return getattr(torch.ops.zaya, op)(*arguments)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, inner: int) -> bool:
    """Within a few roundings of the norm."""
    assert (found.dtype, found.shape) == (dtype, wanted.shape)
    error = (found.float() - wanted).norm() / wanted.norm()
    return float(error) <= 4 * tolerances.kernel(dtype, inner)


def test_every_op_of_the_table_is_registered() -> None:
    assert set(inputs(SPECS[0], torch.float32)) == set(table.OPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_ops_compute_what_the_stored_weights_give(spec: QuantSpec, dtype: torch.dtype) -> None:
    arguments = inputs(spec, dtype)
    weight, three = matrix(HIDDEN, WIDTH, spec), experts(spec)
    x, _, _, bias = arguments["linear"]
    assert isinstance(x, Tensor)
    assert isinstance(bias, Tensor)
    wanted = reference.linear(x.float(), weight, bias.float())
    assert close(run("linear", arguments["linear"]), wanted, dtype, WIDTH)
    rows, ids, shares = arguments["moe_ffn"][:3]
    assert isinstance(rows, Tensor)
    assert isinstance(shares, Tensor)
    assert isinstance(ids, Tensor)
    wanted = expected_ffn(rows, ids, shares, three)
    found = run("moe_ffn", arguments["moe_ffn"])
    assert close(found, wanted, dtype, WIDTH)
    assert not found[ids == -1].any()
    tokens = arguments["embedding"][0]
    assert isinstance(tokens, Tensor)
    assert torch.equal(run("embedding", arguments["embedding"]), weight.dequantize(dtype)[tokens])


@pytest.mark.parametrize("op", list(table.OPS))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_opcheck(op: str, spec: QuantSpec) -> None:
    for dtype in DTYPES:
        opcheck(getattr(torch.ops.zaya, op).default, inputs(spec, dtype)[op])


class Layer(torch.nn.Module):
    """An embedding, a mixture of experts and a tied head."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        request = Request()
        self.head = ops.pack(matrix(HIDDEN, WIDTH, spec), request)
        ((_, self.bank),) = ops.pack_experts(experts(spec), request)

    def forward(self, tokens: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        head, bank = self.head, self.bank
        x = torch.ops.zaya.embedding(tokens, head.tensors, head.form, torch.float32)
        mixed = torch.ops.zaya.moe_ffn(x, ids, shares, bank.tensors, bank.gate_up, bank.down)
        return torch.ops.zaya.linear(torch.relu(x + mixed), head.tensors, head.form, None)


ARGUMENTS = (torch.tensor([3, 40, 7]), torch.tensor([1, -1, 4]), torch.tensor([0.5, 0.2, 0.9]))


@pytest.mark.parametrize("kernel", ["", "reference"])
def test_any_strides_give_contiguous_results(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(table.ENVIRONMENT, kernel)
    x, *others = inputs(SPECS[0], torch.float32)["moe_ffn"]
    assert isinstance(x, Tensor)
    turned = x.t().contiguous().t()
    opcheck(torch.ops.zaya.moe_ffn.default, (turned, *others))
    assert torch.equal(run("moe_ffn", (turned, *others)), run("moe_ffn", (x, *others)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = inputs(SPECS[0], torch.float32)
    x, weight, form, bias = given["linear"]
    assert isinstance(x, Tensor)
    assert isinstance(bias, Tensor)
    for bad in ((x[..., 1:], weight, form, bias), (x, weight, form, bias[1:])):
        with pytest.raises(ValueError, match=str(HIDDEN if bad[0] is x else WIDTH)):
            run("linear", bad)
    rows, ids, shares, *bank = given["moe_ffn"]
    assert isinstance(rows, Tensor)
    assert isinstance(ids, Tensor)
    assert isinstance(shares, Tensor)
    for bad in (
        (rows[:, 1:], ids, shares),
        (rows[None], ids, shares),
        (rows[:3], ids, shares),
        (rows, ids[:3], shares),
        (rows, ids, shares[:3]),
        (rows, ids, shares[:, None]),
    ):
        with pytest.raises(ValueError, match=r"rows|experts"):
            run("moe_ffn", (*bad, *bank))


def test_dtypes_that_do_not_fit_are_refused() -> None:
    given = inputs(SPECS[0], torch.float32)
    wrong = {
        "linear": ((0, torch.int32), (0, torch.bool), (0, torch.complex64)),
        "moe_ffn": ((0, torch.int32), (1, torch.float32), (1, torch.bool)),
        "embedding": ((0, torch.float32), (0, torch.uint8), (3, torch.int32)),
    }
    for op, changes in wrong.items():
        for place, dtype in changes:
            arguments = list(given[op])
            value = arguments[place]
            arguments[place] = value.to(dtype) if isinstance(value, Tensor) else dtype
            with pytest.raises(ValueError, match=rf"of {dtype}; allowed: "):
                run(op, arguments)


@pytest.mark.parametrize("kernel", ["", "reference"])
def test_the_wrong_number_of_tensors_is_refused(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(table.ENVIRONMENT, kernel)
    for op, place in (("linear", 1), ("moe_ffn", 3), ("embedding", 1)):
        arguments = list(inputs(SPECS[2], torch.float32)[op])
        tensors = arguments[place]
        assert isinstance(tensors, list)
        for wrong in (tensors[:-1], [*tensors, tensors[0]]):
            arguments[place] = wrong
            with pytest.raises(ValueError, match="tensors for a matrix that is"):
                run(op, arguments)


@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda spec: spec.label)
def test_compile_without_a_break(spec: QuantSpec) -> None:
    layer = Layer(spec)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(*ARGUMENTS)
    assert torch.equal(found, layer(*ARGUMENTS))


@pytest.mark.parametrize("spec", SPECS[:3], ids=lambda spec: spec.label)
def test_export_keeps_one_node_for_each(spec: QuantSpec) -> None:
    layer = Layer(spec)
    count = torch.export.Dim("count", min=2, max=64)
    program = torch.export.export(layer, ARGUMENTS, dynamic_shapes=({0: count},) * 3)
    called = [
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and "zaya" in str(node.target)
    ]
    assert called == [f"zaya.{op}.default" for op in ("embedding", "moe_ffn", "linear")]
    other = tuple(torch.cat((argument, argument)) for argument in ARGUMENTS)
    assert torch.equal(program.module()(*other), layer(*other))


def test_gradients_are_refused() -> None:
    for op in ("linear", "moe_ffn"):
        x, *others = inputs(SPECS[0], torch.float32)[op]
        assert isinstance(x, Tensor)
        x.requires_grad_()
        with pytest.raises(RuntimeError, match=r"no gradients; call them under torch\.no_grad"):
            run(op, (x, *others))
        with torch.no_grad():
            run(op, (x, *others))


def test_experts_of_several_grids_become_several_banks() -> None:
    mixed = experts(SPECS[0])
    mixed[1], mixed[3] = experts(SPECS[2])[1], experts(SPECS[2])[3]
    mixed[4][1] = quantize_affine(mixed[4][1].dequantize(), QuantSpec(8, 32))
    banks = ops.pack_experts(mixed, Request())
    assert [which for which, _ in banks] == [[0, 2], [1, 3], [4]]
    x, ids, shares = draw(6, WIDTH), torch.tensor([4, 1, 0, -1, 3, 2]), torch.rand(6)
    total = torch.zeros_like(x)
    for which, bank in banks:
        own = torch.full((EXPERTS + 1,), -1)
        own[which] = torch.arange(len(which))
        total += run("moe_ffn", (x, own[ids], shares, bank.tensors, bank.gate_up, bank.down))
    assert close(total, expected_ffn(x, ids, shares, mixed), x.dtype, WIDTH)


def test_skipped_rows_reach_no_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    bank_of = ops._Bank.__call__  # pyright: ignore[reportPrivateUsage]

    def watch(self: ops._Bank, expert: int) -> Expert:  # pyright: ignore[reportPrivateUsage]
        opened.append(expert)
        return bank_of(self, expert)

    monkeypatch.setattr(ops._Bank, "__call__", watch)  # pyright: ignore[reportPrivateUsage]
    for spec in (SPECS[0], SPECS[3]):
        x, _, shares, *bank = inputs(spec, torch.float32)["moe_ffn"]
        assert not run("moe_ffn", (x, torch.full((4,), -1), shares, *bank)).any()
        assert opened == []
        run("moe_ffn", (x, torch.tensor([-1, 3, -1, 3]), shares, *bank))
        assert opened == [3]
        opened.clear()


def test_ids_outside_the_embedding() -> None:
    _, *others = inputs(SPECS[0], torch.float32)["embedding"]
    for wrong in (-1, HIDDEN):
        with pytest.raises(IndexError, match=rf"ids span .*there are {HIDDEN} rows"):
            run("embedding", (torch.tensor([0, wrong]), *others))


@pytest.mark.parametrize("op", list(table.OPS))
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_words_where_there_are_no_native_kernels(
    spec: QuantSpec, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(op, inputs(spec, torch.float32)[op])
    monkeypatch.setenv(table.ENVIRONMENT, "reference")
    held_as = "floats" if common(spec) is None else "words"
    assert ops.pack(matrix(HIDDEN, WIDTH, spec), Request()).form.held_as == held_as
    arguments = inputs(spec, torch.float32)[op]
    assert close(run(op, arguments), wanted, torch.float32, WIDTH)
    opcheck(getattr(torch.ops.zaya, op).default, arguments)


def test_blocks_of_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_codes = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (HIDDEN, 64), generator=draw_codes, dtype=torch.uint8)
    scales = torch.rand(HIDDEN, 2, generator=draw_codes).half()
    value = BlockTensor(codes, scales, -scales, None, None, BlockSpec("Q4_1"))
    x = draw(3, 64)
    for environment in ("", "reference"):
        monkeypatch.setenv(table.ENVIRONMENT, environment)
        packed = ops.pack(value, Request())
        found = run("linear", (x, packed.tensors, packed.form, None))
        assert close(found, reference.linear(x, value), torch.float32, 64)


needs_library = pytest.mark.skipif(not library.supported_isas(), reason=library.load()[1])


@needs_library
def test_the_environment_chooses_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = inputs(SPECS[0], torch.float32)["linear"]
    native = run("linear", arguments)
    monkeypatch.setenv(table.ENVIRONMENT, "reference")
    assert ops.pack(matrix(HIDDEN, WIDTH, SPECS[0]), Request()).form.held_as == "words"
    plain = run("linear", arguments)  # reads tiles too
    assert close(plain, native, torch.float32, WIDTH)
    assert not torch.equal(plain, native)
    monkeypatch.setenv(table.ENVIRONMENT, "native_fast")
    with pytest.raises(ValueError, match="native_fast: rounds activations to int8"):
        run("linear", arguments)


@needs_library
def test_words_are_nothing_for_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(table.ENVIRONMENT, "reference")
    weight = ops.pack(matrix(HIDDEN, WIDTH, SPECS[0]), Request())
    monkeypatch.setenv(table.ENVIRONMENT, "native")
    with pytest.raises(ValueError, match="native: reads tiles; these weights lie as words"):
        run("linear", (draw(1, WIDTH), weight.tensors, weight.form, None))


@needs_library
def test_fast_rounds_activations() -> None:
    value, x = matrix(HIDDEN, WIDTH, SPECS[0]), draw(4, WIDTH)
    weight = ops.pack(value, Request(fast=True))
    wanted = reference.linear(x, value)
    error = (run("linear", (x, weight.tensors, weight.form, None)) - wanted).norm() / wanted.norm()
    assert 1e-4 < float(error) < 2e-2


@needs_library
def test_packed_bytes_must_fit_and_be_aligned() -> None:
    data = packed.pack(matrix(HIDDEN, WIDTH, SPECS[0])).data
    for wrong in (data[:-1], torch.cat((data[:1], data))[1:], data.float(), data[None],
                  data[:1].expand(len(data))):  # fmt: skip
        with pytest.raises(ValueError, match="bytes aligned to 64"):
            packed.PackedWeight((HIDDEN, WIDTH), SPECS[0], False, wrong)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(bits, group, symmetric)
        for bits, group, symmetric in product((2, 3, 4, 5, 6, 8), (-1, 32, 96, 256), (True, False))
    ],
    ids=lambda spec: spec.label,
)
def test_common_grids_hold_the_same_values(spec: QuantSpec) -> None:
    for columns in (32, 300, 512):
        value = matrix(7, columns, spec)
        same = to_common(value)
        assert same.spec == common(spec)
        assert same.spec.bits in (4, 8)
        assert same.spec.group_size in (32, 64, 128)
        same.validate_codes()
        assert torch.equal(same.dequantize(), value.dequantize())


def test_what_has_no_common_grid() -> None:
    for spec in (None, QuantSpec(4, 16), QuantSpec(4, 48), BlockSpec("Q4_K")):
        assert common(spec) is None
    with pytest.raises(ValueError, match="no grid for int4 group 16"):
        to_common(matrix(2, 32, QuantSpec(4, 16)))


def test_the_documented_example(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(code, {})
    assert "torch.Size([3, 4096]) torch.Size([2, 2048])" in capsys.readouterr().out
