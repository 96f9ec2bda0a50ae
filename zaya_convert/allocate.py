"""Bits where they matter: choose every matrix's grid so that a size is met and KL is least.

Each matrix that a recipe quantizes may have any of the ``GRIDS`` that the packing can hold. What a
choice costs in KL is predicted from measured sensitivity (see ``sensitivity``): the matrix is
rounded on that grid and its error weighed by how much each output matters and how large each input
is. Choosing under a budget is a knapsack with many small items; taking the best ratio of KL saved
to bytes spent along each matrix's convex hull is within one item of its optimum (Dantzig bound).
So a single expert whose errors matter gets more bits alone, where the format allows: GGUF fuses the
experts of a layer into one tensor, whose matrices are chosen for together.
"""

from __future__ import annotations

import heapq
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from zaya_convert.checkpoint import Checkpoint, TensorInfo
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export import Packing, packing
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.recipe import Recipe, Rule
from zaya_convert.stats import Stats
from zaya_convert.threads import Threads, one_thread_each
from zaya_quant.methods import method
from zaya_quant.spec import BLOCK_GRIDS, BlockSpec, QuantSpec, Spec, fitting

GRIDS = (
    QuantSpec(3, 128), QuantSpec(3, 32), QuantSpec(4, 128), QuantSpec(4, 32), QuantSpec(5, 32),
    QuantSpec(6, 32), QuantSpec(8, 32), *(BlockSpec(name) for name in BLOCK_GRIDS),
)  # fmt: skip
_ROLES = ("expert", "attention")  # embeddings are not calibrated


@dataclass(frozen=True)
class Option:
    """One grid for one matrix or group: what it takes, and the KL it is predicted to cost."""

    spec: Spec
    bytes: int
    kl: float


@dataclass(frozen=True)
class Allocation:
    """What was chosen.

    Attributes:
        recipe: one rule for each choice that differs from the most common one of its role.
        bytes: of the whole artifact's weights.
        predicted_kl: of rounding to nearest on these grids, in nats; calibrated methods do better.
        chosen: how many matrices of each role got which grid.
    """

    recipe: Recipe
    bytes: int
    predicted_kl: float
    chosen: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """For manifests and reports."""
        return {
            "bytes": self.bytes,
            "predicted_kl_rounding": self.predicted_kl,
            "chosen": self.chosen,
        }


def allocate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    packing_name: str,
    stats: Stats,
    target: int,
    *,
    ceiling: bool = False,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Allocation:
    """Choose grids for all matrices that ``recipe`` quantizes.

    Args:
        recipe: says which matrices, and by which method; its own grids are not looked at.
        stats: with sensitivities.
        target: bytes of the artifact's weights.
        ceiling: a target above the largest possible size is no mistake.

    Raises:
        UsageError: a target below the smallest or above the largest possible size.
        InputError: statistics without sensitivities, or of another model.
    """
    stats.check_fits(checkpoint)
    if not stats.has_sensitivity:
        raise InputError("holds no sensitivities; calibrate with --sensitivity", "calibration")
    module, config = packing(packing_name), checkpoint.config
    groups, kept, fixed = _groups(checkpoint, recipe, module)
    _measure(checkpoint, stats, groups, threads or os.cpu_count() or 1, progress)
    found = [group.options(module, config) for group in groups]
    largest = fixed + sum(own[-1].bytes for own in found)
    picked = _fill(found, (min(target, largest) if ceiling else target) - fixed, fixed)
    chosen = [
        (info, group.rule, option)
        for group, option in zip(groups, picked, strict=True)
        for info in group.infos
    ]
    return Allocation(
        replace(
            recipe,
            name=f"{recipe.name}-allocated",
            rules=(*_rules(chosen, kept), *_others(recipe, checkpoint)),
        ),
        fixed + sum(option.bytes for option in picked),
        sum(option.kl for option in picked),
        _histogram(chosen),
    )


@dataclass
class _Group:
    """Matrices that share an array of the output or are computed as one, and so share a grid."""

    rule: Rule
    specs: Sequence[Spec]
    infos: list[TensorInfo] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)

    def add(self, costs: Sequence[float]) -> None:
        """Add what one matrix costs on each grid."""
        self.costs = [a + b for a, b in zip(self.costs or [0.0] * len(costs), costs, strict=True)]

    def options(self, module: Packing, config: ModelConfig) -> list[Option]:
        """Those worth having, the smallest first."""

        def size(spec: Spec) -> int:
            regions = (module.regions(info, spec, config) for info in self.infos)
            return sum(region.bytes for found in regions for region in found.values())

        costs = zip(self.specs, self.costs, strict=True)
        return _hull([Option(spec, size(spec), kl) for spec, kl in costs])


def _groups(
    checkpoint: Checkpoint, recipe: Recipe, module: Packing
) -> tuple[list[_Group], list[TensorKey], int]:
    """What there is to choose for, what the recipe leaves as floats, and the bytes of all else."""
    fixed = 0
    groups: dict[tuple[str, ...], _Group] = {}
    kept: list[TensorKey] = []
    for info in checkpoint.infos.values():
        rule = recipe.rule_for(info.key)
        if rule is None or _role(info.key) not in _ROLES:
            spec, dtype = rule.spec if rule else None, recipe.float_type(info.key)
            spec = fitting(spec, info.shape[1]) if spec else None
            regions = module.regions(info, spec, checkpoint.config, dtype)
            fixed += sum(region.bytes for region in regions.values())
            if rule is None:
                kept.append(info.key)
        else:
            specs = _fitting(module, info)
            arrays = module.regions(info, specs[0], checkpoint.config).values()
            unit, _ = module.unit(info.key, specs[0])
            shared = (unit,) if unit else tuple(region.array.name for region in arrays)
            groups.setdefault(shared, _Group(rule, specs)).infos.append(info)
    return list(groups.values()), kept, fixed


def _measure(
    checkpoint: Checkpoint,
    stats: Stats,
    groups: Sequence[_Group],
    threads: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Give every group what its matrices cost on each of its grids."""

    def measure(entry: tuple[_Group, TensorInfo]) -> list[float]:
        return _costs(checkpoint, stats, entry[1], entry[0].specs)

    matrices = [(group, info) for group in groups for info in group.infos]
    with one_thread_each(), Threads(threads) as pool:
        for done, ((group, _), costs) in enumerate(
            zip(matrices, pool.map(measure, matrices), strict=True), 1
        ):
            group.add(costs)
            progress("measuring grids", done, len(matrices))


def _fitting(module: Packing, info: TensorInfo) -> list[Spec]:
    """The grids that a packing can hold a matrix on."""
    specs = [spec for spec in GRIDS if not module.problems(info, spec)]
    if not specs:
        raise InputError(
            f"none of the grids to choose from fits its {info.shape[1]} inputs; quantize "
            "without --target-bpw and --target-size",
            str(info.key),
        )
    return specs


def _costs(
    checkpoint: Checkpoint, stats: Stats, info: TensorInfo, specs: Sequence[Spec]
) -> list[float]:
    """Predicted KL of one matrix on each grid, rounded to nearest under its second moments."""
    key = info.key
    weight = checkpoint.read_float(key, torch.float32)
    known = stats.of(key.layer, key.part, key.expert)
    if known is None:  # an expert that no token reached: nothing says that it matters
        return [0.0] * len(specs)
    outputs = stats.sensitivity(key)
    costs = []
    for spec in specs:
        error = weight - method("imatrix")(weight, spec, known).dequantize()
        costs.append(
            0.5 * float(outputs.double() @ (error.square() @ known.second_moment).double())
        )
    return costs


def _hull(options: list[Option]) -> list[Option]:
    """The options worth having: each step to the next buys less KL a byte than the one before."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.bytes, o.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and _gain(hull[-1], option) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(small: Option, large: Option) -> float:
    return (small.kl - large.kl) / (large.bytes - small.bytes)


def _fill(options: list[list[Option]], budget: int, fixed: int) -> list[Option]:
    """Spend a budget: always the upgrade that saves most KL a byte, as long as one fits."""
    level = [0] * len(options)
    spent = sum(own[0].bytes for own in options)
    largest = sum(own[-1].bytes for own in options)
    if spent > budget or budget > largest * 1.01 + fixed * 0.01:
        raise UsageError(
            f"the target is {budget + fixed:,} bytes; this recipe can reach {spent + fixed:,} to "
            f"{largest + fixed:,}"
        )
    heap = [(-_gain(own[0], own[1]), i) for i, own in enumerate(options) if len(own) > 1]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        own = options[i]
        step = own[level[i] + 1].bytes - own[level[i]].bytes
        if spent + step > budget:
            continue
        spent += step
        level[i] += 1
        if level[i] + 1 < len(own):
            heapq.heappush(heap, (-_gain(own[level[i]], own[level[i] + 1]), i))
    return [own[at] for own, at in zip(options, level, strict=True)]


_Chosen = tuple[TensorInfo, Rule, Option]


def _rules(chosen: Sequence[_Chosen], kept: Sequence[TensorKey]) -> tuple[Rule, ...]:
    """Exceptions first, by name; then one rule a role with its most common choice."""
    common: dict[str, Rule] = {}
    for role in _ROLES:
        rules = [
            _rule(rule, option, "") for info, rule, option in chosen if _role(info.key) == role
        ]
        if rules:
            common[role] = Counter(rules).most_common(1)[0][0]
    exceptions = [
        _rule(rule, option, info.key.module)
        for info, rule, option in chosen
        if _rule(rule, option, "") != common[_role(info.key)]
    ]
    # A role's rule must not reach what the recipe leaves as floats.
    exceptions += [Rule(key.module, keep=True) for key in kept if _role(key) in common]
    names = {"expert": "experts", "attention": "attention"}
    return (*exceptions, *(replace(rule, match=names[role]) for role, rule in common.items()))


def _others(recipe: Recipe, checkpoint: Checkpoint) -> list[Rule]:
    """The recipe's own rules for what has no choice of grid: embedding and untied head."""
    keys = [key for key in checkpoint.infos if _role(key) not in (*_ROLES, "float")]
    return [rule for rule in recipe.rules if any(rule.matches(key) for key in keys)]


def _rule(rule: Rule, option: Option, match: str) -> Rule:
    spec = option.spec
    if isinstance(spec, BlockSpec):
        return Rule(match, method=rule.method, type=spec.type)
    changes = {"bits": spec.bits, "group_size": spec.group_size, "type": ""}
    return replace(rule, match=match, **changes)


def _histogram(chosen: Sequence[_Chosen]) -> dict[str, dict[str, int]]:
    table: dict[str, Counter[str]] = {}
    for info, _, option in chosen:
        table.setdefault(info.key.part.removesuffix(".weight"), Counter())[option.spec.label] += 1
    return {part: dict(sorted(counts.items())) for part, counts in table.items()}


def _role(key: TensorKey) -> str:
    return PART_BY_NAME[key.part].role
