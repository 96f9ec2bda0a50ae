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
from zaya_convert.export.arrays import Array, Region
from zaya_convert.headers import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import QuantTensor
    from zaya_quant.spec import QuantSpec


def problems(info: TensorInfo, spec: QuantSpec) -> list[str]:
    """Nothing: every quantized tensor can be dequantized."""
    return []


def regions(info: TensorInfo, spec: QuantSpec | None, config: ModelConfig) -> dict[str, Region]:
    """One component: the matrix, or its slice of the fused tensor."""
    place = layout.stored("hybrid", info.key, config.dims, config.layers)
    is_float = layout.PART_BY_NAME[info.key.part].role == "float"
    array = Array(place.name, info.dtype if is_float else "BF16", place.shape)
    size = info.numel * DTYPE_BYTES[array.dtype]
    offset = 0
    if place.expert is not None:
        offset = place.expert * (array.bytes // place.shape[0])
    if place.rows:
        offset += place.rows[0] * place.shape[-1] * DTYPE_BYTES[array.dtype]
    return {"": Region(array, offset, size)}


def encode(value: torch.Tensor | QuantTensor) -> dict[str, torch.Tensor]:
    """The values in bf16."""
    import torch

    if isinstance(value, torch.Tensor):
        return {"": value.to(torch.bfloat16)}
    return {"": value.dequantize(torch.bfloat16)}


def config(plan: Plan) -> dict[str, Any]:
    """A plain transformers configuration."""
    return plan.source.config.to_transformers()


def recognises(config: Mapping[str, Any]) -> bool:
    """Any configuration without quantization."""
    return config.get("quantization_config") is None


def open_artifact(folder: Path) -> Checkpoint:
    """A dense twin is a float checkpoint like any other, with a manifest if we wrote it."""
    return replace(open_source(folder), manifest=manifest.read(folder))
