"""GPTQ (arXiv 2210.17323): round one input channel at a time, and let the rest make up for it.

The error that matters is that of the output, ``tr(E H E^T)`` for a weight error E and the Hessian
H = mean x x^T of the inputs. Columns are rounded in order of their diagonal, largest first; each
column's error is spread over the columns not yet rounded, by the rows of U with
inverse(H + damping) = U^T U.

What is done on top of the paper:

* Scales (and zero points) come first and stay (*static groups*), from the search of
  ``zaya_quant.affine`` with the damped second moments as importance, so any order of columns works
  with groups that the file stores in theirs.
* **Refit.** With the codes found, the best scales of a row are a small least-squares problem under
  H itself; then columns are rounded once more on them.
* **Guard.** Row by row the result is kept only where its error under the damped Hessian is below
  that of rounding to nearest, so no row ends worse than that.

Codes are only ever computed on scales already rounded to the dtype the file stores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zaya_quant.methods import imatrix
from zaya_quant.products import times_transposed
from zaya_quant.qtensor import SCALE_DTYPES, QuantTensor, expand_groups
from zaya_quant.spec import QuantSpec
from zaya_quant.stats import Factor, InputStats

_BLOCK = 64  # columns whose updates are gathered into one matrix product
_REFITS = 1
_TILE = 1 << 18  # elements of a tile of rows, so that temporaries stay in cache
_SMALLEST_SCALE = 2.0**-126


def quantize(weight: Tensor, spec: QuantSpec, stats: InputStats | None = None) -> QuantTensor:
    """``weight [out, in]`` rounded under the Hessian of its inputs.

    Raises:
        ValueError: no Hessian; a weight that is not finite, or needs wider scales.
    """
    if stats is None or stats.hessian is None:
        raise ValueError("gptq needs a Hessian; calibrate first, or use the method rtn")
    return quantize_towards(weight, spec, stats)


def quantize_towards(target: Tensor, spec: QuantSpec, stats: InputStats) -> QuantTensor:
    """Round ``target`` [out, in]: the weights, or what best stands in for them on these inputs."""
    # With the damping that the Hessian gets, so that a channel whose inputs are zero counts a
    # little and is not clipped.
    weigh = InputStats(stats.count, stats.second_moment + stats.factor().damping)
    best = imatrix.quantize(target, spec, weigh)
    problem = _Problem(target.float(), stats.factor(), spec, _damped(stats))
    errors = problem.errors(best)
    for attempt in range(1 + _REFITS):
        start = replace(best, scales=problem.refit(best)) if attempt else best
        codes, found = problem.round(start)
        best, errors = _better(best, errors, replace(start, codes=codes), found)
    return best


def _damped(stats: InputStats) -> Tensor:
    assert stats.hessian is not None
    damped = stats.hessian.float().clone()
    damped.diagonal().add_(stats.factor().damping)
    return damped


def _better(
    best: QuantTensor, errors: Tensor, other: QuantTensor, others: Tensor
) -> tuple[QuantTensor, Tensor]:
    """Of each row the one with the smaller error; NaN never wins."""
    take = others < errors
    rows = take[:, None]
    chosen = QuantTensor(
        torch.where(rows, other.codes, best.codes),
        torch.where(rows, other.scales, best.scales),
        best.zeros,  # no step changes zero points
        best.spec,
    )
    return chosen, torch.where(take, others, errors)


@dataclass(frozen=True)
class _Problem:
    """Find codes and scales for ``target`` [out, in] under a damped Hessian [in, in]."""

    target: Tensor
    factor: Factor
    spec: QuantSpec
    hessian: Tensor

    def errors(self, value: QuantTensor) -> Tensor:
        """``e H e^T`` of every row's error e, [out]."""
        total = torch.empty(len(self.target))
        for part in self._tiles():
            error = self.target[part] - _rows(value, part).dequantize()
            total[part] = (times_transposed(error, self.hessian) * error).sum(dim=1)
        return total

    def round(self, start: QuantTensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] on the scales and zero points of ``start``, and their errors [out].

        Works on columns as contiguous rows, in the order of the factor. Each column's error over
        its pivot, squared, is what it adds to ``e H e^T``.
        """
        order, upper = self.factor.order, self.factor.upper
        columns = self.target.shape[1]
        # Group of each ordered column; scales and zeros as [groups, out].
        group = order.div(self.spec.group_length(columns), rounding_mode="floor").tolist()
        scales = start.scales.float().t().contiguous()
        usable = scales.abs() >= _SMALLEST_SCALE
        inverses = torch.where(usable, 1 / torch.where(usable, scales, 1.0), 0.0)
        zeros = None if start.zeros is None else start.zeros.float().t().contiguous()
        low, high = float(self.spec.qmin), float(self.spec.qmax)
        left = self.target.t()[order].contiguous()
        codes = torch.empty_like(left)
        pivots = upper.diagonal().tolist()
        total = torch.zeros(left.shape[1])
        for begin in range(0, columns, _BLOCK):
            end = min(begin + _BLOCK, columns)
            errors = torch.empty(end - begin, left.shape[1])
            for k in range(begin, end):
                g = group[k]
                code, error = codes[k], errors[k - begin]
                torch.mul(left[k], inverses[g], out=code)
                if zeros is not None:
                    code += zeros[g]
                code.round_().clamp_(low, high)
                shifted = code if zeros is None else code - zeros[g]
                torch.addcmul(left[k], shifted, scales[g], value=-1, out=error)
                error /= pivots[k]
                left[k + 1 : end].addr_(upper[k, k + 1 : end], error, alpha=-1)
            total += errors.square().sum(dim=0)
            left[end:] -= times_transposed(upper[begin:end, end:].t(), errors.t())
        result = torch.empty(self.target.shape, dtype=start.codes.dtype)
        result[:, order] = codes.t().to(start.codes.dtype)
        return result, total

    def refit(self, value: QuantTensor) -> Tensor:
        """The best scales [out, groups] for given codes, rounded to the dtype of the scales.

        With Q the codes of a row split by group, its scales s solve (Q H Q^T) s = Q H w.
        """
        columns = self.target.shape[1]
        length, groups = self.spec.group_length(columns), self.spec.groups(columns)
        pad = groups * length - columns
        scales = value.scales.float().clone()
        for part in self._tiles():
            codes = value.codes[part].float()
            if value.zeros is not None:
                zeros = value.zeros[part].float()
                codes -= expand_groups(zeros, self.spec, columns)
            goal = times_transposed(self.target[part], self.hessian)
            system = torch.empty(len(codes), groups, groups)
            right = torch.empty(len(codes), groups)
            for g in range(groups):
                own = slice(g * length, min((g + 1) * length, columns))
                rest = slice(own.start, columns)  # the system is symmetric: half will do
                seen = (codes[:, own] @ self.hessian[own, rest]).mul_(codes[:, rest])
                seen = torch.nn.functional.pad(seen, (0, pad)) if pad else seen
                sums = seen.unflatten(1, (groups - g, length)).sum(dim=2)
                system[:, g, g:] = sums
                system[:, g:, g] = sums
                right[:, g] = (goal[:, own] * codes[:, own]).sum(dim=1)
            diagonal = system.diagonal(dim1=1, dim2=2)
            empty = diagonal <= 0  # a group of zeros: any scale will do, so it keeps its own
            diagonal.copy_(torch.where(empty, 1.0, diagonal * (1 + 1e-6)))
            solved, failed = torch.linalg.solve_ex(system, right.unsqueeze(2))
            solved = solved.squeeze(2)
            good = (failed == 0)[:, None] & ~empty & torch.isfinite(solved)
            scales[part] = torch.where(good, solved, scales[part])
        rounded = scales.to(SCALE_DTYPES[self.spec.scale_dtype])
        return torch.where(torch.isfinite(rounded), rounded, value.scales)

    def _tiles(self) -> list[slice]:
        rows, columns = self.target.shape
        step = max(1, _TILE // columns)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _rows(value: QuantTensor, part: slice) -> QuantTensor:
    zeros = None if value.zeros is None else value.zeros[part]
    return QuantTensor(value.codes[part], value.scales[part], zeros, value.spec)
