"""What a quantization method may know about the inputs of a matrix.

For the rows x_t of a layer's input with weights p_t (how much the model makes of that row)::

    second_moment [in]      sum p_t x_t^2   / sum p_t
    hessian       [in, in]  sum p_t x_t x_t^T / sum p_t
    drift         [in, in]  sum p_t (r_t - x_t) x_t^T / sum p_t

r_t is what the float model has in the place of x_t. It differs once earlier layers are quantized.
Methods see means, not sums, so that figures of experts with few and many tokens compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zaya_quant.products import times_transposed

# Of the mean of the diagonal. GPTQ uses 0.01; experts see few tokens, and on a trained checkpoint
# with 1 to 4 tokens an input channel 0.05 gave less KL (0.15: the same within noise).
_DAMPING = 0.05
_DAMPING_STEP = 10.0
_DAMPING_TRIES = 8
_TRIANGLE = 128


@dataclass(frozen=True)
class Factor:
    """A factored Hessian, columns in the order in which they are to be quantized.

    Attributes:
        order: [in] column indices, largest diagonal first (ties: lowest index).
        upper: [in, in] fp32, U with inverse(H + damping) = U^T U for the ordered columns.
        damping: what was added to the diagonal.
    """

    order: Tensor
    upper: Tensor
    damping: float


@dataclass(frozen=True)
class InputStats:
    """Statistics of one matrix's inputs; see the top of this file.

    Attributes:
        count: rows they were made of.
        hessian: None where only second moments are known.
        drift: None where no earlier layer has changed, or nobody measured it.
    """

    count: int
    second_moment: Tensor
    hessian: Tensor | None = None
    drift: Tensor | None = None
    _factors: list[Factor] = field(default_factory=list, repr=False, compare=False)
    _pulls: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    def factor(self) -> Factor:
        """The factored Hessian; computed once, and shared by the matrices with these inputs.

        Raises:
            ValueError: no Hessian, or none that damping makes positive definite.
        """
        if not self._factors:
            if self.hessian is None:
                raise ValueError("these statistics hold no Hessian")
            self._factors.append(factor(self.hessian))
        return self._factors[0]

    def pull(self) -> Tensor | None:
        """``drift · inverse(H + damping)`` [in, in], or None without drift; computed once."""
        if self.drift is None:
            return None
        if not self._pulls:
            found = self.factor()
            right = times_transposed(self.drift.float()[:, found.order], found.upper)
            pull = torch.empty_like(right)
            pull[:, found.order] = times_transposed(right, found.upper.t())
            self._pulls.append(pull)
        return self._pulls[0]


def factor(hessian: Tensor) -> Factor:
    """Order, damp and factor a Hessian ``[in, in]``.

    Damping starts at 5 % of the mean diagonal and grows tenfold until the factorisation succeeds:
    a Hessian of few tokens is singular, and must cost quality rather than stop the run.

    Raises:
        ValueError: it is not finite, or hopeless.
    """
    diagonal = hessian.diagonal().float()
    mean = float(diagonal.double().mean())
    if not 0 <= mean < float("inf"):
        raise ValueError(f"the Hessian's mean diagonal is {mean}")
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order].float()
    damping = _DAMPING * mean or 1.0  # all inputs zero: any diagonal will do
    for _ in range(_DAMPING_TRIES):
        damped = ordered.clone()
        damped.diagonal().add_(damping)
        # Flipped, so that H = R R^T with R upper triangular: then U is the inverse of R.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            upper = _inverse_of_upper(lower.flip(0, 1))
            if bool(torch.isfinite(upper).all()):
                return Factor(order, upper, damping)
        damping *= _DAMPING_STEP
    raise ValueError("the Hessian cannot be made positive definite")


def _inverse_of_upper(matrix: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix, by halves, so that most of it is matrix products."""
    size = len(matrix)
    if size <= _TRIANGLE:
        return torch.linalg.solve_triangular(
            matrix, torch.eye(size, dtype=matrix.dtype), upper=True
        )
    half = size // 2
    first = _inverse_of_upper(matrix[:half, :half])
    last = _inverse_of_upper(matrix[half:, half:])
    result = torch.zeros_like(matrix)
    result[:half, :half], result[half:, half:] = first, last
    right = times_transposed(matrix[:half, half:], last.t())
    result[:half, half:] = times_transposed(-first, right.t())
    return result
