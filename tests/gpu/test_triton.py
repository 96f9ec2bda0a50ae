"""Triton kernels against the fp32 reference, on a GPU or in triton's interpreter.

    TRITON_INTERPRET=1 pytest tests/gpu      # on the CPU, in Python
    pytest tests/gpu                         # on a CUDA or ROCm device

Inputs lie amid NaN and outputs amid a sentinel, so that what is read or written beside them
shows. The interpreter cuts float32 to bf16 instead of rounding, which the tolerances allow.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tolerances
from zaya_kernels import ops, table
from zaya_kernels.reference import Expert, dense
from zaya_kernels.triton import configs, launch, layout
from zaya_quant.affine import quantize_affine
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

pytest.importorskip("triton", reason="triton is not installed (extra: gpu)")
INTERPRETED = launch.interpreting()
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SPECS = [
    QuantSpec(bits, group, symmetric)
    for bits in (4, 8)
    for group in (32, 64, 128)
    for symmetric in (True, False)
]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Weights are rounded to the activations' dtype for the matrix units, sums once more when stored,
# and the interpreter's bf16 is cut: three roundings instead of the one that ``kernel`` counts.
ROUNDINGS = 3

Mutate = Callable[[str, str], None]

COLUMNS, ROWS, EXPERTS = 197, 77, 5
IDLE = 3  # the expert that gets no token
SENTINEL = 12345.0
MARGIN = 16  # rows before and behind: a whole tile of tokens beyond the last stays inside


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def matrix(rows: int, columns: int, spec: QuantSpec, seed: int) -> QuantTensor:
    values = draw(rows, columns, seed=seed) * (1 + draw(rows, 1, seed=seed + 1).abs())
    made = quantize_affine(values / 8, spec)
    zeros = None if made.zeros is None else made.zeros.to(DEVICE)
    return replace(made, codes=made.codes.to(DEVICE), scales=made.scales.to(DEVICE), zeros=zeros)


def amid(tensor: Tensor, filling: float) -> Tensor:
    """The same values with a margin before and behind, aligned as an allocation is."""
    margin = 128
    around = torch.full((tensor.numel() + 2 * margin,), filling, device=DEVICE).to(tensor.dtype)
    inside = around[margin:-margin].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def amid_rows(tensor: Tensor, filling: float) -> tuple[Tensor, Tensor]:
    """(whole, the same values with a margin on all four sides)."""
    rows, columns = tensor.shape
    whole = torch.full((rows + 2 * MARGIN, -(-columns // 16) * 16 + 32), filling, device=DEVICE)
    whole = whole.to(tensor.dtype)
    inside = whole[MARGIN:-MARGIN, 16 : 16 + columns]
    inside.copy_(tensor)
    return whole, inside


def guarded(packed: layout.Packed) -> layout.Packed:
    nan = float("nan")
    zeros = None if packed.zeros is None else amid(packed.zeros, 255)
    words, scales = amid(packed.words, -1), amid(packed.scales, nan)
    return replace(packed, words=words, scales=scales, zeros=zeros)


def untouched_beside(whole: Tensor, inside: Tensor) -> bool:
    inside = inside.clone()
    kept = whole.clone()
    kept[MARGIN:-MARGIN, 16 : 16 + inside.shape[1]] = SENTINEL
    return bool((kept == torch.tensor(SENTINEL).to(whole.dtype)).all())


def product(x: Tensor, weight: QuantTensor) -> tuple[Tensor, Tensor]:
    """(x @ weight.T, the same of absolute values), in float64."""
    values = dense(weight, torch.float32).double().to(x.device)
    return x.double() @ values.T, x.double().abs() @ values.T.abs()


def check(found: Tensor, wanted: Tensor, bound: Tensor) -> None:
    assert bool(found.isfinite().all())
    excess = (found.double() - wanted).abs() - bound - 1e-30
    assert float(excess.max()) <= 0, f"{float(excess.max())} more than allowed"


def check_linear(count: int, spec: QuantSpec, dtype: torch.dtype, bias: bool = True) -> None:
    weight = matrix(ROWS, COLUMNS, spec, seed=1)
    added = amid(draw(ROWS, seed=2).to(dtype), float("nan")) if bias else None
    _, x = amid_rows(draw(count, COLUMNS, seed=count).to(dtype), float("nan"))
    whole, out = amid_rows(torch.full((count, ROWS), SENTINEL, dtype=dtype), SENTINEL)
    launch.linear_into(out, x, guarded(layout.pack(weight)), added)
    wanted, magnitude = product(x, weight)
    if added is not None:
        wanted, magnitude = wanted + added.double(), magnitude + added.double().abs()
    check(out, wanted, ROUNDINGS * tolerances.kernel(dtype, COLUMNS) * magnitude)
    assert untouched_beside(whole, out)


def bank(spec: QuantSpec) -> list[Expert]:
    shapes = ((COLUMNS, ROWS), (COLUMNS, ROWS), (ROWS, COLUMNS))
    return [
        Expert(*(matrix(*shape, spec, 10 * e + 2 * i) for i, shape in enumerate(shapes)))
        for e in range(EXPERTS)
    ]


def expected_ffn(x: Tensor, expert: Expert, unit: float) -> tuple[Tensor, Tensor]:
    """(the expert's output, how far off it may be to first order)."""
    gate, up, down = expert
    assert isinstance(gate, QuantTensor)
    assert isinstance(up, QuantTensor)
    assert isinstance(down, QuantTensor)
    (g, g_size), (u, u_size) = product(x, gate), product(x, up)
    hidden = F.silu(g) * u
    slope = 1.1  # the steepest of silu
    off = unit * (slope * g_size * u.abs() + F.silu(g).abs() * u_size + hidden.abs())
    out, size = product(hidden, down)
    return out, product(off, down)[1] + unit * size


def routing(count: int) -> Tensor:
    ids = torch.randint(-1, EXPERTS + 1, (count,), generator=torch.Generator().manual_seed(count))
    ids[ids == IDLE] = 0
    ids[0], ids[2:3] = 2, -1
    return ids.to(DEVICE)


def check_moe(count: int, spec: QuantSpec, dtype: torch.dtype) -> None:
    experts = bank(spec)
    packed = layout.pack_experts(experts, DEVICE)
    packed = layout.PackedExperts(guarded(packed.gate_up), guarded(packed.down))
    ids, shares = routing(count), draw(count, seed=3).abs().to(dtype)
    _, x = amid_rows(draw(count, ROWS, seed=count).to(dtype), float("nan"))
    taken = (ids >= 0) & (ids < EXPERTS)
    x[~taken] = float("nan")  # what is skipped is not read
    few = count <= launch.MOE_DECODE_TOKENS
    start = SENTINEL if few else 0.0
    whole, out = amid_rows(torch.full((count, ROWS), start, dtype=dtype), SENTINEL)
    launch.moe_ffn_into(out, x, ids, amid(shares, float("nan")), packed)
    assert untouched_beside(whole, out)
    assert not out[~taken].any()
    unit = ROUNDINGS * tolerances.kernel(dtype, COLUMNS)
    for row in taken.nonzero()[:, 0].tolist():
        wanted, bound = expected_ffn(x[row : row + 1], experts[int(ids[row])], unit)
        share = shares[row].double()
        check(out[row : row + 1], share * wanted, share * bound + unit * (share * wanted).abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("count", [1, 5, 21])
def test_linear(count: int, spec: QuantSpec, dtype: torch.dtype) -> None:
    check_linear(count, spec, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("count", [1, 7, 43])
def test_moe_ffn(count: int, spec: QuantSpec, dtype: torch.dtype) -> None:
    check_moe(count, spec, dtype)


@pytest.mark.parametrize("scale", ["bfloat16", "float32"])
def test_scales_of_other_types(scale: str) -> None:
    spec = QuantSpec(4, 32, symmetric=False, scale_dtype=scale)
    check_linear(3, spec, torch.float32, bias=False)
    check_linear(20, spec, torch.float32, bias=False)


@pytest.mark.parametrize("count", [4, 300])
def test_nobody_takes_a_token(count: int) -> None:
    x = torch.full((count, ROWS), float("nan"), device=DEVICE)
    packed = layout.pack_experts(bank(QuantSpec(4, 32)), DEVICE)
    for skip in (-1, EXPERTS):
        ids = torch.full((count,), skip, device=DEVICE)
        assert not launch.moe_ffn(x, ids, torch.ones(count, device=DEVICE), packed).any()


@pytest.mark.parametrize("count", [0, 3, 40])
@pytest.mark.parametrize("family", ["cuda", "hopper", "cdna", "rdna"])
def test_bodies_of_the_table_with_shipped_tiles(
    monkeypatch: pytest.MonkeyPatch, family: str, count: int
) -> None:
    monkeypatch.setattr(launch, "tiles", lambda device: configs.FAMILIES[family])
    spec = QuantSpec(4, 64)
    request = table.Request(torch.float32, DEVICE.type, spec)
    assert table.choose("moe_ffn", request).name == "triton"
    x, experts = draw(count, ROWS, seed=0), bank(spec)
    ids = routing(count) if count else torch.empty(0, dtype=torch.int64, device=DEVICE)
    ids[ids == EXPERTS] = -1  # the reference knows one skip
    shares = torch.rand(count, device=DEVICE)
    found, wanted = (
        body(x, ids, shares, experts.__getitem__)
        for body in (launch.moe_ffn, table.OPS["moe_ffn"][-1].body)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    weight, x = matrix(ROWS, COLUMNS, spec, 0), draw(count, 1, COLUMNS, seed=0)
    torch.testing.assert_close(
        launch.linear(x, weight), table.OPS["linear"][-1].body(x, weight), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("spec", [QuantSpec(3, -1), QuantSpec(8, 64, False)], ids=str)
def test_torch_ops_take_the_kernels(spec: QuantSpec, count: int) -> None:
    request = table.Request(torch.float32, DEVICE.type)
    three = [[matrix(ROWS, ROWS, spec, 3 * e + i) for i in range(3)] for e in range(EXPERTS)]
    ((_, packed),) = ops.pack_experts(three, request)
    head = ops.pack(three[0][0], request)
    assert packed.gate_up.held_as == head.form.held_as == "words"
    assert table.choose("moe_ffn", replace(request, spec=head.form.spec)).name == "triton"
    x, ids, shares = draw(count, ROWS, seed=0), routing(count), draw(count, seed=3).abs()
    ids[ids == EXPERTS] = -1
    bias = draw(head.form.rows, seed=4)
    ids, shares, bias = (torch.stack((t, t + 1), 1)[:, 0] for t in (ids, shares, bias))  # strided
    arguments = (x, ids, shares, packed.tensors, packed.gate_up, packed.down)
    found = torch.ops.zaya.moe_ffn(*arguments)
    wanted = table.OPS["moe_ffn"][-1].body(x, ids, shares, lambda e: Expert(*three[e]))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    found = torch.ops.zaya.linear(x, head.tensors, head.form, bias)
    wanted = table.OPS["linear"][-1].body(x, three[0][0], bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.zaya.moe_ffn.default, arguments)


def test_real_size() -> None:
    weight, x = matrix(2048, 2048, QuantSpec(4, 32), 0), draw(1, 2048, seed=1).half()
    wanted, magnitude = product(x, weight)
    bound = ROUNDINGS * tolerances.kernel(torch.float16, 2048) * magnitude
    check(launch.linear(x, weight), wanted, bound)


# What a wrong kernel would look like: (source, replaced by).
MUTANTS = {
    "nibble order": ("plane * bits >= 16", "plane * bits < 16"),
    "no mask on decode's inputs": ("mask=k < columns, other=0", ""),
    "no mask on prefill's inputs": ("& (k < columns)[None, :]", ""),
    "decode's scale of another group": (
        "+ (b // (group // (4 * per)))[None, :]", "+ (b // (group // (2 * per)))[None, :]",
    ),
    "prefill's scale of another group": (
        "+ (b // (group // (4 * per)))[:, None]", "+ (b // (group // (2 * per)))[:, None]",
    ),
    "prefill's scale of another group, one a step": (
        "+ start // (group // (4 * per))", "+ start // (group // (2 * per))",
    ),
    "middle of the range": ("1.0 * (1 << (bits - 1))", "1.0 * ((1 << (bits - 1)) - 1)"),
    "always the first expert": ("first = expert * (", "first = 0 * ("),
    "gate taken for up": ("words + rows * blocks * 4", "words"),
    "skipped rows not written": ("nothing, mask=stored", "nothing, mask=stored & False"),
    "rows written beyond the last": (
        "result.to(out.dtype.element_ty), mask=stored",
        "result.to(out.dtype.element_ty), mask=n < rows + 1",
    ),
    "tokens written beyond the last": (
        "mask=here[:, None] & (n < rows)[None, :],\n    )", "mask=(n < rows)[None, :],\n    )",
    ),
    "no routing weight": ("result *= tl.load(shares", "result += 0 * tl.load(shares"),
}  # fmt: skip


def module_from(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mutate:
    """Runs the tests of this file on changed source."""
    source = Path(launch.kernels().__file__ or "").read_text(encoding="utf-8")

    def run(old: str, new: str) -> None:
        assert old in source or not old
        path = tmp_path / "mutant.py"
        path.write_text(source.replace(old, new) if old else source, encoding="utf-8")
        module = module_from(path)
        monkeypatch.setattr(launch, "kernels", lambda: module)
        for count in (3, 21):
            check_linear(count, QuantSpec(4, 32), torch.float32)
            check_moe(count, QuantSpec(4, 32), torch.float32)
            check_linear(count, QuantSpec(8, 128, symmetric=False), torch.float32)

    return run


def test_the_source_unchanged_passes(mutate: Mutate) -> None:
    mutate("", "")


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(mutate: Mutate, name: str) -> None:
    with pytest.raises(AssertionError, match=r"allowed|isfinite|untouched|any"):
        mutate(*MUTANTS[name])
