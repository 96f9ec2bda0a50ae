"""compressed-tensors ``pack-quantized``: one group of arrays per matrix, per-expert names.

For a matrix ``[out, in]`` with b bits and g groups per row:

* ``.weight_packed`` int32 [out, ceil(in·b/32)]: u = code + 2^(b-1), along the inputs, low bits
  first (``zaya_quant.pack``);
* ``.weight_scale`` [out, g], fp16 (bf16 for a matrix whose scales leave fp16's normal range);
* ``.weight_shape`` int64 [2] = [out, in].

value = code · scale. Plain ``from_pretrained`` of transformers fills the experts of such a folder
at random, with a mere warning, because its ZAYA model has no per-expert name mapping; load it with
``zaya_convert.oracle.load_artifact_in_transformers``, which registers one and fails on any missing
tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_convert.checkpoint import Checkpoint, TensorInfo
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.export import safetensors, split
from zaya_convert.export.arrays import Region
from zaya_convert.files import json_bytes, read_json
from zaya_convert.headers import RawTensor
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_quant.spec import QuantSpec, Spec

if TYPE_CHECKING:
    import torch

    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import Quantized, QuantTensor

NAME = "compressed-tensors"

# transformers 5.23 decodes all experts with one scheme and all else with another, and finds them by
# patterns like these; lists of module names, which other readers accept too, it decodes wrongly.
# They are used only where a role mixes schemes.
_TARGETS = {"expert": r"re:.*mlp\.experts\..*", "attention": r"re:.*self_attn\..*"}

_SUFFIXES = (".weight_packed", ".weight_scale", ".weight_shape")


model_problems = split.model_problems
notes = split.notes
by_rows = False
unit = split.unit
container = safetensors.container


def problems(info: TensorInfo, spec: Spec) -> list[str]:
    """Reasons why ``info`` cannot be stored with ``spec``."""
    return split.storage_problems(info, spec)


def regions(
    info: TensorInfo, spec: Spec | None, config: ModelConfig, dtype: str = ""
) -> dict[str, Region]:
    """The three arrays of a quantized matrix, or the one of a float tensor."""
    if spec is None:
        return split.float_regions(info, config, dtype)
    assert isinstance(spec, QuantSpec)
    rows, columns = info.shape
    module = info.key.module
    scale = split.SCALE_DTYPE[spec.scale_dtype]
    shapes = {
        ".weight_packed": ("I32", (rows, -(-columns * spec.bits // 32))),
        ".weight_scale": (scale, (rows, spec.groups(columns))),
        ".weight_shape": ("I64", (2,)),
    }
    return {s: split.whole(module + s, dtype, shape) for s, (dtype, shape) in shapes.items()}


def encode(info: TensorInfo, value: torch.Tensor | Quantized) -> dict[str, torch.Tensor]:
    """The arrays of one tensor."""
    import torch

    from zaya_quant.pack import pack_int32
    from zaya_quant.qtensor import BlockTensor

    if isinstance(value, torch.Tensor):
        return {"": value}
    assert not isinstance(value, BlockTensor)
    return {
        ".weight_packed": pack_int32(value.codes, value.spec.bits),
        ".weight_scale": value.scales,
        ".weight_shape": torch.tensor(value.shape, dtype=torch.int64),
    }


def files(plan: Plan) -> dict[str, bytes]:
    """``config.json`` with a ``quantization_config``: targets and explicit ignores."""
    modules: dict[str, dict[QuantSpec, list[str]]] = {role: {} for role in _TARGETS}
    ignore = split.linear_modules(plan.source.config)
    for step in plan.steps:
        role = PART_BY_NAME[step.key.part].role
        if isinstance(step.spec, QuantSpec):
            # the dtype of the scales stands in the file, not here
            scheme = replace(step.spec, scale_dtype="float16")
            modules[role].setdefault(scheme, []).append(step.key.module)
        elif role in modules:
            ignore.append(step.key.module)
    targets: dict[QuantSpec, list[str]] = {}
    for role, specs in modules.items():
        for spec, names in specs.items():
            targets.setdefault(spec, []).extend([_TARGETS[role]] if len(specs) == 1 else names)
    if len(targets) == 1:
        targets = {spec: ["Linear"] for spec in targets}
    groups = {f"group_{i}": _group(*item) for i, item in enumerate(targets.items())}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    config = plan.source.config.to_transformers() | {"quantization_config": quantization}
    return {"config.json": json_bytes(config)}


def recognises(config: Mapping[str, Any]) -> bool:
    """A folder whose quantization config says compressed-tensors."""
    return _quantization(config).get("quant_method") == "compressed-tensors"


def open_artifact(folder: Path) -> Checkpoint:
    """Open such a folder, ours or another tool's."""
    quantization = _quantization(read_json(folder / "config.json"))
    declared, found = [], []
    for name, group in (quantization.get("config_groups") or {}).items():
        spec = _declared(group)
        if isinstance(spec, str):
            found.append(f"config.json: {name}: {spec}")
        else:
            declared.append(spec)
    if found or not declared:
        raise InputError(found or "config.json: quantization_config has no config_groups")

    def spec_of(
        key: TensorKey, shape: tuple[int, ...], arrays: Mapping[str, RawTensor]
    ) -> QuantSpec | None:
        packed, scale, size = (arrays[s] for s in _SUFFIXES)
        if (packed.dtype, size.dtype, size.shape) != ("I32", "I64", (2,)):
            return None
        for bits, group in declared:
            if scale.dtype not in split.SCALE_NAME:
                continue
            spec = QuantSpec(bits, group, scale_dtype=split.SCALE_NAME[scale.dtype])
            rows, columns = shape
            if packed.shape == (rows, -(-columns * bits // 32)) and scale.shape == (
                rows, spec.groups(columns),
            ):  # fmt: skip
                return spec
        return None

    return split.open_split(folder, NAME, _SUFFIXES, spec_of, _decode)


def _decode(info: TensorInfo, pieces: dict[str, torch.Tensor]) -> QuantTensor:
    from zaya_quant.pack import unpack_int32
    from zaya_quant.qtensor import QuantTensor

    assert isinstance(info.spec, QuantSpec)
    shape = pieces[".weight_shape"].tolist()
    if shape != list(info.shape):
        raise ValueError(f".weight_shape holds {shape}, expected {list(info.shape)}")
    codes = unpack_int32(pieces[".weight_packed"], info.spec.bits, info.shape[1])
    return QuantTensor(codes, pieces[".weight_scale"], None, info.spec)


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    value = config.get("quantization_config")
    return value if isinstance(value, dict) else {}


def _group(spec: QuantSpec, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if spec.group_size < 0 else "group",
        "group_size": None if spec.group_size < 0 else spec.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "targets": targets,
        "format": "pack-quantized",
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def _declared(group: object) -> tuple[int, int] | str:
    """(bits, group size) of a config group, or why we do not read it."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        return "has no weights"
    if weights.get("type") != "int" or not weights.get("symmetric"):
        return "only symmetric integer weights are supported"
    if isinstance(group, dict) and group.get("format", "pack-quantized") != "pack-quantized":
        return f"format {group['format']!r} is not supported, only pack-quantized"
    bits, size = weights.get("num_bits"), weights.get("group_size")
    if weights.get("strategy") == "channel":
        size = -1
    if type(bits) is not int or type(size) is not int:
        return f"num_bits {bits!r} and group_size {size!r} are not integers"
    try:
        QuantSpec(bits, size)
    except ValueError as error:
        return str(error)
    return bits, size
