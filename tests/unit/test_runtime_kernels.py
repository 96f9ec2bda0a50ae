"""The kernel table and its reference bodies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nano import Nano
from zaya_convert.checkpoint import open_source
from zaya_convert.errors import UsageError
from zaya_convert.runtime.model import Model
from zaya_kernels import library, native, onednn, reference, table
from zaya_kernels.packed import pack
from zaya_kernels.reference import Expert
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec


def experts(count: int, d: int = 8, width: int = 6) -> list[Expert]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((width, d), (width, d), (d, width))
    return [Expert(*(torch.randn(shape, generator=draw) for shape in shapes)) for _ in range(count)]


def ffn(x: Tensor, expert: Expert) -> Tensor:
    return F.linear(F.silu(F.linear(x, expert.gate)) * F.linear(x, expert.up), expert.down)  # pyright: ignore


def test_moe_ffn() -> None:
    bank, fetched = experts(4), []
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([2, -1, 0, 2, 2, -1, 0, 3, -1])
    weights = torch.linspace(0.1, 0.9, 9)

    def fetch(expert: int) -> Expert:
        fetched.append(expert)
        return bank[expert]

    out = reference.moe_ffn(x, ids, weights, fetch)
    for row, (expert, weight) in enumerate(zip(ids.tolist(), weights, strict=True)):
        wanted = torch.zeros(8) if expert < 0 else ffn(x[row], bank[expert]) * weight
        assert torch.allclose(out[row], wanted, atol=1e-6)
    assert bool((out[ids < 0] == 0).all())
    assert fetched == [0, 2, 3]


def test_moe_ffn_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, x = experts(2), torch.randn(50, 8)
    ids, weights = torch.arange(50) % 2, torch.rand(50)
    whole = reference.moe_ffn(x, ids, weights, bank.__getitem__)
    monkeypatch.setattr(reference, "ROWS", 7)
    assert torch.allclose(reference.moe_ffn(x, ids, weights, bank.__getitem__), whole, atol=1e-6)


def test_moe_ffn_without_rows_or_experts() -> None:
    bank = experts(1)
    empty = reference.moe_ffn(
        torch.empty(0, 8), torch.empty(0).long(), torch.empty(0), bank.__getitem__
    )
    assert empty.shape == (0, 8)
    x = torch.randn(3, 8)
    out = reference.moe_ffn(x, torch.full((3,), -1), torch.ones(3), bank.__getitem__)
    assert bool((out == 0).all())


def test_observed_rows_are_those_of_the_expert() -> None:
    bank, seen = experts(3), {}

    def observe(expert: int, rows: Tensor, hidden: Tensor) -> None:
        seen[expert] = (rows, hidden)

    x, ids = torch.randn(6, 8), torch.tensor([1, -1, 1, 2, -1, 1])
    reference.moe_ffn(x, ids, torch.ones(6), bank.__getitem__, observe)
    assert sorted(seen) == [1, 2]
    assert torch.equal(seen[1][0], x[ids == 1])
    assert seen[1][1].shape == (3, 6)


def test_linear_takes_quantized_weights() -> None:
    codes = torch.randint(-8, 8, (5, 32), dtype=torch.int8)
    weight = QuantTensor(codes, torch.rand(5, 1).half(), None, QuantSpec(4, 32))
    x, bias = torch.randn(2, 3, 32), torch.randn(5)
    wanted = F.linear(x, weight.dequantize(), bias)
    assert torch.allclose(reference.linear(x, weight, bias), wanted)
    assert reference.linear(x.bfloat16(), weight).dtype == torch.bfloat16


def test_wide_weights_make_rows_independent() -> None:
    weight, x = torch.randn(300, 512), torch.randn(64, 512)
    out = reference.linear(x, weight.double())
    assert out.dtype == torch.float32
    for rows in (1, 3, 17):
        assert torch.equal(reference.linear(x[:rows], weight.double()), out[:rows])


def test_reference_is_the_last_row_of_every_op_and_always_runs() -> None:
    for rows in table.OPS.values():
        assert rows[-1].name == "reference"
        assert rows[-1].can_run(table.Request(torch.bfloat16, "cuda", QuantSpec(4, 32))) is None


def test_the_first_row_that_can_run_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_observers(request: table.Request) -> str | None:
        return "cannot be observed" if request.observed else None

    fast = table.Row("fast", no_observers, reference.linear)
    monkeypatch.setattr(table, "OPS", {"linear": (fast, table.OPS["linear"][-1])})
    assert table.choose("linear", table.Request()).name == "fast"
    assert table.choose("linear", table.Request(observed=True)).name == "reference"
    assert list(table.explain(table.Request(observed=True))) == [
        ("linear", "fast", "cannot be observed"),
        ("linear", "reference", "in use"),
    ]
    assert ("linear", "reference", "fast comes first") in set(table.explain())
    monkeypatch.setenv(table.ENVIRONMENT, "reference")
    assert table.choose("linear", table.Request()).name == "reference"
    monkeypatch.setenv(table.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="cannot run linear"):
        table.choose("linear", table.Request(observed=True))


ONEDNN_CANNOT = {
    "for fp32 on the CPU only": [
        table.Request(torch.bfloat16),
        table.Request(torch.float64),
        table.Request(device="cuda"),
    ],
    "sums in fp32, float weights only": [
        table.Request(exact=True),
        table.Request(spec=QuantSpec(4, 32)),
    ],
}


@pytest.mark.parametrize("available", [True, False])
def test_onednn_runs_for_inexact_fp32_and_float_weights(
    available: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: available)
    for reason, requests in ONEDNN_CANNOT.items():
        for request in requests:
            assert onednn.can_run(request) == reason
            assert table.choose("linear", request).name != "onednn"
    if not available:
        assert onednn.can_run(table.Request()) == "this build of PyTorch has no oneDNN"
        assert table.choose("linear", table.Request()).name == "reference"
    elif hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        assert table.choose("linear", table.Request()).name == "onednn"


def test_onednn_takes_any_shape_and_strides() -> None:
    if reason := onednn.can_run(table.Request()):
        pytest.skip(reason)
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(6, 96, generator=draw)
    weight = torch.randn(66, 96, generator=draw)
    bias = torch.randn(33, generator=draw)
    inputs = (base[0, :48], base[:, :48], base[:, ::2], base[:, :48].expand(2, 6, 48),
              base.reshape(3, 48, 4).transpose(1, 2), base[:0, :48])  # fmt: skip
    for x in inputs:
        for rows in (weight[:33, :48], weight[::2, 48:], weight[:48, :33].t()):
            for own in (None, bias):
                wanted = reference.linear(x, rows, own)
                found = onednn.linear(x, rows, own)
                assert found.shape == wanted.shape
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# Optional by design: without a compiler there is none, and the table runs the reference instead.
needs_library = pytest.mark.skipif(not library.supported_isas(), reason=library.load()[1])

INT4 = QuantSpec(4, 32)
NATIVE_CANNOT = {
    "for quantized weights only": table.Request(),
    "for fp32, bf16 and fp16 on the CPU only": table.Request(torch.float64, spec=INT4),
    "is as near as sums in fp32": table.Request(spec=INT4, exact=True),
    "shows no intermediate values": table.Request(spec=INT4, observed=True),
}


@needs_library
@pytest.mark.parametrize("reason", NATIVE_CANNOT)
def test_native_says_why_it_cannot_run(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = NATIVE_CANNOT[reason]
    assert native.can_run(request) == reason
    assert native.can_run_fast(replace(request, fast=True)) == reason
    for op in table.OPS:
        assert not table.choose(op, request).name.startswith("native")
        monkeypatch.setenv(table.ENVIRONMENT, "native")
        if request.spec is None:  # float weights go their way
            assert table.choose(op, request).name != "native"
        else:
            with pytest.raises(ValueError, match=f"native: {reason}"):
                table.choose(op, request)
        monkeypatch.delenv(table.ENVIRONMENT)


@needs_library
def test_rounded_activations_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in ("linear", "moe_ffn"):
        assert table.choose(op, table.Request(spec=INT4)).name == "native"
        assert table.choose(op, table.Request(spec=INT4, fast=True)).name == "native_fast"
        monkeypatch.setenv(table.ENVIRONMENT, "native")
        assert table.choose(op, table.Request(spec=INT4, fast=True)).name == "native"
        monkeypatch.delenv(table.ENVIRONMENT)


def test_without_the_library_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: (None, "no library in here"))
    for op in table.OPS:
        assert table.choose(op, table.Request(spec=INT4, fast=True)).name == "reference"
    assert native.can_run(table.Request(spec=INT4)) == "no library in here"


@needs_library
def test_what_cannot_be_packed() -> None:
    codes, scales = torch.full((2, 32), 9, dtype=torch.int8), torch.ones(2, 1).half()
    with pytest.raises(ValueError, match=r"4-bit codes must lie in -8\.\.7"):
        pack(QuantTensor(codes, scales, None, INT4))


def test_an_unknown_kernel_is_a_usage_error(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(nano())
    monkeypatch.setenv(table.ENVIRONMENT, "warp")
    with pytest.raises(UsageError, match="warp: there is no such kernel; there are native"):
        Model(source)


def test_a_forced_kernel_leaves_ops_that_have_none_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(table.ENVIRONMENT, "onednn")
    assert table.choose("moe_ffn", table.Request()).name == "reference"


def test_packed_weights_go_to_rows_that_read_them() -> None:
    for layout, name in (("tiles", "native"), ("words", "triton"), ("floats", "onednn")):
        request = table.Request(spec=INT4, layout=layout)
        for rows in table.OPS.values():
            for row in rows:
                refused = row.refusal(request) or ""
                assert ("these weights lie as" in refused) == (
                    row.name != "reference" and not row.name.startswith(name)
                )
