"""Laws of the kernel table: every body of an op computes what the reference body computes."""

from collections.abc import Callable

import pytest
import torch

from zaya_kernels import table
from zaya_kernels.reference import Expert, Weight
from zaya_quant.affine import quantize_affine
from zaya_quant.spec import QuantSpec

ROWS = [(op, row) for op, rows in table.OPS.items() for row in rows]
SPECS = (None, QuantSpec(4, 32), QuantSpec(8, -1), QuantSpec(3, 16, symmetric=False))
SIZES = (0, 1, 5, 17)
# Sums of up to 48 products in another order, rounded to the dtype of the activations. The reference
# rounds weights and what lies between two products to it, too, which the native kernels do not.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2.0**-5}

WIDTH, HIDDEN, EXPERTS = 48, 33, 4


def weight(
    rows: int, columns: int, spec: QuantSpec | None, dtype: torch.dtype, seed: int
) -> Weight:
    """A matrix as it is stored."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 4
    return values.to(dtype) if spec is None else quantize_affine(values, spec)


def activations(count: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Inputs of an op."""
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).to(dtype)


def bank(spec: QuantSpec | None, dtype: torch.dtype) -> Callable[[int], Expert]:
    """Fetches one of a few experts."""
    shapes = ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))
    experts = [
        Expert(*(weight(*shape, spec, dtype, 3 * e + i) for i, shape in enumerate(shapes)))
        for e in range(EXPERTS)
    ]
    return experts.__getitem__


def linear_case(count: int, spec: QuantSpec | None, dtype: torch.dtype) -> tuple[object, ...]:
    bias = activations(1, HIDDEN, dtype)[0]
    return activations(count, WIDTH, dtype), weight(HIDDEN, WIDTH, spec, dtype, 0), bias


def moe_case(count: int, spec: QuantSpec | None, dtype: torch.dtype) -> tuple[object, ...]:
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(-1, EXPERTS, (count,), generator=draw)
    ids[::3] = -1  # also when only one row is there
    shares = torch.rand(count, generator=draw).to(dtype)
    return activations(count, WIDTH, dtype), ids, shares, bank(spec, dtype)


def embedding_case(count: int, spec: QuantSpec | None, dtype: torch.dtype) -> tuple[object, ...]:
    ids = torch.randint(HIDDEN, (count,), generator=torch.Generator().manual_seed(count))
    return ids, weight(HIDDEN, WIDTH, spec, dtype, 0), dtype


CASES = {"linear": linear_case, "moe_ffn": moe_case, "embedding": embedding_case}


def test_every_op_has_a_case() -> None:
    assert set(CASES) == set(table.OPS)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(("op", "row"), ROWS, ids=[f"{op}-{row.name}" for op, row in ROWS])
def test_every_row_equals_the_reference(
    op: str, row: table.Row, count: int, spec: QuantSpec | None, dtype: torch.dtype
) -> None:
    reason = row.can_run(table.Request(dtype, "cpu", spec))
    if reason is not None:
        pytest.skip(reason)
    arguments = CASES[op](count, spec, dtype)
    expected, found = (body(*arguments) for body in (table.OPS[op][-1].body, row.body))
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if op == "moe_ffn":
        skipped = arguments[1] == -1
        assert not found[skipped].any()
        assert found[~skipped].any(1).all()


@pytest.mark.parametrize("row", table.OPS["moe_ffn"], ids=lambda row: row.name)
def test_rows_that_no_expert_takes_are_exactly_zero(row: table.Row) -> None:
    reason = row.can_run(table.Request())
    if reason is not None:
        pytest.skip(reason)
    x, ids, shares, experts = moe_case(17, None, torch.float32)
    assert isinstance(x, torch.Tensor)
    x[ids == -1] = float("inf")  # what is not computed cannot leak
    out = row.body(x, ids, shares, experts)
    assert torch.equal(out[ids == -1], torch.zeros_like(x[ids == -1]))
    assert torch.isfinite(out).all()
