"""auto-round packing (GPTQ v1 order): loads in stock transformers with the auto-round package.

For a matrix ``[out, in]`` with b bits and g groups per row:

* ``.qweight`` int32 [in·b/32, out]: u = code + 2^(b-1), packed along the inputs, low bits first;
* ``.qzeros`` int32 [g, out·b/32]: the zero point minus one in every field (7 for int4);
* ``.scales`` fp16 [g, out].

The codes and scales are those of the compressed-tensors artifact, only their order differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_convert.checkpoint import Checkpoint, TensorInfo
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.export import safetensors, split
from zaya_convert.export.arrays import Region
from zaya_convert.files import json_bytes, read_json
from zaya_convert.headers import RawTensor
from zaya_convert.layout import TensorKey
from zaya_quant.spec import QuantSpec, Spec

if TYPE_CHECKING:
    import torch

    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import Quantized, QuantTensor

NAME = "auto-round"
_SUFFIXES = (".qweight", ".scales", ".qzeros")
_BITS = (2, 4, 8)


model_problems = split.model_problems
notes = split.notes
by_rows = False
unit = split.unit
container = safetensors.container


def problems(info: TensorInfo, spec: Spec) -> list[str]:
    """Reasons why ``info`` cannot be stored with ``spec``."""
    found = split.storage_problems(info, spec)
    if not isinstance(spec, QuantSpec):
        return found
    if spec.bits not in _BITS:
        found.append(f"{spec.bits} bits do not fit; this packing holds {_BITS}")
    elif any(size * spec.bits % 32 for size in info.shape):
        found.append(f"shape {list(info.shape)} does not fill 32-bit words at {spec.bits} bits")
    if spec.scale_dtype != "float16":
        found.append(f"scales are {spec.scale_dtype}; this packing holds float16 only")
    return found


def regions(
    info: TensorInfo, spec: Spec | None, config: ModelConfig, dtype: str = ""
) -> dict[str, Region]:
    """The three arrays of a quantized matrix, or the one of a float tensor."""
    if spec is None:
        return split.float_regions(info, config, dtype)
    assert isinstance(spec, QuantSpec)
    rows, columns = info.shape
    groups = spec.groups(columns)
    shapes = {
        ".qweight": ("I32", (columns * spec.bits // 32, rows)),
        ".scales": ("F16", (groups, rows)),
        ".qzeros": ("I32", (groups, rows * spec.bits // 32)),
    }
    module = info.key.module
    return {s: split.whole(module + s, dtype, shape) for s, (dtype, shape) in shapes.items()}


def encode(info: TensorInfo, value: torch.Tensor | Quantized) -> dict[str, torch.Tensor]:
    """The arrays of one tensor."""
    import torch

    from zaya_quant.pack import gptq_zeros, pack_gptq
    from zaya_quant.qtensor import BlockTensor

    if isinstance(value, torch.Tensor):
        return {"": value}
    assert not isinstance(value, BlockTensor)
    rows, _ = value.shape
    return {
        ".qweight": pack_gptq(value.codes, value.spec.bits),
        ".scales": value.scales.t().contiguous(),
        ".qzeros": gptq_zeros(value.scales.shape[1], rows, value.spec.bits),
    }


def files(plan: Plan) -> dict[str, bytes]:
    """``config.json`` with auto-round's ``quantization_config``."""
    specs = [step.spec for step in plan.steps if isinstance(step.spec, QuantSpec)]
    common = max(set(specs), key=specs.count) if specs else QuantSpec(4, 32)
    extra: dict[str, Any] = {
        name: {"bits": 16, "data_type": "fp"} for name in split.linear_modules(plan.source.config)
    }
    for step in plan.steps:
        if step.spec is None and split.is_quantizable(step.key) and step.key.layer >= 0:
            extra[step.key.module] = {"bits": 16, "data_type": "fp"}
        elif step.spec is not None and step.spec != common:
            extra[step.key.module] = {
                "bits": step.spec.bits, "group_size": step.spec.group_size, "sym": True,
                "data_type": "int",
            }  # fmt: skip
    quantization = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": common.bits,
        "group_size": common.group_size,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": extra,
    }
    config = plan.source.config.to_transformers() | {"quantization_config": quantization}
    return {"config.json": json_bytes(config)}


def recognises(config: Mapping[str, Any]) -> bool:
    """A folder whose quantization config says auto-round with GPTQ packing."""
    value = config.get("quantization_config")
    return isinstance(value, dict) and value.get("quant_method") == "auto-round"


def open_artifact(folder: Path) -> Checkpoint:
    """Open such a folder, ours or auto-round's own."""
    quantization = read_json(folder / "config.json")["quantization_config"]
    packing, sym = quantization.get("packing_format"), quantization.get("sym")
    if packing != "auto_round:auto_gptq" or not sym:
        raise InputError(
            f"packing_format {packing!r}, sym {sym!r}: only symmetric 'auto_round:auto_gptq' "
            "is supported",
            "config.json",
        )

    def spec_of(
        key: TensorKey, shape: tuple[int, ...], arrays: Mapping[str, RawTensor]
    ) -> QuantSpec | None:
        qweight, scales, _ = (arrays[s] for s in _SUFFIXES)
        rows, columns = shape
        words = qweight.shape[0] if qweight.shape else 0
        bits = next((b for b in _BITS if words * 32 == columns * b), 0)
        groups = scales.shape[0] if scales.shape else 0
        if not bits or not groups or columns % groups or scales.dtype != "F16":
            return None
        # A whole-row group is "per channel" however it was declared.
        size = -1 if groups == 1 and columns % 16 else columns // groups
        if quantization.get("group_size") == -1 and groups == 1:
            size = -1
        if size % 16 and size != -1:
            return None
        spec = QuantSpec(bits, size)
        expected = [qweight.shape == (words, rows), scales.shape == (groups, rows)]
        return spec if all(expected) else None

    return split.open_split(folder, NAME, _SUFFIXES, spec_of, _decode)


def _decode(info: TensorInfo, pieces: dict[str, torch.Tensor]) -> QuantTensor:
    import torch

    from zaya_quant.pack import gptq_zeros, unpack_gptq
    from zaya_quant.qtensor import QuantTensor

    assert isinstance(info.spec, QuantSpec)
    scales = pieces[".scales"]
    expected = gptq_zeros(scales.shape[0], info.shape[0], info.spec.bits)
    if not torch.equal(pieces[".qzeros"], expected):
        raise ValueError(".qzeros are not those of a symmetric weight")
    codes = unpack_gptq(pieces[".qweight"], info.spec.bits)
    return QuantTensor(codes, scales.t().contiguous(), None, info.spec)
