"""The dequantized bf16 twin: the fused hybrid layout, which every ZAYA client loads.

Codes times scales, rounded to bf16. It is as large as the original; it exists so that clients
without a quantized loader can run, and measure, exactly what was quantized. Large matrices become
bf16; the float set (router, norms, scales, convolutions) keeps its stored dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_convert import layout, manifest
from zaya_convert.checkpoint import Checkpoint, TensorInfo, open_source
from zaya_convert.config import ModelConfig
from zaya_convert.export import safetensors, split
from zaya_convert.export.arrays import Array, Region, piece_of
from zaya_convert.files import json_bytes

if TYPE_CHECKING:
    import torch

    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import Quantized
    from zaya_quant.spec import Spec


model_problems = split.model_problems
notes = split.notes
by_rows = True
unit = split.unit
container = safetensors.container


def problems(info: TensorInfo, spec: Spec) -> list[str]:
    """Nothing: every quantized tensor can be dequantized."""
    return []


def regions(
    info: TensorInfo, spec: Spec | None, config: ModelConfig, dtype: str = ""
) -> dict[str, Region]:
    """One component: the matrix, or its slice of the fused tensor."""
    place = layout.stored("hybrid", info.key, config.dims, config.layers)
    is_float = layout.PART_BY_NAME[info.key.part].role == "float"
    array = Array(place.name, info.dtype if is_float else dtype or "BF16", place.shape)
    return {"": piece_of(array, place.expert, place.rows)}


def encode(info: TensorInfo, value: torch.Tensor | Quantized) -> dict[str, torch.Tensor]:
    """Floats as they are, codes in bf16."""
    import torch

    if isinstance(value, torch.Tensor):
        return {"": value}
    return {"": value.dequantize(torch.bfloat16)}


def files(plan: Plan) -> dict[str, bytes]:
    """A plain transformers configuration."""
    return {"config.json": json_bytes(plan.source.config.to_transformers())}


def recognises(config: Mapping[str, Any]) -> bool:
    """Any configuration without quantization."""
    return config.get("quantization_config") is None


def open_artifact(folder: Path) -> Checkpoint:
    """A dense twin is a float checkpoint like any other, with a manifest if we wrote it."""
    return replace(open_source(folder), manifest=manifest.read(folder))
