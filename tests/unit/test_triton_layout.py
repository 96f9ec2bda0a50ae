"""What of the Triton bodies runs without triton: the layout, the routes, the predicate."""

import gc
import importlib.util

import pytest
import torch

from zaya_kernels import table
from zaya_kernels.reference import Expert
from zaya_kernels.triton import launch, layout
from zaya_quant.affine import quantize_affine
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import BlockSpec, QuantSpec

SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits in (4, 8)
    for group in (32, 64, 128)
    for symmetric in (True, False)
]
CPU = torch.device("cpu")


def matrix(rows: int, columns: int, spec: QuantSpec, seed: int = 0) -> QuantTensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return quantize_affine(values, spec)


def same(left: QuantTensor, right: QuantTensor) -> bool:
    zeros = [t.zeros if t.zeros is not None else torch.empty(0) for t in (left, right)]
    return (
        left.spec == right.spec
        and torch.equal(left.codes, right.codes)
        and torch.equal(left.scales, right.scales)
        and torch.equal(*zeros)
    )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("columns", [1, 33, 128, 300])
def test_unpack_is_the_inverse_of_pack(spec: QuantSpec, columns: int) -> None:
    weight = matrix(5, columns, spec)
    packed = layout.pack(weight)
    assert packed.words.shape == (5, spec.groups(columns) * spec.group_size * spec.bits // 32)
    assert (packed.rows, packed.columns) == weight.shape
    assert same(layout.unpack(packed), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_where_a_code_lies(bits: int) -> None:
    codes = torch.zeros(1, 64, dtype=torch.uint8)
    per = 32 // bits
    codes[0, 4 * per + 4 * 2 + 3] = 5  # block 1, code 2 of word 3
    spec = QuantSpec(bits, 32, symmetric=False)
    words = layout.pack(
        QuantTensor(codes, torch.ones(1, 2).half(), torch.zeros(1, 2, dtype=torch.uint8), spec)
    ).words
    assert words.nonzero().tolist() == [[0, 4 + 3]]
    assert words[0, 7] == 5 << (2 * bits)


def test_a_bank_gives_its_experts_back() -> None:
    spec = QuantSpec(4, 32, symmetric=False)
    shapes = ((7, 40), (7, 40), (40, 7))
    experts = [
        Expert(*(matrix(*shape, spec, 3 * e + i) for i, shape in enumerate(shapes)))
        for e in range(3)
    ]
    bank = layout.pack_experts(experts, CPU)
    assert bank.count == 3
    for e, expert in enumerate(experts):
        for found, wanted in zip(bank(e), expert, strict=True):
            assert isinstance(found, QuantTensor)
            assert isinstance(wanted, QuantTensor)
            assert same(found, wanted)


def test_experts_of_unequal_form_are_refused() -> None:
    mixed = [Expert(*(matrix(8, 8, QuantSpec(bits, 32)) for _ in range(3))) for bits in (4, 8)]
    with pytest.raises(ValueError, match="one grid"):
        layout.pack_experts(mixed, CPU)


def test_a_matrix_is_packed_once_and_forgotten_with_it() -> None:
    weight = matrix(4, 32, QuantSpec(4, 32))
    first = layout.packed_once(weight, CPU)
    assert layout.packed_once(weight, CPU) is first
    before = len(layout._PACKED)
    del weight
    gc.collect()
    assert len(layout._PACKED) == before - 1
    with pytest.raises(TypeError, match="Tensor"):
        layout.packed_once(torch.ones(2, 2), CPU)


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 2, 17, 64])
def test_routes_cover_every_token_once(count: int, block: int) -> None:
    experts = 5
    ids = torch.randint(-1, experts + 1, (count,), generator=torch.Generator().manual_seed(count))
    ids[ids == 3] = 1  # an expert without tokens
    routes = launch.route(ids, experts, block)
    seen = []
    for expert, first, last in zip(*(t.tolist() for t in routes[1:]), strict=True):
        if expert < experts:
            tokens = routes.order[first : min(last, first + block)].tolist()
            assert tokens
            assert {int(ids[token]) for token in tokens} == {expert}
            seen += tokens
    assert sorted(seen) == [t for t, e in enumerate(ids.tolist()) if 0 <= e < experts]


def test_the_predicate_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    good = table.Request(torch.bfloat16, "cuda", QuantSpec(4, 32))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch.can_run(good) == "triton is not installed (extra: gpu)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert launch.can_run(good) is None
    cpu = table.Request(torch.bfloat16, "cpu", QuantSpec(4, 32))
    assert "device" in (launch.can_run(cpu) or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.can_run(cpu) is None
    for spec in (None, BlockSpec("Q4_K"), QuantSpec(3, 32), QuantSpec(4, 16), QuantSpec(4, -1)):
        assert "groups" in (launch.can_run(table.Request(torch.float32, "cuda", spec)) or "")
    for odd in (
        table.Request(torch.float64, "cuda", QuantSpec(4, 32)),
        table.Request(torch.float32, "cuda", QuantSpec(4, 32), exact=True),
        table.Request(torch.float32, "cuda", QuantSpec(4, 32), observed=True),
    ):
        assert launch.can_run(odd) is not None
