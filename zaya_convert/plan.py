"""``Plan``: what will be written, exactly, before a weight is read.

A checkpoint, a recipe and a packing make a plan: one ``Step`` per logical tensor, and the arrays of
the output with their exact sizes. Everything that can fail cheaply fails here, all reasons
together. Because sizes are exact the plan is the header of every format, steps can run in any
order on any number of threads, and the bytes that come out are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zaya_convert import __version__
from zaya_convert.checkpoint import Checkpoint, TensorInfo
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export import Packing, packing
from zaya_convert.export.arrays import Array, Region
from zaya_convert.headers import parse_json_object
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.recipe import Recipe, Rule, unmatched
from zaya_quant.methods import METHODS
from zaya_quant.spec import Spec, fitting

if TYPE_CHECKING:
    from zaya_convert.stats import Stats


@dataclass(frozen=True, slots=True)
class Step:
    """The work on one logical tensor.

    Attributes:
        spec: how the result is quantized; None for floats.
        method: name in ``zaya_quant.methods.METHODS``; "" when the codes are taken over as they
            are, or nothing is quantized.
        regions: where each component that the packing's ``encode`` returns goes.
        copy: the bytes are taken over unchanged.
    """

    key: TensorKey
    spec: Spec | None
    method: str
    regions: Mapping[str, Region]
    copy: bool


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to be carried out by ``convert.execute``.

    ``origin`` is the public name of the source model (a Hub id), for provenance; never a path.
    ``stats`` are there once the model is calibrated; methods that need them wait for that.
    """

    source: Checkpoint
    recipe: Recipe | None
    packing: str
    steps: tuple[Step, ...]
    arrays: tuple[Array, ...]
    shard_bytes: int | None = None  # largest weight file; None leaves it to the format
    origin: str = ""
    stats: Stats | None = None
    allocation: Mapping[str, Any] | None = None  # how bits were chosen, for the manifest
    max_memory: int | None = None  # bytes that activations may take; never changes the output

    @property
    def needs_stats(self) -> bool:
        """Whether some method wants calibration."""
        return any(step.method and METHODS[step.method].needs for step in self.steps)

    @property
    def how(self) -> Mapping[str, Any] | None:
        """The recipe that rounded these weights, here or before; None when nothing did."""
        if self.recipe is not None and self.recipe.quantizes:
            return self.recipe.to_dict()
        return self.source.manifest.get("recipe")

    @property
    def main_type(self) -> str:
        """The dtype or block type that most bytes of the output have."""
        sizes: dict[str, int] = {}
        for array in self.arrays:
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.bytes
        return max(sizes, key=lambda name: sizes[name])

    @property
    def source_digest(self) -> str | None:
        """Digest of the float model behind the source; "" unknown, None when it is the source."""
        inherited = self.source.made_from.get("digest")
        quantized = any(info.spec for info in self.source.infos.values())
        return inherited or ("" if quantized else None)

    @property
    def bytes(self) -> int:
        """Size of all output arrays."""
        return sum(array.bytes for array in self.arrays)

    @property
    def weights(self) -> int:
        """Logical weights in the model."""
        return self.source.weights

    @property
    def bits_per_weight(self) -> float:
        """Over all weights of the model, scales and everything else counted."""
        return 8 * self.bytes / self.weights

    def fingerprint(self) -> str:
        """Digest of everything that determines the output, for ``--resume``."""
        facts = {
            "version": __version__,
            "packing": self.packing,
            "recipe": self.recipe.to_dict() if self.recipe else None,
            "source": self.source.stamp(),
            "arrays": [[a.name, a.dtype, a.shape] for a in self.arrays],
            "shard_bytes": self.shard_bytes,
            "origin": self.origin,
            "stats": self.stats.digest if self.stats else None,
            "equalized": bool(self.source.scaling),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Exact sizes by kind of tensor, for ``--dry-run``."""
        groups: dict[str, dict[str, int]] = {}
        for step in self.steps:
            name = "float" if step.spec is None else step.spec.label
            row = groups.setdefault(name, {"tensors": 0, "weights": 0, "bytes": 0})
            row["tensors"] += 1
            row["weights"] += self.source.infos[step.key].numel
            row["bytes"] += sum(region.bytes for region in step.regions.values())
        return groups


def make_plan(
    source: Checkpoint,
    recipe: Recipe | None,
    packing_name: str,
    shard_bytes: int | None = None,
    origin: str = "",
) -> Plan:
    """Plan a conversion.

    Args:
        recipe: how to quantize a float source; None exports what the source holds.

    Raises:
        UsageError: a recipe for a source that is quantized already.
        InputError: everything the packing cannot hold, and every unknown method; side files that
            are damaged, which would be copied along.
    """
    quantized = any(info.spec for info in source.infos.values())
    rounds = recipe is not None and recipe.quantizes
    if rounds and (quantized or source.manifest.get("recipe")):
        raise UsageError(
            f"{source.path.name} is quantized already, and rounding twice costs quality; "
            "use `export` to change its format, or quantize the original"
        )
    _check_side_files(source)
    target = packing(packing_name)
    problems = unmatched(recipe, source.infos) if recipe else []
    problems += target.model_problems(source.config)
    if problems:
        raise InputError(problems, f"{packing_name} cannot hold this plan")
    steps = [_step(source, info, recipe, target, problems) for info in source.infos.values()]
    problems = problems or _disagreements(steps, target)
    if problems:
        raise InputError(problems, f"{packing_name} cannot hold this plan")
    arrays = _arrays(steps, packing_name)
    return Plan(source, recipe, packing_name, tuple(steps), arrays, shard_bytes, origin)


def _check_side_files(source: Checkpoint) -> None:
    problems: list[str] = []
    for name, content in source.side_files().items():
        if name.endswith(".json"):
            try:
                parse_json_object(content, name)
            except InputError as error:
                problems.append(str(error))
    if problems:
        raise InputError(problems, source.path.name)


def _arrays(steps: list[Step], packing_name: str) -> tuple[Array, ...]:
    """The output's arrays; steps that share one must agree on it."""
    found: dict[str, Array] = {}
    problems: dict[str, None] = {}
    for step in steps:
        for region in step.regions.values():
            other = found.setdefault(region.array.name, region.array)
            if other != region.array:
                line = (
                    f"{other.name} holds several matrices, which the recipe wants as "
                    f"{other.dtype} and as {region.array.dtype}; give all its experts one type"
                )
                problems[line] = None
    if problems:
        raise InputError(list(problems), f"{packing_name} cannot hold this plan")
    return tuple(found.values())


def _disagreements(steps: list[Step], target: Packing) -> list[str]:
    """Units (see ``Packing.unit``) whose tensors have several forms."""
    forms: dict[str, dict[str, None]] = {}
    for step in steps:
        name, form = target.unit(step.key, step.spec)
        forms.setdefault(name, {})[form] = None
    return [
        f"{name} is computed as one, and cannot hold {' and '.join(found)}; give all its matrices "
        "one type"
        for name, found in forms.items()
        if len(found) > 1
    ]


def _method(rule: Rule, key: TensorKey) -> str:
    """A rule's method; embeddings are not calibrated, and fall back on searched rounding."""
    known = METHODS.get(rule.method)
    embedding = PART_BY_NAME[key.part].role == "embedding"
    return "rtn" if embedding and known and known.needs else rule.method


def _step(
    source: Checkpoint,
    info: TensorInfo,
    recipe: Recipe | None,
    target: Packing,
    problems: list[str],
) -> Step:
    rule = recipe.rule_for(info.key) if recipe else None
    spec = rule.spec if rule else info.spec
    method = _method(rule, info.key) if rule else ""
    dtype = recipe.float_type(info.key) if recipe else ""
    if spec is not None and (dtype or rule):
        spec = None if dtype else fitting(spec, info.shape[1])
    if spec is not None and PART_BY_NAME[info.key.part].role == "float":
        # Another tool quantized the router; what it left of the values is kept as floats.
        spec, dtype, info = None, "F32", replace(info, dtype="F32")
    if rule and method not in METHODS:
        problems.append(f"{info.key}: no method {method!r}; there are {', '.join(METHODS)}")
    if spec is not None:
        found = target.problems(info, spec)
        if found:
            problems.extend(f"{info.key}: {problem}" for problem in found)
            return Step(info.key, spec, method, {}, copy=False)
    regions = target.regions(info, spec, source.config, dtype)
    plain = spec is None and info.plain and [*regions] == [""]
    copy = plain and regions[""].array.dtype == info.dtype and info.key not in source.scaling
    return Step(info.key, spec, method, regions, copy)
