"""Laws of the native kernels: what the reference computes, on every instruction set."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tolerances import kernel
from zaya_kernels import library, native, reference
from zaya_kernels.packed import PackedWeight, pack
from zaya_kernels.reference import Expert
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

if not library.supported_isas():
    pytest.skip(library.load()[1], allow_module_level=True)

ISAS = library.supported_isas()
SCALES = ("float16", "bfloat16", "float32")
SPECS = [
    QuantSpec(bits, group, True, scale)
    for bits in (4, 8)
    for group in (32, 64, 128)
    for scale in SCALES
]
FEW = (QuantSpec(4, 32), QuantSpec(8, 128, True, "bfloat16"))
SHAPES = ((1, 1), (5, 31), (16, 32), (33, 129), (70, 200))  # odd ones, whole tiles and panels
COUNTS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 33, 64, 65, 70)
FAST_ERROR = 0.012  # of the norm, of one product and of a fused FFN
SCATTER = 1.25  # what the norm of few numbers may be off by

EXPERTS, WIDTH, HIDDEN = 5, 72, 100


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(rows: int, columns: int, spec: QuantSpec, seed: int = 0) -> QuantTensor:
    """Every code, the smallest ones too, and scales of both signs, subnormal fp16 among them."""
    random = torch.Generator().manual_seed(seed)
    shape = (rows, spec.groups(columns))
    codes = torch.randint(spec.qmin, spec.qmax + 1, (rows, columns), generator=random)
    scales = torch.randn(shape, generator=random) / 8
    scales[torch.rand(shape, generator=random) < 0.05] = 2.0**-20
    dtype = getattr(torch, spec.scale_dtype)
    return QuantTensor(codes.to(torch.int8), scales.to(dtype), None, spec)


def rounded(values: Tensor, spec: QuantSpec) -> QuantTensor:
    """Nearest codes by the largest magnitude of each group."""
    columns, length = values.shape[1], spec.group_size
    room = torch.nn.functional.pad(values, (0, -columns % length)).unflatten(1, (-1, length))
    scales = (room.abs().amax(2) / spec.qmax).to(getattr(torch, spec.scale_dtype))
    codes = (room / scales.float()[..., None]).round().clamp(spec.qmin, spec.qmax)
    return QuantTensor(codes.flatten(1)[:, :columns].to(torch.int8), scales, None, spec)


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


def assert_sums(found: Tensor, x: Tensor, weight: QuantTensor) -> None:
    """Each element differs from the sum in fp64 by no more than an order of summation can."""
    matrix = weight.dequantize().double()
    bound = x.double().abs() @ matrix.abs().t() * kernel(torch.float32, x.shape[1] + 2)
    assert bool(((found.double() - x.double() @ matrix.t()).abs() <= bound).all())


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_loses_nothing(spec: QuantSpec, shape: tuple[int, int]) -> None:
    value = quantized(*shape, spec)
    assert torch.equal(pack(value).dequantize(), value.dequantize())
    ids = torch.tensor([shape[0] - 1, 0, shape[0] // 2])
    assert torch.equal(pack(value).rows(ids), value.dequantize()[ids])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_linear(spec: QuantSpec, isa: str) -> None:
    for rows, columns in SHAPES:
        value = quantized(rows, columns, spec)
        exact, fast = pack(value), pack(value, fast=True)
        for count in (1, 5, 17):
            x = draw(count, columns, seed=count)
            wanted = x.double() @ value.dequantize().double().t()
            assert_sums(native.linear(x, exact, isa=isa), x, value)
            if columns > 31:  # one product alone has no norm to speak of
                assert deviation(native.linear(x, fast, isa=isa), wanted) < FAST_ERROR


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", FEW, ids=lambda spec: spec.label)
@pytest.mark.parametrize("fast", [False, True])
def test_a_row_does_not_depend_on_the_rows_beside_it(spec: QuantSpec, fast: bool, isa: str) -> None:
    packed, x = pack(quantized(35, 130, spec), fast), draw(70, 130)
    bias = draw(35, seed=1)
    whole = native.linear(x, packed, bias, isa=isa)
    assert deviation(whole, reference.linear(x, packed, bias).double()) < FAST_ERROR
    for count in COUNTS:
        assert torch.equal(native.linear(x[:count], packed, bias, isa=isa), whole[:count])
    assert torch.equal(
        native.linear(x.view(2, 5, 7, 130), packed, bias, isa=isa).view(70, 35), whole
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_codes_do_not_overflow(bits: int, isa: str) -> None:
    spec = QuantSpec(bits, 128)
    for code in (spec.qmin, spec.qmax):
        codes = torch.full((16, 128), code, dtype=torch.int8)
        value = QuantTensor(codes, torch.ones(16, 1).half(), None, spec)
        for sign in (1.0, -1.0):
            x = torch.full((3, 128), sign)
            found = native.linear(x, pack(value, fast=True), isa=isa)
            torch.testing.assert_close(found, torch.full((3, 16), 128.0 * code * sign))


def test_strides_dtypes_and_nothing_at_all() -> None:
    value = quantized(20, 64, QuantSpec(4, 32))
    packed, x = pack(value), draw(64, 12)
    assert_sums(native.linear(x.t(), packed), x.t(), value)
    for dtype in (torch.bfloat16, torch.float16):
        found = native.linear(x.t().to(dtype), packed)
        assert found.dtype == dtype
        wanted = reference.linear(x.t().to(dtype).float(), value)
        assert deviation(found, wanted.double()) < 2.0**-8
    assert native.linear(torch.empty(2, 0, 64), packed).shape == (2, 0, 20)
    with pytest.raises(ValueError, match="x has 63 columns; the weight has 64"):
        native.linear(x.t()[:, :63], packed)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_shows(isa: str) -> None:
    value = quantized(20, 160, QuantSpec(4, 32))
    x = draw(3, 160)
    x[1, 40] = float("nan")
    x[2, 41] = float("inf")
    for fast in (False, True):
        found = native.linear(x, pack(value, fast), isa=isa)
        assert torch.isfinite(found[0]).all()
        assert not torch.isfinite(found[1:]).any(1).all() or fast is False
    zero = native.linear(torch.zeros(2, 160), pack(value, fast=True), isa=isa)
    assert not zero.any()


@pytest.mark.parametrize("spec", FEW, ids=lambda spec: spec.label)
@pytest.mark.parametrize("fast", [False, True])
def test_threads_do_not_change_a_bit(spec: QuantSpec, fast: bool) -> None:
    before = torch.get_num_threads()
    packed, bank = pack(quantized(900, 256, spec), fast), experts(spec, fast, 256, 300)
    x, ids, shares = draw(37, 256), torch.arange(37) % EXPERTS - 1, draw(37, seed=2)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                (native.linear(x, packed), native.moe_ffn(x, ids, shares, bank.__getitem__))
            )
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert torch.equal(found[0], results[0][0])
        assert torch.equal(found[1], results[0][1])


def experts(spec: QuantSpec, fast: bool, width: int = WIDTH, hidden: int = HIDDEN) -> list[Expert]:
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    return [
        Expert(
            *(
                pack(rounded(draw(*shape, seed=3 * e + i) / 8, spec), fast)
                for i, shape in enumerate(shapes)
            )
        )
        for e in range(EXPERTS)
    ]


def moe_wanted(x: Tensor, ids: Tensor, shares: Tensor, bank: list[Expert]) -> Tensor:
    """In fp64."""
    wide = [Expert(*(w.dequantize().double() for w in expert)) for expert in bank]  # pyright: ignore
    return reference.moe_ffn(x.double(), ids, shares.double(), wide.__getitem__)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", SPECS[::4], ids=lambda spec: spec.label)
@pytest.mark.parametrize("fast", [False, True])
def test_moe_ffn(spec: QuantSpec, fast: bool, isa: str, threads: int) -> None:
    bank = experts(spec, fast)
    for count in COUNTS:
        random = torch.Generator().manual_seed(count)
        ids = torch.randint(-1, EXPERTS, (count,), generator=random)
        ids[ids == 2] = 1  # an expert without tokens, and one with many
        x, shares = draw(count, WIDTH, seed=count), torch.rand(count, generator=random)
        x[ids < 0] = float("nan")  # what is not computed cannot leak
        found = native.moe_ffn(x, ids, shares, bank.__getitem__, isa=isa)
        assert not found[ids < 0].any()
        taken = ids >= 0
        if taken.any():
            wanted = moe_wanted(x[taken], ids[taken], shares[taken], bank)
            assert deviation(found[taken], wanted) < (FAST_ERROR * SCATTER if fast else 1e-6)


def test_moe_ffn_of_one_expert_with_many_rows(threads: int) -> None:
    bank = experts(QuantSpec(4, 32), False)
    x, ids, shares = draw(200, WIDTH), torch.full((200,), 3), torch.ones(200)
    found = native.moe_ffn(x, ids, shares, bank.__getitem__)
    assert deviation(found, moe_wanted(x, ids, shares, bank)) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_error_of_a_fast_expert(bits: int, isa: str) -> None:
    bank = experts(QuantSpec(bits, 32), True, 512, 384)
    x, ids, shares = draw(40, 512), torch.arange(40) % EXPERTS, torch.ones(40)
    found = native.moe_ffn(x, ids, shares, bank.__getitem__, isa=isa)
    assert deviation(found, moe_wanted(x, ids, shares, bank)) < FAST_ERROR


def test_experts_of_several_kinds() -> None:
    """Packed with one precision or another, float, not packed yet: each as it should be."""
    bank = experts(QuantSpec(4, 32), False)
    bank[1] = experts(QuantSpec(8, 64), False)[1]
    bank[2] = Expert(*(draw(*w.shape, seed=9) / 8 for w in bank[2]))  # pyright: ignore
    raw = (rounded(draw(*w.shape, seed=4) / 8, QuantSpec(4, 64)) for w in bank[3])  # pyright: ignore
    bank[3] = Expert(*raw)
    bank[4] = Expert(bank[4].gate, bank[4].up, bank[4].down.dequantize())  # pyright: ignore
    x, ids, shares = draw(40, WIDTH), torch.arange(40) % (EXPERTS + 1) - 1, draw(40, seed=1)
    wide = [Expert(*(reference.dense(w, torch.float64) for w in expert)) for expert in bank]
    wanted = reference.moe_ffn(x.double(), ids, shares.double(), wide.__getitem__)
    assert deviation(native.moe_ffn(x, ids, shares, bank.__getitem__), wanted) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_written_beside_the_outputs(isa: str, threads: int) -> None:
    """Rows of a tensor with guards before and behind them, and rows that no expert takes."""
    packed = pack(quantized(37, 65, QuantSpec(4, 32)), fast=True)
    x, guarded = draw(9, 65), torch.full((11, 37), 7.0)
    options = ctypes.byref(native._options(True, isa))
    status = library.library().zk_linear(
        ctypes.byref(packed.matrix), x.data_ptr(), 9, None, guarded[1:].data_ptr(), options
    )
    assert status == 0
    assert bool((guarded[[0, 10]] == 7.0).all())
    assert torch.equal(guarded[1:10], native.linear(x, packed, isa=isa))


def fork_and_compute(packed: PackedWeight, x: Tensor, wanted: Tensor) -> int:
    """The exit code of a child that computes the same, or the signal that ended it."""
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(native.linear(x, packed), wanted) else 1)
    _, status = os.waitpid(child, 0)
    return status


# A system without fork has nothing to survive.
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_a_fork_the_child_has_threads_of_its_own() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        packed, x = pack(quantized(600, 128, QuantSpec(4, 32))), draw(3, 128)
        wanted = native.linear(x, packed)
        assert fork_and_compute(packed, x, wanted) == 0
        assert torch.equal(native.linear(x, packed), wanted)
        assert fork_and_compute(packed, x, wanted) == 0
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_at_once() -> None:
    """One of them has the pool, the others compute alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        packed, x = pack(quantized(600, 256, QuantSpec(4, 32)), fast=True), draw(5, 256)
        wanted = native.linear(x, packed)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: native.linear(x, packed), range(400)))
        assert all(torch.equal(one, wanted) for one in found)
    finally:
        torch.set_num_threads(before)
