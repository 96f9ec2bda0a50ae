"""GPTQ (arXiv 2210.17323): round one input channel at a time, and let the rest make up for it.

The error that matters is that of the output, ``tr(E H E^T)`` for a weight error E and the Hessian
H = mean x x^T of the inputs. Columns are rounded in order of their diagonal, largest first; each
column's error is spread over the columns not yet rounded, by the rows of U with
inverse(H + damping) = U^T U.

What is done on top of the paper:

* Scales (and zero points, offsets, the integers of super-blocks) come first and stay (*static
  groups*), from the search of ``imatrix`` with the damped second moments as importance, so any
  order of columns works with groups that the file stores in theirs.
* **Refit.** With the codes found, the best scales (and offsets) of a row are a small least-squares
  problem under H itself; then columns are rounded once more on them.
* **Guard.** Row by row the result is kept only where its error under the damped Hessian is below
  that of rounding to nearest, so no row ends worse than that.

Codes are only ever computed on scales already rounded to the dtype the file stores.

All grids are one here: a weight is ``step * multiple + base``, step and base those of its group,
and the multiple what its code stands for (``_Grid``). A refit leaves zero points and the integers
of super-blocks alone, which would be no linear problem: choosing the integers again, one by one
under H, gained 0.01 dB (Q4_K, Q5_K) to 0.04 dB (Q6_K), and a second refit of any type 0.01 to
0.08 dB for half as much time again.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from zaya_quant.methods import imatrix
from zaya_quant.products import times_transposed
from zaya_quant.qtensor import IQ4_NL_LEVELS, BlockTensor, Quantized, QuantTensor
from zaya_quant.spec import Spec
from zaya_quant.stats import Factor, InputStats

_BLOCK = 64  # columns whose updates are gathered into one matrix product
_REFITS = 1
_TILE = 1 << 18  # elements of a tile of rows, so that temporaries stay in cache
_SMALLEST_SCALE = 2.0**-126
_RIDGE = 1e-6  # of the diagonal of a refit


def quantize(weight: Tensor, spec: Spec, stats: InputStats | None = None) -> Quantized:
    """``weight [out, in]`` rounded under the Hessian of its inputs.

    Raises:
        ValueError: no Hessian; a weight that is not finite, or needs wider scales; rows that are
            no whole number of blocks.
    """
    if stats is None or stats.hessian is None:
        raise ValueError("gptq needs a Hessian; calibrate first, or use the method rtn")
    return quantize_towards(weight, spec, stats)


def quantize_towards(target: Tensor, spec: Spec, stats: InputStats) -> Quantized:
    """Round ``target`` [out, in]: the weights, or what best stands in for them on these inputs."""
    # With the damping that the Hessian gets, so that a channel whose inputs are zero counts a
    # little and is not clipped.
    weigh = InputStats(stats.count, stats.second_moment + stats.factor().damping)
    best = imatrix.quantize(target, spec, weigh)
    problem = _Problem(target.float(), stats.factor(), _damped(stats))
    errors = problem.errors(best)
    for attempt in range(1 + _REFITS):
        start = problem.refit(best) if attempt else best
        codes, found = problem.round(start)
        best, errors = _better(best, errors, replace(start, codes=codes), found)
    return best


def _damped(stats: InputStats) -> Tensor:
    assert stats.hessian is not None
    damped = stats.hessian.float().clone()
    damped.diagonal().add_(stats.factor().damping)
    return damped


def _better(
    best: Quantized, errors: Tensor, other: Quantized, others: Tensor
) -> tuple[Quantized, Tensor]:
    """Of each row the one with the smaller error; NaN never wins."""
    take = others < errors
    rows, chosen = take[:, None], {}
    for field in fields(best):
        mine = getattr(best, field.name)
        if isinstance(mine, Tensor):
            chosen[field.name] = torch.where(rows, getattr(other, field.name), mine)
    return replace(best, **chosen), torch.where(take, others, errors)


@dataclass(frozen=True)
class _Problem:
    """Find codes and scales for ``target`` [out, in] under a damped Hessian [in, in]."""

    target: Tensor
    factor: Factor
    hessian: Tensor

    def errors(self, value: Quantized) -> Tensor:
        """``e H e^T`` of every row's error e, [out]."""
        total = torch.empty(len(self.target))
        for part in self._tiles():
            error = self.target[part] - value.rows(part).dequantize()
            total[part] = (times_transposed(error, self.hessian) * error).sum(dim=1)
        return total

    def round(self, start: Quantized) -> tuple[Tensor, Tensor]:
        """Codes [out, in] on the steps and bases of ``start``, and their errors [out].

        Works on columns as contiguous rows, in the order of the factor. Each column's error over
        its pivot, squared, is what it adds to ``e H e^T``.
        """
        order, upper = self.factor.order, self.factor.upper
        columns = self.target.shape[1]
        grid = _grid_of(start)
        rounding = _Rounding.of(grid)
        group = order.div(grid.length, rounding_mode="floor").tolist()  # of each ordered column
        left = self.target.t()[order].contiguous()
        codes = torch.empty_like(left)
        pivots = upper.diagonal().tolist()
        total = torch.zeros(left.shape[1])
        for begin in range(0, columns, _BLOCK):
            end = min(begin + _BLOCK, columns)
            errors = torch.empty(end - begin, left.shape[1])
            for k in range(begin, end):
                error = errors[k - begin]
                rounding.nearest(left[k], group[k], codes[k], error)
                error /= pivots[k]
                left[k + 1 : end].addr_(upper[k, k + 1 : end], error, alpha=-1)
            total += errors.square().sum(dim=0)
            left[end:] -= times_transposed(upper[begin:end, end:].t(), errors.t())
        result = torch.empty(self.target.shape, dtype=start.codes.dtype)
        result[:, order] = codes.t().to(start.codes.dtype)
        return result, total

    def refit(self, value: Quantized) -> Quantized:
        """The best scales (and offsets) for given codes, rounded to the dtype of the scales.

        A row is linear in them: s Q, the rows of Q what a scale or an offset is multiplied by, so
        the best s solve (Q H Q^T) s = Q H w.
        """
        numbers = _numbers(value)
        grouped = self._grouped_hessian(value) if _offsets(value) is not None else None
        for part in self._tiles():
            numbers[part] = self._fitted(value.rows(part), self.target[part], grouped)
        return _with_numbers(value, numbers)

    def _fitted(self, value: Quantized, target: Tensor, grouped: Tensor | None) -> Tensor:
        """The best scales ‖ offsets of a tile of rows, fp32; its own where there are none."""
        grid = _grid_of(value)
        scale_units, offset_units = _units(value, grid)
        columns, blocks = target.shape[1], value.scales.shape[1]
        goal = times_transposed(target, self.hessian)
        basis = grid.multiples(value.codes) * _expand(scale_units, grid.length, columns)
        length = grid.length * (grid.steps.shape[1] // blocks)
        system, right = self._scale_equations(basis, goal, length, blocks)
        if offset_units is not None and grouped is not None:
            more = _offset_equations(basis, goal, offset_units, grouped, blocks)
            system, right = _joined(system, right, *more)
        return _solved(system, right, _numbers(value))

    def _scale_equations(
        self, basis: Tensor, goal: Tensor, length: int, blocks: int
    ) -> tuple[Tensor, Tensor]:
        """Q H Q^T [rows, blocks, blocks] and Q H w [rows, blocks].

        ``basis`` [rows, in] is all of Q that is not 0: each scale has ``length`` columns.
        """
        rows, columns = basis.shape
        pad = blocks * length - columns
        system = torch.empty(rows, blocks, blocks)
        right = torch.empty(rows, blocks)
        for b in range(blocks):
            own = slice(b * length, min((b + 1) * length, columns))
            rest = slice(own.start, columns)  # the system is symmetric: half will do
            seen = (basis[:, own] @ self.hessian[own, rest]).mul_(basis[:, rest])
            seen = torch.nn.functional.pad(seen, (0, pad)) if pad else seen
            sums = seen.unflatten(1, (blocks - b, length)).sum(dim=2)
            system[:, b, b:] = sums
            system[:, b:, b] = sums
            right[:, b] = (goal[:, own] * basis[:, own]).sum(dim=1)
        return system, right

    def _grouped_hessian(self, value: Quantized) -> Tensor:
        """Columns of the Hessian summed by group, [in, groups]: what a group's base meets."""
        return self.hessian.unflatten(1, (-1, _grid_of(value).length)).sum(dim=2)

    def _tiles(self) -> list[slice]:
        rows, columns = self.target.shape
        step = max(1, _TILE // columns)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _offset_equations(
    basis: Tensor, goal: Tensor, units: Tensor, grouped: Tensor, blocks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What offsets add to the equations of the scales.

    ``units`` [rows, groups] is what a block's offset is multiplied by in each of its groups, so
    products with Q are sums of ``grouped`` [in, groups], the Hessian's columns summed by group.

    Returns scales x offsets, offsets x offsets [rows, blocks, blocks], and Q H w [rows, blocks].
    """
    groups = units.shape[1]
    split = (blocks, groups // blocks)
    met = torch.einsum(
        "rbc,bcg->rbg", basis.unflatten(1, (blocks, -1)), grouped.unflatten(0, (blocks, -1))
    )
    mixed = (met * units.unsqueeze(1)).unflatten(2, split).sum(dim=3)
    both = grouped.unflatten(0, (groups, -1)).sum(dim=1) * units.unsqueeze(1) * units.unsqueeze(2)
    own = both.unflatten(2, split).sum(dim=3).unflatten(1, split).sum(dim=2)
    wanted = (goal.unflatten(1, (groups, -1)).sum(dim=2) * units).unflatten(1, split).sum(dim=2)
    return mixed, own, wanted


def _joined(
    system: Tensor, right: Tensor, mixed: Tensor, own: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations of scales and offsets."""
    above, below = torch.cat([system, mixed], dim=2), torch.cat([mixed.mT, own], dim=2)
    return torch.cat([above, below], dim=1), torch.cat([right, wanted], dim=1)


def _solved(system: Tensor, right: Tensor, known: Tensor) -> Tensor:
    """The solution of every row's system; what is known where there is none."""
    diagonal = system.diagonal(dim1=1, dim2=2)
    empty = diagonal <= 0  # a group of zeros: any scale will do, so it keeps its own
    diagonal.copy_(torch.where(empty, 1.0, diagonal * (1 + _RIDGE)))
    solved, failed = torch.linalg.solve_ex(system, right.unsqueeze(2))
    solved = solved.squeeze(2)
    good = (failed == 0)[:, None] & ~empty & torch.isfinite(solved)
    return torch.where(good, solved, known)


@dataclass(frozen=True)
class _Grid:
    """The values that the codes of a matrix stand for: ``step * multiple + base``.

    Attributes:
        length: columns of a group, that share step and base; the last one may be shorter.
        steps: [out, groups] fp32.
        bases: [out, groups] fp32, or None: 0.
        zeros: [out, groups] fp32: the multiple is code - zero. None: 0.
        levels: [codes] fp32, ascending: the multiple is levels[code]. None: it is the code.
        low: the smallest code.
        high: the largest code.
    """

    length: int
    steps: Tensor
    bases: Tensor | None
    zeros: Tensor | None
    levels: Tensor | None
    low: int
    high: int

    def multiples(self, codes: Tensor) -> Tensor:
        """What codes [out, in] stand for in steps, fp32."""
        if self.levels is not None:
            return self.levels[codes.long()]
        if self.zeros is None:
            return codes.float()
        return codes.float() - _expand(self.zeros, self.length, codes.shape[1])


def _grid_of(value: Quantized) -> _Grid:
    low = -(1 << (value.spec.bits - 1)) if value.codes.dtype == torch.int8 else 0
    high = low + (1 << value.spec.bits) - 1
    if isinstance(value, QuantTensor):
        length = value.spec.group_length(value.shape[1])
        zeros = None if value.zeros is None else value.zeros.float()
        return _Grid(length, value.scales.float(), None, zeros, None, low, high)
    grid = value.spec.grid
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32) if grid.codebook else None
    return _Grid(grid.sub_group, value.steps(), value.bases(), None, levels, low, high)


@dataclass(frozen=True)
class _Rounding:
    """A grid's numbers with groups first, as rounding by columns reads them."""

    grid: _Grid
    steps: Tensor
    inverses: Tensor  # 0 for a step of 0, whose codes make no difference
    bases: Tensor | None
    zeros: Tensor | None
    cuts: Tensor | None  # midpoints of the levels

    @classmethod
    def of(cls, grid: _Grid) -> _Rounding:
        steps = grid.steps.t().contiguous()
        usable = steps.abs() >= _SMALLEST_SCALE
        inverses = torch.where(usable, 1 / torch.where(usable, steps, 1.0), 0.0)
        bases = None if grid.bases is None else grid.bases.t().contiguous()
        zeros = None if grid.zeros is None else grid.zeros.t().contiguous()
        cuts = None if grid.levels is None else (grid.levels[1:] + grid.levels[:-1]) / 2
        return cls(grid, steps, inverses, bases, zeros, cuts)

    def nearest(self, column: Tensor, group: int, code: Tensor, error: Tensor) -> None:
        """Write the nearest codes of a column of weights, and what they miss; all [out]."""
        if self.bases is not None:
            column = column - self.bases[group]
        torch.mul(column, self.inverses[group], out=code)
        if self.cuts is not None and self.grid.levels is not None:
            index = torch.bucketize(code, self.cuts)  # a tie: the lower, as in the search
            code.copy_(index)
            multiple = self.grid.levels[index]
        else:
            zeros = None if self.zeros is None else self.zeros[group]
            if zeros is not None:
                code += zeros
            code.round_().clamp_(self.grid.low, self.grid.high)
            multiple = code if zeros is None else code - zeros
        torch.addcmul(column, multiple, self.steps[group], value=-1, out=error)


def _offsets(value: Quantized) -> Tensor | None:
    return value.offsets if isinstance(value, BlockTensor) else None


def _numbers(value: Quantized) -> Tensor:
    """What a refit may change: scales, then offsets if there are any, fp32 [out, numbers]."""
    offsets = _offsets(value)
    scales = value.scales.float()
    return scales.clone() if offsets is None else torch.cat([scales, offsets.float()], dim=1)


def _with_numbers(value: Quantized, numbers: Tensor) -> Quantized:
    """The value with other ``_numbers``, in the dtype that it stores; its own for an overflow."""
    blocks = value.scales.shape[1]
    found = {"scales": _stored(numbers[:, :blocks], value.scales)}
    offsets = _offsets(value)
    if offsets is not None:
        found["offsets"] = _stored(numbers[:, blocks:], offsets)
    return replace(value, **found)


def _stored(numbers: Tensor, known: Tensor) -> Tensor:
    rounded = numbers.to(known.dtype)
    return torch.where(torch.isfinite(rounded), rounded, known)


def _units(value: Quantized, grid: _Grid) -> tuple[Tensor, Tensor | None]:
    """What scales and offsets are multiplied by in each group, fp32 [out, groups].

    0 where a group is zero whatever its codes: it has no part in a refit, so it stays zero.
    """
    blocks = isinstance(value, BlockTensor)
    sub_scales, sub_mins = (value.sub_scales, value.sub_mins) if blocks else (None, None)
    alive = grid.steps != 0
    scales = alive.float() if sub_scales is None else alive * sub_scales.float()
    if grid.bases is None:
        return scales, None
    alive = alive | (grid.bases != 0)
    return scales, alive.float() if sub_mins is None else alive * -sub_mins.float()


def _expand(per_group: Tensor, length: int, columns: int) -> Tensor:
    """``[out, groups]`` repeated to ``[out, in]``; the last group may be shorter."""
    return per_group.repeat_interleave(length, dim=1)[:, :columns]
