"""Laws of the native kernels: what the reference computes, on every instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tolerances import kernel
from zaya_kernels import library, native, reference
from zaya_kernels.packed import PackedWeight, layout_version, pack, packed_bytes
from zaya_kernels.reference import Expert
from zaya_quant import blocks
from zaya_quant.qtensor import BlockTensor, Quantized, QuantTensor
from zaya_quant.spec import (
    ALLOWED_BITS,
    BLOCK_GRIDS,
    BLOCK_TYPES,
    PER_CHANNEL,
    BlockSpec,
    QuantSpec,
    Spec,
)

if not library.supported_isas():
    pytest.skip(library.load()[1], allow_module_level=True)

ISAS = library.supported_isas()
SCALES = ("float16", "bfloat16", "float32")
SPECS: list[Spec] = [
    *(
        QuantSpec(bits, group, symmetric)
        for bits in (4, 8)
        for group in (16, 32, 64, 128)
        for symmetric in (True, False)
    ),
    QuantSpec(4, 32, True, "bfloat16"),
    QuantSpec(8, 64, False, "float32"),
    *map(BlockSpec, BLOCK_GRIDS),
]
ANY_SPEC = st.one_of(
    st.builds(
        QuantSpec,
        bits=st.sampled_from(ALLOWED_BITS),
        group_size=st.sampled_from((16, 32, 48, 64, 96, 128, 256, 1008, PER_CHANNEL)),
        symmetric=st.booleans(),
        scale_dtype=st.sampled_from(SCALES),
    ),
    st.sampled_from([BlockSpec(type) for type in BLOCK_GRIDS]),
)
FEW = (
    QuantSpec(4, 32),
    QuantSpec(8, 128, True, "bfloat16"),
    QuantSpec(4, 16, False),
    BlockSpec("Q4_K"),
    BlockSpec("IQ4_NL"),
)
SHAPES = ((1, 1), (5, 31), (16, 32), (33, 129), (70, 200))  # odd ones, whole tiles and panels
COUNTS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 33, 64, 65, 70)
FAST_ERROR = 0.012  # of the norm, of one product and of a fused FFN
SCATTER = 1.25  # what the norm of few numbers may be off by

EXPERTS, WIDTH, HIDDEN = 5, 72, 100


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(rows: int, columns: int, spec: Spec, seed: int = 0) -> Quantized:
    """Every code, the smallest ones too, and scales of both signs, subnormal fp16 among them."""
    random = torch.Generator().manual_seed(seed)

    def floats(shape: torch.Size | tuple[int, int], dtype: torch.dtype) -> Tensor:
        values = torch.randn(shape, generator=random) / 8
        values[torch.rand(shape, generator=random) < 0.05] = 2.0**-20
        return values.to(dtype)

    if isinstance(spec, BlockSpec):
        weights, size = BLOCK_TYPES[spec.type]
        raw = torch.randint(256, (rows, -(-columns // weights) * size), generator=random)
        value = blocks.unpack(raw.to(torch.uint8), spec.type)
        for numbers in (value.scales, value.offsets if isinstance(value, BlockTensor) else None):
            if numbers is not None:
                numbers.copy_(floats(numbers.shape, numbers.dtype))
        return value
    shape = (rows, spec.groups(columns))
    codes = torch.randint(spec.qmin, spec.qmax + 1, (rows, columns), generator=random)
    scales = floats(shape, getattr(torch, spec.scale_dtype))
    if spec.symmetric:
        return QuantTensor(codes.to(torch.int8), scales, None, spec)
    zeros = torch.randint(0, spec.qmax + 1, shape, generator=random).to(torch.uint8)
    return QuantTensor(codes.to(torch.uint8), scales, zeros, spec)


def rounded(values: Tensor, spec: Spec) -> Quantized:
    """Plainly."""
    if isinstance(spec, QuantSpec):
        return blocks.absmax(values, spec)
    rows, columns = values.shape
    return quantized(rows, columns, spec)


def deviation(found: Tensor, wanted: Tensor) -> float:
    """Relative to the norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


def added(weight: Quantized) -> Tensor:
    """How much is added and subtracted beside the values: [out, in]."""
    columns = weight.shape[1]
    if isinstance(weight, QuantTensor):
        length = weight.spec.group_length(columns)
        steps = 0 * weight.scales if weight.zeros is None else weight.scales
    else:
        length = weight.spec.grid.sub_group
        steps = 0 * weight.steps() if weight.offsets is None else weight.steps()
    codes = 2.0 ** (4 if weight.spec.bits <= 4 else 8)
    return (steps.double().abs() * codes).repeat_interleave(length, dim=1)[:, :columns]


def assert_sums(found: Tensor, x: Tensor, weight: Quantized, fast: bool = False) -> None:
    """Each element differs from the sum in fp64 by what rounding allows, and no more.

    Activations are rounded to a step that is 1 / 254 of the largest of 32, or its 2^-24th part;
    sums are in fp32. Those of grids with offsets add codes and offsets, which may cancel.
    """
    matrix, columns = weight.dequantize().double(), weight.shape[1]
    reach = matrix.abs()
    reach += added(weight)
    room = torch.nn.functional.pad(x.double().abs(), (0, -columns % 32)).unflatten(1, (-1, 32))
    largest = room.amax(2, keepdim=True).expand_as(room).flatten(1)[:, :columns]
    step = 1 / 254 if fast else 2.0**-23.9
    bound = largest @ matrix.abs().t() * step
    bound += x.double().abs() @ reach.t() * kernel(torch.float32, columns + 16)
    assert bool(((found.double() - x.double() @ matrix.t()).abs() <= bound).all())


@pytest.fixture(params=(1, 2))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packing_loses_nothing(spec: Spec, shape: tuple[int, int]) -> None:
    value = quantized(*shape, spec)
    assert torch.equal(pack(value).dequantize(), value.dequantize())
    ids = torch.tensor([shape[0] - 1, 0, shape[0] // 2])
    assert torch.equal(pack(value).rows(ids), value.dequantize()[ids])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
def test_linear(spec: Spec, isa: str) -> None:
    for rows, columns in SHAPES:
        value = quantized(rows, columns, spec)
        columns = value.shape[1]
        for count in (1, 5, 17):
            x = draw(count, columns, seed=count)
            assert_sums(native.linear(x, pack(value), isa=isa), x, value)
            found = native.linear(x, pack(value, fast=True), isa=isa)
            assert_sums(found, x, value, fast=True)


@settings(max_examples=60, deadline=None)
@given(ANY_SPEC, st.integers(1, 70), st.integers(1, 1300), st.integers(0, 20), st.integers(0, 99))
def test_any_grid_and_shape(spec: Spec, rows: int, columns: int, count: int, seed: int) -> None:
    """Packing loses nothing; products of both precisions are as near as they say."""
    value = quantized(rows, columns, spec, seed)
    packed, fast = pack(value), pack(value, fast=True)
    assert packed.nbytes == packed_bytes(value.shape, spec)
    assert torch.equal(packed.dequantize(), value.dequantize())
    x = draw(count, value.shape[1], seed=seed)
    x[:, seed % x.shape[1]] *= 1e4  # one large among small ones
    for isa in ISAS:
        assert_sums(native.linear(x, packed, isa=isa), x, value)
        assert_sums(native.linear(x, fast, isa=isa), x, value, fast=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", FEW, ids=lambda spec: spec.label)
@pytest.mark.parametrize("fast", [False, True])
def test_a_row_does_not_depend_on_the_rows_beside_it(spec: Spec, fast: bool, isa: str) -> None:
    value = quantized(95, 130, spec)  # several tiles at once, and one that is left
    packed, x = pack(value, fast), draw(70, value.shape[1])
    bias = draw(95, seed=1)
    whole = native.linear(x, packed, bias, isa=isa)
    assert deviation(whole, reference.linear(x, packed, bias).double()) < FAST_ERROR
    for count in COUNTS:
        assert torch.equal(native.linear(x[:count], packed, bias, isa=isa), whole[:count])
    assert torch.equal(
        native.linear(x.view(2, 5, 7, -1), packed, bias, isa=isa).view(70, 95), whole
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_codes_do_not_overflow(bits: int, symmetric: bool, isa: str) -> None:
    spec = QuantSpec(bits, 128, symmetric)
    for code in (spec.qmin, spec.qmax):
        codes = torch.full((16, 128), code, dtype=torch.int8 if symmetric else torch.uint8)
        zeros = None if symmetric else torch.full((16, 1), spec.qmax - code, dtype=torch.uint8)
        value = QuantTensor(codes, torch.ones(16, 1).half(), zeros, spec)
        for sign in (1.0, -1.0):
            x = torch.full((3, 128), sign)
            wanted = x @ value.dequantize().t()
            for fast in (True, False):
                found = native.linear(x, pack(value, fast), isa=isa)
                torch.testing.assert_close(found, wanted)


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
    with pytest.raises(ValueError, match=r"bias \[19\] for 20 outputs"):
        native.linear(x.t(), packed, torch.zeros(19))
    with pytest.raises(ValueError, match=r"3 ids and 2 weights for x \[2, 64\]"):
        native.moe_ffn(x.t()[:2], torch.zeros(3), torch.ones(2), lambda _: (packed,) * 3)  # pyright: ignore


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_not_finite_shows(isa: str) -> None:
    value = quantized(20, 160, QuantSpec(4, 32))
    x = draw(3, 160)
    x[1, 40] = float("nan")
    x[2, 41] = float("inf")
    for fast in (False, True):
        found = native.linear(x, pack(value, fast), isa=isa)
        assert torch.isfinite(found[0]).all()
        assert not torch.isfinite(found[1:]).any()
    zero = native.linear(torch.zeros(2, 160), pack(value, fast=True), isa=isa)
    assert not zero.any()


@pytest.mark.parametrize("spec", FEW[:3], ids=lambda spec: spec.label)
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
@pytest.mark.parametrize("spec", SPECS[:18:3], ids=lambda spec: spec.label)
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
    for rows in (x, x.t().contiguous().t()):
        assert deviation(native.moe_ffn(rows, ids, shares, bank.__getitem__), wanted) < 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_written_beside_the_outputs(isa: str, threads: int) -> None:
    """Rows of a tensor with guards before and behind them, and rows that no expert takes."""
    packed = pack(quantized(37, 65, QuantSpec(4, 32)), fast=True)
    x, guarded = draw(9, 65), torch.full((11, 37), 7.0)
    options = ctypes.byref(library.options(True, isa))
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
def test_a_fork_while_another_thread_computes() -> None:
    """The child has no workers, and the lock that the other thread held is not its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    packed, x = pack(quantized(600, 256, QuantSpec(4, 32)), fast=True), draw(5, 256)
    wanted, stop = native.linear(x, packed), threading.Event()
    room, options = torch.empty(5, 600), library.options(True)

    def compute() -> None:  # without torch, whose locks a child may inherit
        while not stop.is_set():
            library.library().zk_linear(
                ctypes.byref(packed.matrix), x.data_ptr(), 5, None, room.data_ptr(),
                ctypes.byref(options),
            )  # fmt: skip

    other = threading.Thread(target=compute)
    other.start()
    try:
        for _ in range(20):
            assert fork_and_compute(packed, x, wanted) == 0
            assert torch.equal(native.linear(x, packed), wanted)
    finally:
        stop.set()
        other.join()
        torch.set_num_threads(before)


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


def test_beside_the_threads_of_torch() -> None:
    """Its products and ours, each from two threads at once."""
    packed, x = pack(quantized(600, 256, QuantSpec(4, 32)), fast=True), draw(5, 256)
    dense, wanted = packed.dequantize(), native.linear(x, packed)
    other = x @ dense.t()
    with ThreadPoolExecutor(4) as pool:
        ours = [pool.submit(native.linear, x, packed) for _ in range(100)]
        theirs = [pool.submit(torch.matmul, x, dense.t()) for _ in range(100)]
        assert all(torch.equal(one.result(), wanted) for one in ours)
        assert all(torch.allclose(one.result(), other) for one in theirs)


# Elsewhere workers are not told where to run, and one core leaves no other.
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2,
    reason="Linux with two cores only",
)
def test_workers_keep_off_the_core_of_the_caller() -> None:
    """Which may then use all its cores still, and whose cores they share."""
    script = """
        import os, time, torch
        from zaya_kernels import native
        from zaya_kernels.packed import pack
        from zaya_quant.qtensor import QuantTensor
        from zaya_quant.spec import QuantSpec
        def cores():
            return {frozenset(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")}
        torch.set_num_threads(2)
        codes = torch.zeros(600, 256, dtype=torch.int8)
        packed = pack(QuantTensor(codes, torch.ones(600, 8).half(), None, QuantSpec(4, 32)))
        everywhere = os.sched_getaffinity(0)
        two = set(sorted(everywhere)[:2])
        for own in ({min(two)}, two, {max(two)}, two):
            os.sched_setaffinity(0, own)
            time.sleep(0.05)  # until the worker sleeps
            assert not native.linear(torch.ones(3, 256), packed).any()
            assert os.sched_getaffinity(0) == own
            if own == two:
                assert {frozenset({core}) for core in two} & cores()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(3)", "os._exit(3)", "other.start()"])
def test_the_interpreter_ends_with_sleeping_workers(end: str) -> None:
    """Also while a daemon thread still computes."""
    script = f"""
        import ctypes, os, threading, torch
        from zaya_kernels import native
        from zaya_kernels.library import library, options as how
        from zaya_kernels.packed import pack
        from zaya_quant.qtensor import QuantTensor
        from zaya_quant.spec import QuantSpec
        torch.set_num_threads(2)
        spec = QuantSpec(4, 32)
        codes = torch.zeros(600, 256, dtype=torch.int8)
        packed = pack(QuantTensor(codes, torch.ones(600, 8).half(), None, spec))
        x, out, options = torch.ones(256), torch.empty(600), how(True)
        arguments = ctypes.byref(packed.matrix), x.data_ptr(), 1, None, out.data_ptr()
        def compute():  # without torch, which would not survive it
            while True:
                library().zk_linear(*arguments, ctypes.byref(options))
        other = threading.Thread(target=compute, daemon=True)
        assert not native.linear(torch.ones(3, 256), packed).any()
        {end}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        timeout=60,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.returncode, done.stderr) == (3 if "3" in end else 0, "")


def test_packed_bytes_may_lie_in_a_file(tmp_path: Path) -> None:
    value = quantized(37, 300, QuantSpec(4, 32))
    made, x = pack(value, fast=True), draw(3, 300)
    path = tmp_path / "packed"
    path.write_bytes(bytes(64) + made.data.numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=64 + made.nbytes, dtype=torch.uint8)
    again = PackedWeight(value.shape, value.spec, True, mapped[64:])
    assert torch.equal(again.dequantize(), value.dequantize())
    assert torch.equal(native.linear(x, again), native.linear(x, made))
    for wrong in (mapped[63:], mapped[65:]):
        with pytest.raises(ValueError, match="bytes aligned to 64"):
            PackedWeight(value.shape, value.spec, True, wrong)
    assert layout_version() > 1


def test_codes_out_of_range_are_refused() -> None:
    spec = QuantSpec(3, 32)
    codes = torch.full((4, 32), 4, dtype=torch.int8)
    with pytest.raises(ValueError, match="codes span 4"):
        pack(QuantTensor(codes, torch.ones(4, 1).half(), None, spec))
