"""Search of the best ggml block: the torch reference, oracle of ``src/blocks_kernel.cpp``.

The grids are those of ``BlockTensor``: a sub-group's codes k stand for the values ``a k - b``, and
in a K-quant a = d s and b = dmin n with whole numbers s and n and two numbers d, dmin for the whole
super-block.  The search minimises the squared error, weighted by ``importance`` if there is any.

**1. Each sub-group by itself, real a and b.**  A list of steps is tried (``SEARCHES``, found on
normal and Student-t weights).  Each gives codes, for which least squares gives the best a and b
and, from the same sums, how much of the energy they explain: ``gain``.  The best is refined by
computing codes from its a and b and solving once more.

**2. A super-block's d and dmin.**  With the codes of step 1 fixed, the error of any a and b is a
quadratic form of known sums.  So many d and dmin around largest a / 63 and largest b / 63 are
tried without looking at a weight again, each with the best s (of the two next to a / d) and the n
that goes with it: rounding the two independently costs 2 % (Q4_K) to 4 % (Q5_K) of the error.

**3. The real grid.**  From here on codes are computed from the numbers a file holds, and errors are
measured, not predicted.  In turns: d and dmin are fitted to the codes by least squares and kept
where the super-block's error falls; s and n move to neighbours where the sub-group's error falls.

Types with one sub-group per block need only step 1, and one measurement of the rounded numbers
(against plain rounding, for Q4_1 and Q5_1).  Symmetric types have no b, and k may name a value of
a table (IQ4_NL, IQ4_XS).

**Exact order of float32 operations**, which the native code repeats bit for bit, without any fused
multiply-add:

* a block is multiplied by p = 2^-floor(log2 absmax) first, as ``affine`` does with a group.  d and
  dmin are rounded to fp16 at their real size and then multiplied by p.
* sums over a sub-group run in 4 lanes: element i belongs to lane i mod 4, a lane adds in order,
  then lanes fold 4 → 2 → 1 by adding the upper half to the lower.  Sums over the sub-groups of a
  block fold the same way, 16 → 8 → 4 → 2 → 1.
* what is kept must be strictly better, so the first of equals wins.
* importance is scaled by a power of two that brings its maximum into [1, 2); zero counts as 2^-30,
  so that weights nobody looks at are still rounded sensibly.

A block of zeros, or one so small that its scales vanish in fp16, becomes zeros.  One so large that
every scale overflows raises ValueError, and so does a weight that is not finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zaya_quant import affine, blocks, native
from zaya_quant.qtensor import IQ4_NL_LEVELS, BlockTensor
from zaya_quant.spec import BlockSpec

LANES = 4
LEAST_IMPORTANCE = 2.0**-30
# Below this part of its terms the determinant of a fit is mostly rounding.
_SINGULAR = 2.0**-16
_SMALLEST_STEP = 2.0**-126  # 1 / step must be finite
_LARGEST_HALF = 65504.0
# Rows are processed in tiles of about this many weights, so that temporaries stay in cache.
_TILE = 1 << 17


@dataclass(frozen=True)
class Search:
    """What is tried for one type.

    Attributes:
        ratios: step 1, steps as multiples of the sub-group's range (of its absmax, with the sign
            that gives the largest weight the lowest code, for symmetric types).
        scales: step 2, d as multiples of the largest step.
        minima: step 2, dmin as multiples of the largest offset.
        reach: step 3, for each turn how far from s neighbours are tried.
    """

    ratios: tuple[float, ...]
    scales: tuple[float, ...] = ()
    minima: tuple[float, ...] = ()
    reach: tuple[int, ...] = ()


def _spread(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) / (count - 1) * index for index in range(count)]


def _reciprocals(values: list[float]) -> tuple[float, ...]:
    return tuple(1 / value for value in values)


_SIX_BITS = {
    "scales": _reciprocals(_spread(57, 67, 21)),
    "minima": _reciprocals(_spread(60, 66, 3)),
    "reach": (3, 1),
}
_Q3_POINTS = _spread(0.75, 1.6, 10)
_IQ4_POINTS = _spread(0.80, 1.25, 14)
_IQ4_RATIOS = _reciprocals([127 * p for p in _IQ4_POINTS] + [-113 * p for p in _IQ4_POINTS])
# Ranges that hold nearly all of the best values over normal and Student-t (4 degrees of freedom)
# weights, and as many points as gained something: half as many again, at two thirds of the speed,
# lower the squared error of Q4_K and Q5_K by 0.2 %.
SEARCHES = {
    "Q4_1": Search(_reciprocals(_spread(11, 16.6, 32))),
    "Q5_1": Search(_reciprocals(_spread(26, 33, 32))),
    # The lowest code is -4 and the highest 3, so either sign may serve a sub-group better; under
    # importance the best steps may leave much of the largest weight out.
    "Q3_K": Search(
        _reciprocals([4 * p for p in _Q3_POINTS] + [-3 * p for p in _Q3_POINTS]),
        scales=_reciprocals(_spread(-32, -27, 21)),
        reach=(2,),
    ),
    "Q4_K": Search(_reciprocals(_spread(11.5, 16.5, 20)), **_SIX_BITS),
    "Q5_K": Search(_reciprocals(_spread(26, 32.8, 22)), **_SIX_BITS),
    # 16 weights on 64 levels: a step a quarter larger than it must be may fit just as well.
    "Q6_K": Search(
        _reciprocals(_spread(32 * 0.72, 32 * 1.02, 20)),
        scales=_reciprocals(_spread(-128, -108, 33)),
        reach=(4,),
    ),
    # The lowest level is -127 and the highest 113: here too either sign may be better.
    "IQ4_NL": Search(_IQ4_RATIOS),
    "IQ4_XS": Search(_IQ4_RATIOS, scales=_reciprocals(_spread(-32, -24, 33)), reach=(2,)),
}


def quantize_blocks(
    weight: Tensor, spec: BlockSpec, importance: Tensor | None = None
) -> BlockTensor:
    """``weight [out, in]`` on the best grid found; ``importance [in]`` weighs the errors.

    Raises:
        ValueError: broken blocks, a weight that is not finite, or a block whose scales overflow.
    """
    value, weigh = _prepared(weight, spec, importance)
    rows, columns = weight.shape
    step = max(1, _TILE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        some = weight[part].to(torch.float32)
        blocks.check_finite(some, start)
        tile = _tile_of(some, spec, weigh)
        found = _search_symmetric(tile) if spec.grid.symmetric else _search_offset(tile)
        _check_representable(tile, found, start)
        _store(value.rows(part), tile, found)
    return value


def quantize_natively(
    weight: Tensor, spec: BlockSpec, importance: Tensor | None = None, isa: str | None = None
) -> BlockTensor:
    """``quantize_blocks`` in the native library; ``isa`` is one of ``native.supported_isas()``."""
    value, weigh = _prepared(weight, spec, importance)
    s = SEARCHES[spec.type]
    contiguous = weight.contiguous()
    native.search_blocks(contiguous, value, weigh, s.ratios, s.scales, s.minima, s.reach, isa)
    return value


def _prepared(
    weight: Tensor, spec: BlockSpec, importance: Tensor | None
) -> tuple[BlockTensor, Tensor | None]:
    """Checked: where the result goes, and the importance as the search takes it."""
    affine.check_weight(weight)
    rows, columns = weight.shape
    blocks.row_bytes(spec.type, columns)
    value = blocks.empty(spec, rows, columns)
    assert isinstance(value, BlockTensor)
    return value, None if importance is None else floored_importance(importance, columns)


def floored_importance(importance: Tensor, columns: int) -> Tensor:
    """``affine.scaled_importance`` with nothing below ``LEAST_IMPORTANCE``."""
    return affine.scaled_importance(importance, columns).clamp_min(LEAST_IMPORTANCE)


@dataclass(frozen=True)
class _Tile:
    """Normalised weights of some rows; G sub-groups of L weights make a block."""

    spec: BlockSpec
    x: Tensor  # [rows, blocks, G, L]
    w: Tensor | None  # [blocks, G, L]
    absmax: Tensor  # [rows, blocks, 1]: of the weights as they were
    p: Tensor  # [rows, blocks, 1]

    def weighted(self, values: Tensor) -> Tensor:
        """Sum over a sub-group of ``values [rows, blocks, G, L]``, weighted."""
        return _fold(values if self.w is None else values * self.w, LANES)

    def half(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """A normalised number rounded to fp16 at its real size: that, and it normalised."""
        real = (normal * (1 / self.p)).to(torch.float16).to(torch.float32)
        real = real + 0.0  # no -0: which of two equal zeros came out must not show in the bytes
        return real, real * self.p

    def levels(self, step: Tensor, shift: Tensor | None) -> Tensor:
        """Of every weight the nearest k, as float: ``x = step k - shift``."""
        x = self.x if shift is None else self.x + shift.unsqueeze(3)
        exact = x * _inverse(step).unsqueeze(3)
        if self.spec.grid.codebook:
            return torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32)[_nearest_level(exact)]
        return torch.round(exact.clamp(*self.spec.grid.code_range))

    def error(self, step: Tensor, shift: Tensor | None) -> Tensor:
        """Squared error of every sub-group ``[rows, blocks, G]`` with the nearest codes."""
        values = step.unsqueeze(3) * self.levels(step, shift)
        if shift is not None:
            values = values - shift.unsqueeze(3)
        return self.weighted((self.x - values).square())


@dataclass
class _Sums:
    """Sums over the codes k and weights x of every sub-group, ``[rows, blocks, G]``."""

    k: Tensor
    kk: Tensor
    xk: Tensor


@dataclass
class _Found:
    """What a file holds, as float32: of a block ``[rows, blocks, 1]``, of a sub-group [.., G]."""

    scale: Tensor
    offset: Tensor | None
    sub_scale: Tensor | None
    sub_min: Tensor | None
    # value = step k - shift, both normalised, [rows, blocks, G]
    step: Tensor
    shift: Tensor | None


# ---- types with an offset: Q4_1, Q5_1, Q4_K, Q5_K ----------------------------------------------


@dataclass
class _Line:
    """Step 1: of every sub-group the best ``step k - shift`` so far; all ``[rows, blocks, G]``.

    A K-quant cannot subtract a negative number (``limited``).
    """

    tile: _Tile
    limited: bool
    total: Tensor  # sum of the importance
    mass: Tensor  # weighted sum of x
    step: Tensor
    shift: Tensor
    gain: Tensor
    sums: _Sums


def _search_offset(tile: _Tile) -> _Found:
    search = SEARCHES[tile.spec.type]
    limited = tile.spec.grid.sub_bits > 0
    low, high = torch.aminmax(tile.x, dim=3)
    if limited:
        low = low.clamp_max(0)
    line = _flat_line(tile, limited)
    for ratio in torch.tensor(search.ratios):
        _try_line(line, (high - low) * ratio, -low)
    _try_line(line, line.step, line.shift)
    if not limited:
        return _single_offset(line, low, high)
    found, state = _start_super(line, search)
    for reach in search.reach:
        sums = _sums_of(tile, tile.levels(found.step, found.shift))
        _refit_super(line, found, state, sums)
        _move_super(line, found, state, sums, reach)
    return found


def _flat_line(tile: _Tile, limited: bool) -> _Line:
    """The best constant."""
    ones = torch.ones_like(tile.x)
    total, mass = tile.weighted(ones), tile.weighted(tile.x)
    shift = -(mass / total)
    if limited:
        shift = shift.clamp_min(0)
    zero = torch.zeros_like(mass)
    sums = _Sums(zero, zero, zero)
    return _Line(tile, limited, total, mass, zero, shift, -(shift * mass), sums)


def _sums_of(tile: _Tile, k: Tensor) -> _Sums:
    return _Sums(tile.weighted(k), tile.weighted(k * k), tile.weighted(tile.x * k))


def _try_line(line: _Line, step: Tensor, shift: Tensor) -> None:
    """Compute codes, fit the line to them, and keep it where it explains more."""
    s = _sums_of(line.tile, line.tile.levels(step, shift))
    size = line.total * s.kk
    determinant = size - s.k * s.k
    step = (line.total * s.xk - line.mass * s.k) / determinant
    shift = (s.k * s.xk - line.mass * s.kk) / determinant
    fits = determinant > size * _SINGULAR
    if line.limited:
        fits &= shift >= 0
        step = torch.where(fits, step, s.xk / s.kk)
        shift = torch.where(fits, shift, 0.0)
    gain = step * s.xk - shift * line.mass
    # false for NaN, as from codes that are all 0
    better = (gain > line.gain) & (step >= 0)
    if not line.limited:
        better &= fits
    line.step = torch.where(better, step, line.step)
    line.shift = torch.where(better, shift, line.shift)
    line.gain = torch.where(better, gain, line.gain)
    for name in ("k", "kk", "xk"):
        old, new = getattr(line.sums, name), getattr(s, name)
        setattr(line.sums, name, torch.where(better, new, old))


def _single_offset(line: _Line, low: Tensor, high: Tensor) -> _Found:
    """Q4_1, Q5_1: the line found, rounded, if it is better than plain rounding."""
    tile = line.tile
    zero = torch.zeros_like(tile.p)
    found = _Found(zero, zero, None, None, zero, zero)
    error = tile.error(found.step, found.shift)
    plain = (high - low) / tile.spec.grid.code_range[1]
    for step, shift in ((plain, low), (line.step, None)):
        scale, step = tile.half(step)
        if shift is None:  # what fits best beside the step as it was rounded
            shift = (line.mass - step * line.sums.k) / line.total
        offset, base = tile.half(shift)
        other = tile.error(step, -base)
        better = scale.isfinite() & offset.isfinite() & (other < error)
        error = torch.where(better, other, error)
        _keep(found, better, scale=scale, offset=offset, step=step, shift=-base)
    return found


@dataclass
class _State:
    """Steps 2 and 3: the normalised d and dmin ``[rows, blocks, 1]``, the errors [.., G]."""

    d: Tensor
    dmin: Tensor
    error: Tensor


def _start_super(line: _Line, search: Search) -> tuple[_Found, _State]:
    """Step 2: d, dmin and the integers with the smallest error as the fixed codes predict it."""
    tile = line.tile
    zero, zeros = torch.zeros_like(tile.p), torch.zeros_like(line.step)
    found = _Found(zero, zero, zeros, zeros, zeros, zeros)
    state = _State(zero, zero, zeros)
    least = zero
    largest = line.step.amax(dim=2, keepdim=True), line.shift.amax(dim=2, keepdim=True)
    for ratio in torch.tensor(search.scales):
        scale, d = tile.half(largest[0] * ratio)
        for other in torch.tensor(search.minima):
            offset, dmin = tile.half(largest[1] * other)
            s, n, errors = _nearest_integers(line, d, dmin)
            error = _fold(errors).unsqueeze(2)
            better = scale.isfinite() & offset.isfinite() & (error < least)
            least = torch.where(better, error, least)
            _keep(found, better, scale=scale, offset=offset, sub_scale=s, sub_min=n)
            state.d = torch.where(better, d, state.d)
            state.dmin = torch.where(better, dmin, state.dmin)
    shift = state.dmin * _given(found.sub_min)
    found.step, found.shift = state.d * _given(found.sub_scale), shift
    state.error = tile.error(found.step, shift)
    return found, state


def _nearest_integers(line: _Line, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, n and the predicted error (less the energy) of every sub-group, ``[rows, blocks, G]``."""
    exact = (line.step * _inverse(d)).clamp_max(63)
    s = torch.round(exact)
    second = (s + torch.where(exact > s, 1.0, -1.0)).clamp(0, 63)
    n, error = _predicted(line, d * s, dmin)
    other_n, other = _predicted(line, d * second, dmin)
    better = other < error
    return tuple(torch.where(better, a, b) for a, b in ((second, s), (other_n, n), (other, error)))  # type: ignore[return-value]


def _predicted(line: _Line, step: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """The best n for a step, and the error (less the energy), both for the codes of step 1."""
    s = line.sums
    n = torch.round((((step * s.k - line.mass) / line.total) * _inverse(dmin)).clamp(0, 63))
    shift = dmin * n
    error = step * (step * s.kk - 2 * s.xk) + shift * (shift * line.total + 2 * line.mass)
    return n, error - 2 * (step * shift) * s.k


def _refit_super(line: _Line, found: _Found, state: _State, sums: _Sums) -> None:
    """d and dmin by least squares, the codes and integers fixed; kept where the error falls."""
    tile = line.tile
    s, n = _given(found.sub_scale), _given(found.sub_min)
    ss, sn, nn = _fold(s * s * sums.kk), _fold(s * n * sums.k), _fold(n * n * line.total)
    xs, xn = _fold(s * sums.xk), _fold(n * line.mass)
    size, dmin = ss * nn, state.dmin.squeeze(2)
    determinant = size - sn * sn
    fits = determinant > size * _SINGULAR
    # Without a joint fit (say, no n but 0) dmin stays, and d is fitted beside it.
    scale = torch.where(fits, (xs * nn - sn * xn) / determinant, (xs + sn * dmin) / ss)
    offset = torch.where(fits, (sn * xs - ss * xn) / determinant, dmin)
    scale, d = tile.half(scale.unsqueeze(2))
    offset, dmin = tile.half(offset.unsqueeze(2))
    step, shift = d * s, dmin * n
    error = tile.error(step, shift)
    usable = scale.isfinite() & offset.isfinite() & (d > 0) & (dmin >= 0)
    better = usable & (_fold(error) < _fold(state.error)).unsqueeze(2)
    _keep(found, better, scale=scale, offset=offset, step=step, shift=shift)
    state.d = torch.where(better, d, state.d)
    state.dmin = torch.where(better, dmin, state.dmin)
    state.error = torch.where(better, error, state.error)


def _move_super(line: _Line, found: _Found, state: _State, sums: _Sums, reach: int) -> None:
    """s up to ``reach`` away, each with the n that goes with it; then n one away."""
    s, n, start = _given(found.sub_scale), _given(found.sub_min), found.step
    inverse, slope = _inverse(state.dmin), sums.k / line.total
    for distance in range(1, reach + 1):
        for change in (-distance, distance):
            moved = (s + change).clamp(0, 63)
            beside = torch.round((n + (state.d * moved - start) * slope * inverse).clamp(0, 63))
            _try_integers(line.tile, found, state, moved, beside)
    s, n = _given(found.sub_scale), _given(found.sub_min)
    for change in (-1, 1):
        _try_integers(line.tile, found, state, s, (n + change).clamp(0, 63))


def _try_integers(tile: _Tile, found: _Found, state: _State, s: Tensor, n: Tensor) -> None:
    step, shift = state.d * s, state.dmin * n
    error = tile.error(step, shift)
    better = error < state.error
    _keep(found, better, sub_scale=s, sub_min=n, step=step, shift=shift)
    state.error = torch.where(better, error, state.error)


# ---- types without: Q3_K, Q6_K, IQ4_NL, IQ4_XS -------------------------------------------------


def _search_symmetric(tile: _Tile) -> _Found:
    search = SEARCHES[tile.spec.type]
    low, high = torch.aminmax(tile.x, dim=3)
    # with the sign that gives the largest weight the lowest code; both present: positive
    signed = torch.maximum(-low, high) * torch.where(-low >= high, 1.0, -1.0)
    zero = torch.zeros_like(signed)
    ray = _Ray(tile, zero, zero, zero, zero)
    for ratio in torch.tensor(search.ratios):
        _try_ray(ray, signed * ratio)
    _try_ray(ray, ray.step)
    if not tile.spec.grid.sub_bits:
        scale, step = tile.half(ray.step)
        return _Found(scale, None, None, None, step, None)
    found, error = _start_scales(ray, search)
    for reach in search.reach:
        error = _refit_scales(tile, found, error)
        error = _move_scales(tile, found, error, reach)
    return found


@dataclass
class _Ray:
    """Step 1: of every sub-group the best ``step k`` so far; all ``[rows, blocks, G]``."""

    tile: _Tile
    step: Tensor
    gain: Tensor
    kk: Tensor
    xk: Tensor


def _try_ray(ray: _Ray, step: Tensor) -> None:
    k = ray.tile.levels(step, None)
    kk, xk = ray.tile.weighted(k * k), ray.tile.weighted(ray.tile.x * k)
    step = xk / kk
    gain = step * xk
    better = gain > ray.gain  # false for NaN, as from codes that are all 0
    ray.step = torch.where(better, step, ray.step)
    ray.gain = torch.where(better, gain, ray.gain)
    ray.kk, ray.xk = torch.where(better, kk, ray.kk), torch.where(better, xk, ray.xk)


def _start_scales(ray: _Ray, search: Search) -> tuple[_Found, Tensor]:
    """Step 2: d and the integers with the smallest error as the fixed codes predict it."""
    tile = ray.tile
    zero, zeros = torch.zeros_like(tile.p), torch.zeros_like(ray.step)
    found = _Found(zero, None, zeros, None, zeros, None)
    least = zero
    low, high = torch.aminmax(ray.step, dim=2, keepdim=True)
    largest = torch.where(-low >= high, low, high)
    for ratio in torch.tensor(search.scales):
        scale, d = tile.half(largest * ratio)
        s = torch.round((ray.step * _inverse(d)).clamp(*tile.spec.grid.sub_range))
        step = d * s
        error = _fold(step * (step * ray.kk - 2 * ray.xk)).unsqueeze(2)
        better = scale.isfinite() & (error < least)
        least = torch.where(better, error, least)
        _keep(found, better, scale=scale, sub_scale=s, step=step)
    return found, tile.error(found.step, None)


def _refit_scales(tile: _Tile, found: _Found, error: Tensor) -> Tensor:
    """d by least squares, kept where the error falls; returns the errors of the sub-groups."""
    s = _given(found.sub_scale)
    k = tile.levels(found.step, None)
    kk, xk = tile.weighted(k * k), tile.weighted(tile.x * k)
    scale, d = tile.half((_fold(s * xk) / _fold(s * s * kk)).unsqueeze(2))
    step = d * s
    other = tile.error(step, None)
    better = scale.isfinite() & (_fold(other) < _fold(error)).unsqueeze(2)
    _keep(found, better, scale=scale, step=step)
    return torch.where(better, other, error)


def _move_scales(tile: _Tile, found: _Found, error: Tensor, reach: int) -> Tensor:
    """s up to ``reach`` away; returns the errors of the sub-groups."""
    s = _given(found.sub_scale)
    d = found.scale * tile.p
    for distance in range(1, reach + 1):
        for change in (-distance, distance):
            moved = (s + change).clamp(*tile.spec.grid.sub_range)
            step = d * moved
            other = tile.error(step, None)
            better = other < error
            _keep(found, better, sub_scale=moved, step=step)
            error = torch.where(better, other, error)
    return error


# ---- shared ------------------------------------------------------------------------------------


def _tile_of(weight: Tensor, spec: BlockSpec, weigh: Tensor | None) -> _Tile:
    length = spec.grid.sub_group
    shape = (-1, spec.group_size // length, length)
    x = weight.unflatten(1, shape)
    low, high = torch.aminmax(x.flatten(2), dim=2, keepdim=True)
    absmax = torch.maximum(-low, high)
    p = affine.inverse_power(absmax)
    w = None if weigh is None else weigh.unflatten(0, shape)
    return _Tile(spec, x * p.unsqueeze(3), w, absmax, p)


def _fold(values: Tensor, lanes: int = 0) -> Tensor:
    """Sum over the last dimension in ``lanes`` lanes (0: one for each element)."""
    total = values
    if lanes:
        chunks = values.unflatten(-1, (-1, lanes))
        total = chunks[..., 0, :]
        for index in range(1, chunks.shape[-2]):
            total = total + chunks[..., index, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total.squeeze(-1)


def _inverse(step: Tensor) -> Tensor:
    """1 / step; 0 for steps too small, so that their codes are those of 0."""
    usable = step.abs() >= _SMALLEST_STEP
    return torch.where(usable, 1 / torch.where(usable, step, 1.0), 0.0)


def _nearest_level(exact: Tensor) -> Tensor:
    """Index of the nearest of ``IQ4_NL_LEVELS``; a tie goes to the lower."""
    levels = torch.tensor(IQ4_NL_LEVELS, dtype=torch.float32)
    return torch.bucketize(exact, (levels[1:] + levels[:-1]) / 2)


def _keep(found: _Found, better: Tensor, **values: Tensor) -> None:
    for name, value in values.items():
        setattr(found, name, torch.where(better, value, getattr(found, name)))


def _given(tensor: Tensor | None) -> Tensor:
    """A tensor the type is known to have."""
    assert tensor is not None
    return tensor


def _check_representable(tile: _Tile, found: _Found, first_row: int) -> None:
    # Zeros are a choice as long as fp16 could have held scales: for tiny weights, or where a large
    # one counts next to nothing.
    nothing = (found.scale == 0) & (True if found.offset is None else found.offset == 0)
    lost = (nothing & (tile.absmax > _LARGEST_HALF)) | ~found.scale.isfinite()
    if bool(lost.any()):
        row, block, _ = (int(i) for i in lost.nonzero()[0])
        raise native.overflows(tile.spec.type, first_row + row, block)


def _store(value: BlockTensor, tile: _Tile, found: _Found) -> None:
    """Fill ``value``, a view of the rows of the tile."""
    if tile.spec.grid.codebook:
        codes = _nearest_level(tile.x * _inverse(found.step).unsqueeze(3))
    else:
        codes = tile.levels(found.step, found.shift)
    for target, source in (
        (value.codes, codes.flatten(1)),
        (value.scales, found.scale.squeeze(2)),
        (value.offsets, None if found.offset is None else found.offset.squeeze(2)),
        (value.sub_scales, None if found.sub_scale is None else found.sub_scale.flatten(1)),
        (value.sub_mins, None if found.sub_min is None else found.sub_min.flatten(1)),
    ):
        if target is not None and source is not None:
            target.copy_(source)
