"""Factored Hessians: what they are the inverse of, and what becomes of hopeless ones."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tolerances import kernel
from zaya_quant import stats
from zaya_quant.stats import Factor, InputStats, factor


def hessian_of(columns: int, rows: int, seed: int = 0) -> torch.Tensor:
    """mean x x^T of rows whose channels are correlated and of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(max(1, columns // 8), columns, generator=generator)
    x = torch.randn(rows, len(mixed), generator=generator) @ mixed
    x += 0.1 * torch.randn(rows, columns, generator=generator)
    x *= 10 ** (2 * torch.rand(columns, generator=generator) - 1)
    return x.t() @ x / rows


def damped(hessian: torch.Tensor, found: Factor) -> torch.Tensor:
    """What was factored, float64."""
    ordered = hessian.double()[found.order][:, found.order]
    return ordered + found.damping * torch.eye(len(hessian), dtype=torch.float64)


def first_damping(hessian: torch.Tensor) -> float:
    return stats._DAMPING * float(hessian.diagonal().double().mean())


def assert_factors(hessian: torch.Tensor, found: Factor) -> None:
    """U H U^T is the identity, within what float32 can do (Higham, sections 10.1 and 14.2).

    H = R R^T is solved for R with an error below gamma |R||R^T|, and U R = I for U with one below
    gamma |U||R|.
    """
    upper = found.upper
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    wide, exact = upper.double(), damped(hessian, found)
    size = len(hessian)
    root = torch.linalg.cholesky(exact.flip(0, 1)).flip(0, 1)
    spread = wide.abs() @ root.abs()
    allowed = kernel(torch.float32, 2 * size) * (spread @ spread.t() + spread + spread.t())
    assert ((wide @ exact @ wide.t() - torch.eye(size)).abs() <= allowed).all()
    torch.testing.assert_close(
        wide.t() @ wide * found.damping, torch.linalg.inv(exact) * found.damping, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 150, 300])
def test_the_factor_is_that_of_the_inverse_of_the_ordered_damped_hessian(columns):
    hessian = hessian_of(columns, 4 * columns)
    before = hessian.clone()
    found = factor(hessian)
    assert torch.equal(hessian, before)
    assert found.damping == pytest.approx(first_damping(hessian), rel=1e-12)
    assert_factors(hessian, found)


def test_columns_come_in_descending_order_of_their_diagonal():
    diagonal = hessian_of(64, 200).diagonal()
    found = factor(torch.diag(diagonal))
    assert sorted(found.order.tolist()) == list(range(64))
    assert (diagonal[found.order].diff() <= 0).all()


def test_ties_go_to_the_lowest_index():
    assert factor(torch.eye(300)).order.tolist() == list(range(300))
    values = torch.tensor([1.0, 3.0, 0.0, 3.0, 1.0, 0.0])
    assert factor(torch.diag(values)).order.tolist() == [1, 3, 0, 4, 2, 5]


@pytest.mark.parametrize(
    "hessian",
    [
        hessian_of(64, 2),
        hessian_of(64, 1),
        torch.ones(40, 40),
        torch.diag(torch.tensor([0.0, 1.0, 0.0])),
        torch.ones(4, 4) * 1e-30,
        torch.ones(4, 4) * 1e30,
    ],
    ids=["two rows", "one row", "one direction", "dead inputs", "tiny", "huge"],
)
def test_singular_hessians_need_no_more_than_the_first_damping(hessian):
    found = factor(hessian)
    assert found.damping == pytest.approx(first_damping(hessian), rel=1e-12)
    assert_factors(hessian, found)


def test_a_hessian_of_zeros_is_as_good_as_the_identity():
    found = factor(torch.zeros(5, 5))
    assert torch.equal(found.upper, torch.eye(5))
    assert found.order.tolist() == list(range(5))


@pytest.mark.parametrize("beside", [0.5, 1.03, 1.4, 2.0, 20.0, 1e3, 1e5])
def test_damping_grows_until_the_hessian_is_positive_definite_and_no_further(beside):
    hessian = torch.tensor([[1.0, beside], [beside, 1.0]])
    found = factor(hessian)
    lowest = 1.0 - beside  # eigenvalue
    tenfold = max(0, math.ceil(math.log10(-lowest / stats._DAMPING))) if lowest < 0 else 0
    expected = first_damping(hessian) * stats._DAMPING_STEP**tenfold
    assert found.damping == pytest.approx(expected, rel=1e-12)
    assert_factors(hessian, found)


def test_what_no_damping_mends_is_refused():
    hopeless = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(ValueError, match="cannot be made positive definite"):
        factor(hopeless)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -10.0])
def test_a_mean_diagonal_that_cannot_be_is_refused(value):
    hessian = torch.eye(6)
    hessian[4, 4] = value
    with pytest.raises(ValueError, match="mean diagonal is"):
        factor(hessian)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_product_is_refused(value):
    hessian = torch.eye(6)
    hessian[4, 1] = hessian[1, 4] = value
    with pytest.raises(ValueError, match="cannot be made positive definite"):
        factor(hessian)


@pytest.mark.parametrize("columns", [16, 128])
def test_the_number_of_torch_threads_does_not_matter_to_small_matrices(columns):
    """Beyond 128 columns LAPACK adds in another order, which is why ``convert`` uses one thread."""
    hessian = hessian_of(columns, columns)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(factor(hessian))
    finally:
        torch.set_num_threads(before)
    one, two = found
    assert torch.equal(one.order, two.order)
    assert torch.equal(one.upper, two.upper)
    assert one.damping == two.damping


def input_stats(hessian: torch.Tensor) -> InputStats:
    return InputStats(9, hessian.diagonal().clone(), hessian)


def test_a_factor_is_computed_once_and_shared(monkeypatch):
    calls = []

    def counting(hessian):
        calls.append(hessian)
        return factor(hessian)

    monkeypatch.setattr(stats, "factor", counting)
    one, other = input_stats(hessian_of(16, 40)), input_stats(hessian_of(16, 40))
    assert one.factor() is one.factor()
    assert len(calls) == 1
    assert other.factor() is not one.factor()  # no state behind the instances
    assert len(calls) == 2


def test_matrices_quantized_side_by_side_see_the_same_factor():
    hessian = hessian_of(48, 100)
    shared = input_stats(hessian)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: shared.factor(), range(8)))
    expected = factor(hessian)
    for one in found:
        assert torch.equal(one.upper, expected.upper)
        assert torch.equal(one.order, expected.order)


def test_without_a_hessian_there_is_no_factor():
    with pytest.raises(ValueError, match="hold no Hessian"):
        InputStats(9, torch.ones(4)).factor()


def test_the_pull_of_a_drift_is_computed_once():
    hessian = hessian_of(16, 40)
    drift = hessian_of(16, 40, seed=1)
    one = InputStats(9, hessian.diagonal().clone(), hessian, drift)
    assert one.pull() is one.pull()
    assert len(one._pulls) == 1
    inverse = torch.linalg.inv(
        hessian.double() + first_damping(hessian) * torch.eye(16, dtype=torch.float64)
    )
    expected = drift.double() @ inverse
    torch.testing.assert_close(
        one.pull().double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )
    assert input_stats(hessian).pull() is None
