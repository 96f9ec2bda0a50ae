"""Affine quantization on a searched scale: the torch reference, oracle of ``src/affine.cpp``.

A group of weights w shares one scale s (and zero point z): ``value = (code - z) * s``.  Plain
round-to-nearest takes s = absmax / qmax.  A slightly different scale nearly always has a smaller
squared error: it clips the largest weights a little, or fits the others better.  So each group
tries a fixed list of scales, keeps the one with the smallest error, and refines it by least
squares.  On normal weights, 4 bits, groups of 32, this gains 1.6 dB over plain rounding.

**Candidates (symmetric).**  s = a * r, a the absmax of the group, r out of ``scale_ratios``:
first r = 1/qmax (plain rounding, s > 0), then r = 1/2^(bits-1) with the sign that gives the
largest weight the code -2^(bits-1), as GGUF's Q4_0 does, then a grid around it.  A negative scale
is legal in GGUF, ONNX and compressed-tensors, which all only multiply.  At 2 and 3 bits both
signs are tried; at 4 bits the other sign gained at most 0.004 dB, so from there on it is left
out.  The first of equals wins, so a tie falls to plain rounding.

**Candidates (asymmetric).**  The range [min(lo, 0), max(hi, 0)] shrunk by ``_SHRINK``;
s = range / qmax > 0, z = rint(-lo / s) in 0..qmax.

**The error measured is the error shipped.**  A candidate is rounded to the dtype of the scales
*before* codes are computed from it.  Then at most two refinements: with the codes k = code - z
found so far, s* = sum(w k) / sum(k^2) is optimal; it is rounded, codes are computed anew, and it
is kept only if the error falls.

**Exact order of float32 operations**, which the native code repeats bit for bit (no fused
multiply-add anywhere):

* the group is multiplied by p = 2^-floor(log2 a), the exponent limited to -126..126, so that
  squares neither overflow nor vanish; the result for 2^n * w is 2^n times the result for w.
* k = clamp(rint(wp * (1 / sp))), rint to even, wp = w * p, sp = s * p.
* err = sum of ((wp - k * sp)^2) * importance.  All sums run in 16 lanes: element i belongs to
  lane i mod 16, a lane adds in order, then lanes fold 16 → 8 → 4 → 2 → 1 by adding the upper
  half to the lower.  Short groups are padded with zeros.
* importance is first scaled by a power of two that brings its maximum into [1, 2).

**Groups that cannot have a scale.**  All zeros: scale 0, codes 0 (zero point 0), value exactly 0.
So small that every scale rounds to 0 or below 2^-126: the same.  So large that every scale
overflows: ValueError; ``needs_wider_scales`` tells beforehand.  NaN or infinity: ValueError that
names the first one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zaya_quant.qtensor import SCALE_DTYPES, QuantTensor, expand_groups
from zaya_quant.spec import QuantSpec

LANES = 16
REFINEMENTS = 2
INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Where the best a / (s * 2^(bits-1)) lies for groups up to 64, up to 512 and longer: about the
# 0.5 % to 99.5 % quantiles over normal, Laplace and Student-t (4 degrees of freedom) weights in
# groups of 32, 128 and 2048, found on a grid of 150 values.
_WINDOWS: dict[int, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    2: ((0.80, 1.85), (1.00, 2.60), (1.40, 5.00)),
    3: ((0.80, 1.35), (0.95, 1.75), (1.30, 3.60)),
    4: ((0.82, 1.14), (0.93, 1.28), (1.16, 2.60)),
    5: ((0.83, 1.06), (0.92, 1.11), (1.07, 1.70)),
    6: ((0.85, 1.02), (0.91, 1.04), (1.02, 1.22)),
    8: ((0.93, 1.01), (0.93, 1.01), (0.98, 1.03)),
}
_GRID_POINTS = 16
_BOTH_SIGNS_UP_TO_BITS = 3
_SHRINK = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)

_SMALLEST_SCALE = 2.0**-126  # 1 / s must be finite and s a normal float32
_FP16_NORMAL = (2.0**-14, 65504.0)
# Rows are processed in blocks of about this many weights, so that temporaries stay in cache.
_BLOCK = 1 << 18


def quantize_affine(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None
) -> QuantTensor:
    """``weight [out, in]`` on the best scales found; ``importance [in]`` weighs the errors."""
    check_weight(weight)
    rows, columns = weight.shape
    weigh = None
    if importance is not None:
        weigh = _grouped(scaled_importance(importance, columns).unsqueeze(0), spec)
    groups = spec.groups(columns)
    codes = torch.empty((rows, columns), dtype=torch.int8 if spec.symmetric else torch.uint8)
    scales = torch.empty((rows, groups), dtype=SCALE_DTYPES[spec.scale_dtype])
    zeros = None if spec.symmetric else torch.empty((rows, groups), dtype=torch.uint8)
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        tile = _grouped(weight[part].to(torch.float32), spec)
        _check_finite(tile, start, spec)
        best = _search(tile, spec, weigh)
        _check_representable(best, start, spec)
        length = spec.group_length(columns)
        shifted = best.codes if best.zero is None else best.codes + best.zero
        codes[part] = shifted[:, :, :length].flatten(1)[:, :columns].to(codes.dtype)
        scales[part] = best.scale.squeeze(2).to(scales.dtype)
        if zeros is not None and best.zero is not None:
            zeros[part] = best.zero.squeeze(2).to(torch.uint8)
    return QuantTensor(codes, scales, zeros, spec)


def scale_ratios(bits: int, group_length: int) -> tuple[float, ...]:
    """Candidate scales of a symmetric group as multiples of its absmax, in order of preference."""
    half = 1 << (bits - 1)
    low, high = _WINDOWS[bits][0 if group_length <= 64 else 1 if group_length <= 512 else 2]
    step = (high - low) / (_GRID_POINTS - 1)
    grid = [low + step * i for i in range(_GRID_POINTS)]
    return (1 / (half - 1), *(1 / (half * point) for point in (1.0, *grid)))


def tries_both_signs(bits: int) -> bool:
    """Whether each candidate scale is tried with either sign."""
    return bits <= _BOTH_SIGNS_UP_TO_BITS


def absmax_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Scales of plain rounding ``[out, groups]``, float32, not rounded to spec.scale_dtype.

    absmax / qmax, or (max(hi, 0) - min(lo, 0)) / qmax when asymmetric.
    """
    check_weight(weight)
    low, high = torch.aminmax(_grouped(weight.to(torch.float32), spec), dim=2)
    if spec.symmetric:
        return torch.maximum(-low, high) / spec.qmax
    # Halves, because the difference of two finite floats can overflow.
    return (high.clamp_min(0) / 2 - low.clamp_max(0) / 2) / (spec.qmax / 2)


def needs_wider_scales(weight: Tensor, spec: QuantSpec) -> bool:
    """Whether some group's scale leaves the normal range of fp16, 2^-14 .. 65504.

    Below it fp16 loses precision bit by bit, above it overflows.  bfloat16 has the range of
    float32 and the same size, with 8 instead of 11 bits of precision.
    """
    return leaves_fp16_range(absmax_scales(weight, spec))


def leaves_fp16_range(scales: Tensor) -> bool:
    """Whether a nonzero scale lies outside the normal range of fp16."""
    low, high = _FP16_NORMAL
    return bool(((scales > high) | ((scales > 0) & (scales < low))).any())


def round_with_scales(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec
) -> Tensor:
    """Codes ``[out, in]`` nearest to ``weight`` on given scales; scale 0 gives the zero point."""
    check_weight(weight)
    columns = weight.shape[1]
    scale = scales.to(torch.float32)
    p = inverse_power(scale.abs())
    usable = scale.abs() >= _SMALLEST_SCALE
    inverse = torch.where(usable, 1 / torch.where(usable, scale * p, 1.0), 0.0)
    normal = weight.to(torch.float32) * expand_groups(p, spec, columns)
    codes = torch.round(normal * expand_groups(inverse, spec, columns))
    # 0 * inf: an element far beyond a group whose scale is 0 or vanishes next to it.
    codes = codes.nan_to_num(nan=0.0)
    if zeros is not None:
        codes = codes + expand_groups(zeros.to(torch.float32), spec, columns)
    return codes.clamp(spec.qmin, spec.qmax).to(torch.int8 if spec.symmetric else torch.uint8)


def check_weight(weight: Tensor) -> None:
    """Raise ValueError unless this is a matrix of a dtype that can be quantized."""
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected [out, in] with in > 0")
    if weight.dtype not in INPUT_DTYPES:
        allowed = ", ".join(str(dtype) for dtype in INPUT_DTYPES)
        raise ValueError(f"weight has dtype {weight.dtype}; allowed: {allowed}")


def scaled_importance(importance: Tensor, columns: int) -> Tensor:
    """Checked, float32, and scaled by a power of two so that its maximum is in [1, 2)."""
    if tuple(importance.shape) != (columns,):
        raise ValueError(f"importance has shape {tuple(importance.shape)}; expected ({columns},)")
    values = importance.detach().to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("importance holds a negative or non-finite value")
    return values * inverse_power(values.max())


@dataclass
class _Best:
    """The best of the candidates so far, for a tile ``[rows, groups, G]``."""

    tile: Tensor  # wp: the normalised weights
    p: Tensor  # [rows, groups, 1], as all below but codes
    absmax: Tensor
    error: Tensor
    scale: Tensor  # rounded to the dtype of the scales, held as float32
    zero: Tensor | None
    codes: Tensor  # k = code - zero, float32 [rows, groups, G]


def _search(tile: Tensor, spec: QuantSpec, weigh: Tensor | None) -> _Best:
    low, high = torch.aminmax(tile, dim=2, keepdim=True)
    absmax = torch.maximum(-low, high)
    p = inverse_power(absmax)
    best = _Best(
        tile=tile * p,
        p=p,
        absmax=absmax,
        error=torch.full_like(absmax, torch.inf),
        scale=torch.zeros_like(absmax),
        zero=None if spec.symmetric else torch.zeros_like(absmax),
        codes=torch.zeros_like(tile),
    )
    if spec.symmetric:
        _try_symmetric(best, low, high, spec, weigh)
    else:
        _try_asymmetric(best, low, high, spec, weigh)
    for _ in range(REFINEMENTS):
        k = best.codes
        above, below = best.tile * k, k * k
        if weigh is not None:
            above, below = above * weigh, below * weigh
        # No codes but 0 gives 0 / 0, which _try refuses like any scale it cannot use.
        _try(best, (_lane_sum(above) / _lane_sum(below)) / p, best.zero, spec, weigh)
    return best


def _try_symmetric(
    best: _Best, low: Tensor, high: Tensor, spec: QuantSpec, weigh: Tensor | None
) -> None:
    ratios = torch.tensor(scale_ratios(spec.bits, spec.group_length(best.tile.shape[2])))
    # The sign for which the largest weight has the code qmin; both present: positive.
    sign = torch.where(-low >= high, 1.0, -1.0)
    for index, ratio in enumerate(ratios):
        scale = best.absmax * ratio
        if index == 0:
            _try(best, scale, None, spec, weigh)
        elif tries_both_signs(spec.bits):
            _try(best, scale, None, spec, weigh)
            _try(best, -scale, None, spec, weigh)
        else:
            _try(best, scale * sign, None, spec, weigh)


def _try_asymmetric(
    best: _Best, low: Tensor, high: Tensor, spec: QuantSpec, weigh: Tensor | None
) -> None:
    low, high = low.clamp_max(0), high.clamp_min(0)
    for shrink in torch.tensor(_SHRINK):
        scale = (high / 2 - low / 2) * (shrink * (2 / spec.qmax))
        rounded = scale.to(SCALE_DTYPES[spec.scale_dtype]).to(torch.float32)
        zero = torch.round(-low * best.p * shrink / (rounded * best.p))
        zero = zero.nan_to_num(nan=0.0).clamp(0, spec.qmax)
        _try(best, scale, zero, spec, weigh)


def _try(
    best: _Best, scale: Tensor, zero: Tensor | None, spec: QuantSpec, weigh: Tensor | None
) -> None:
    """Round the scale, compute codes and error, and keep them where the error falls."""
    scale = scale.to(SCALE_DTYPES[spec.scale_dtype]).to(torch.float32)
    usable = scale.abs() >= _SMALLEST_SCALE  # false for NaN
    usable &= scale.isfinite()
    if zero is not None:
        usable &= scale > 0
    normal = torch.where(usable, scale * best.p, 1.0)
    codes = torch.round(best.tile * (1 / normal))
    if zero is None:
        codes = codes.clamp(spec.qmin, spec.qmax)
    else:
        codes = torch.minimum(torch.maximum(codes, -zero), spec.qmax - zero)
    error = (best.tile - codes * normal).square()
    error = _lane_sum(error if weigh is None else error * weigh)
    better = usable & (error < best.error)
    best.error = torch.where(better, error, best.error)
    best.scale = torch.where(better, scale, best.scale)
    best.codes = torch.where(better, codes, best.codes)
    if zero is not None and best.zero is not None:
        best.zero = torch.where(better, zero, best.zero)


def _lane_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension in the order the module docstring defines; keeps it as 1."""
    chunks = values.unflatten(2, (-1, LANES))
    total = chunks[:, :, 0]
    for index in range(1, chunks.shape[2]):
        total = total + chunks[:, :, index]
    while total.shape[2] > 1:
        half = total.shape[2] // 2
        total = total[:, :, :half] + total[:, :, half:]
    return total


def inverse_power(magnitude: Tensor) -> Tensor:
    """2^-e, e = floor(log2 magnitude) limited to -126..126 so that 2^e and 2^-e are normal."""
    exponent = (magnitude.contiguous().view(torch.int32) >> 23) - 127
    return ((127 - exponent.clamp(-126, 126)) << 23).view(torch.float32)


def _grouped(weight: Tensor, spec: QuantSpec) -> Tensor:
    """``[rows, in]`` → ``[rows, groups, G]``, G a multiple of LANES, padded with zeros."""
    rows, columns = weight.shape
    groups, length = spec.groups(columns), spec.group_length(columns)
    if groups * length != columns:
        weight = torch.nn.functional.pad(weight, (0, groups * length - columns))
    tile = weight.reshape(rows, groups, length)
    return torch.nn.functional.pad(tile, (0, -length % LANES)) if length % LANES else tile


def _check_finite(tile: Tensor, first_row: int, spec: QuantSpec) -> None:
    finite = torch.isfinite(tile)
    if bool(finite.all()):
        return
    row, group, element = (int(i) for i in (~finite).nonzero()[0])
    raise non_finite(first_row + row, group * max(spec.group_size, 0) + element)


def _check_representable(best: _Best, first_row: int, spec: QuantSpec) -> None:
    # A nonzero group without a scale is either far below 1 and becomes 0, or far above.
    lost = ((best.scale == 0) & (best.absmax > 1)).nonzero()
    if len(lost):
        raise not_representable(first_row + int(lost[0, 0]), int(lost[0, 1]), spec)


def non_finite(row: int, column: int) -> ValueError:
    """The error for a NaN or an infinity."""
    return ValueError(f"non-finite weight at row {row}, column {column}")


def not_representable(row: int, group: int, spec: QuantSpec) -> ValueError:
    """The error for a group whose every scale overflows."""
    return ValueError(
        f"no {spec.scale_dtype} scale is large enough for row {row}, group {group}; "
        f"use scale_dtype bfloat16 or float32"
    )
