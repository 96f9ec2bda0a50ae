"""ONNX: graphs for onnxruntime, onnxruntime-genai and transformers.js, on shared external data.

A folder holds ``onnx/model.onnx`` (transformers.js, onnxruntime), ``onnx/model_genai.onnx``, both
small, and their weights in ``onnx/model.onnx_data``. ``places`` says what lies where, ``graph``
builds what computes with it, ``write`` and ``read`` are the ways there and back.

``places`` and this module import neither torch nor onnx; the others want the extra ``onnx``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_convert.checkpoint import Checkpoint, TensorInfo
from zaya_convert.config import ModelConfig
from zaya_convert.errors import UsageError
from zaya_convert.export.arrays import Region
from zaya_convert.export.onnx import configs, places
from zaya_quant.spec import Spec

if TYPE_CHECKING:
    import torch

    from zaya_convert.export.container import Container
    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import Quantized

unit = places.unit
recognises = configs.recognises
by_rows = True


def model_problems(config: ModelConfig) -> list[str]:
    """What readers' configuration files and operators have no form for, or is not installed."""
    found = []
    if importlib.util.find_spec("onnx") is None:
        found.append("it needs the package onnx: pip install 'zaya-convert[onnx]'")
    if config.conv_taps[1] != 2:
        found.append(
            f"cca_time1 is {config.conv_taps[1]}: transformers.js needs a config.json without it, "
            "which means 2"
        )
    if config.rotary_dim % 16:
        found.append(
            f"{config.rotary_dim} values of each head are rotated: GroupQueryAttention takes "
            "multiples of 16"
        )
    return found


def problems(info: TensorInfo, spec: Spec) -> list[str]:
    """Reasons why no operator takes ``info`` quantized like that."""
    return places.problems(info.key, info.shape, spec)


def regions(
    info: TensorInfo, spec: Spec | None, config: ModelConfig, dtype: str = ""
) -> dict[str, Region]:
    """The components of a tensor.

    Raises:
        UsageError: floats are wished for in a type other than F32.
    """
    if spec is None and dtype not in ("", "F32"):
        raise UsageError(f"ONNX graphs compute in F32 and hold floats so, not in {dtype}")
    return places.regions(info.key, spec, config)


def encode(info: TensorInfo, value: torch.Tensor | Quantized) -> dict[str, torch.Tensor]:
    """The arrays' bytes."""
    import torch

    from zaya_convert.export.onnx import codes
    from zaya_quant.qtensor import QuantTensor

    if isinstance(value, torch.Tensor):
        return {"": value}
    assert isinstance(value, QuantTensor)
    return codes.encode(value)


def container(plan: Plan, folder: Path) -> Container:
    """External data and the graphs on it."""
    from zaya_convert.export.onnx.write import OnnxFiles

    return OnnxFiles(plan, folder)


def files(plan: Plan) -> dict[str, bytes]:
    """What transformers.js and onnxruntime-genai ask a folder for."""
    return configs.files(plan)


def notes(plan: Plan) -> list[str]:
    """Nothing that the model card does not say."""
    return []


def open_artifact(path: Path) -> Checkpoint:
    """Open a folder that we wrote.

    Raises:
        UsageError: the package onnx is missing.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UsageError("reading ONNX needs the package onnx: pip install 'zaya-convert[onnx]'")
    from zaya_convert.export.onnx.read import open_onnx

    return open_onnx(path)
