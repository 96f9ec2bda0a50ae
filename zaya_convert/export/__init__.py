"""Output packings. A packing is one module, or one object in it, and one line in ``PACKINGS``.

It has these, which ``Packing`` states as types:

* ``by_rows``: whether large matrices can be made a few rows at a time;
* ``model_problems(config)``: reasons why it cannot hold such a model at all;
* ``problems(info, spec)``: reasons why it cannot hold a tensor quantized like that;
* ``unit(key, spec)``: what a tensor is computed with as one, and the form they must share;
* ``regions(info, spec, config, dtype)``: the output arrays of a tensor and which bytes of them it
  fills;
* ``encode(info, value)``: a float or quantized tensor as the components named in ``regions``;
* ``container(plan, folder)``: the files that hold the arrays;
* ``files(plan)``: further files that its readers expect, such as ``config.json``;
* ``notes(plan)``: what a person should know of the output;
* ``recognises(config)``: whether a raw ``config.json`` belongs to it;
* ``open_artifact(path)``: read what was written, as a ``Checkpoint``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import torch

    from zaya_convert.checkpoint import Checkpoint, TensorInfo
    from zaya_convert.config import ModelConfig
    from zaya_convert.export.arrays import Region
    from zaya_convert.export.container import Container
    from zaya_convert.layout import TensorKey
    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import Quantized
    from zaya_quant.spec import Spec

PACKINGS = {
    "compressed-tensors": "zaya_convert.export.compressed_tensors",
    "auto-round": "zaya_convert.export.auto_round",
    "onnx": "zaya_convert.export.onnx",
    "dense": "zaya_convert.export.dense",
    "gguf": "zaya_convert.export.gguf:PR23112",
    "gguf-combined40": "zaya_convert.export.gguf:COMBINED40",
    "gguf-yggdrasil": "zaya_convert.export.gguf:YGGDRASIL",
}

# Dialects of GGUF, the usual one first, and the packing that writes each.
DIALECTS = {
    "pr23112": "gguf",
    "combined40": "gguf-combined40",
    "yggdrasil": "gguf-yggdrasil",
}

# File formats by name, with the packings that each has, the usual one first.
FORMATS = {
    "safetensors": ("compressed-tensors", "auto-round", "dense"),
    "gguf": tuple(DIALECTS.values()),
    "onnx": ("onnx",),
}


class Packing(Protocol):
    """What a packing offers.

    Attributes:
        by_rows: every component of a matrix is one array with the matrix's rows, so that a few of
            them can be made at a time.
    """

    by_rows: bool

    def model_problems(self, config: ModelConfig) -> list[str]:
        """Reasons why a model like this cannot be stored at all."""
        ...

    def problems(self, info: TensorInfo, spec: Spec) -> list[str]:
        """Reasons why ``info`` cannot be stored with ``spec``."""
        ...

    def unit(self, key: TensorKey, spec: Spec | None) -> tuple[str, str]:
        """Which tensors readers take as one although they share no array, and in what form.

        Returns:
            A name, and a form that all tensors of that name must have; ("", "") for most.
        """
        ...

    def regions(
        self, info: TensorInfo, spec: Spec | None, config: ModelConfig, dtype: str = ""
    ) -> dict[str, Region]:
        """Where each component of the tensor goes.

        Args:
            dtype: wished for a float tensor; "" leaves it to the packing.
        """
        ...

    def encode(self, info: TensorInfo, value: torch.Tensor | Quantized) -> dict[str, torch.Tensor]:
        """The components, as tensors whose bytes are stored; floats have their final dtype."""
        ...

    def container(self, plan: Plan, folder: Path) -> Container:
        """The weight files of an output."""
        ...

    def files(self, plan: Plan) -> dict[str, bytes]:
        """Further files of an output, by name."""
        ...

    def notes(self, plan: Plan) -> list[str]:
        """What a person should know of the output."""
        ...

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this raw ``config.json`` was written in this packing."""
        ...

    def open_artifact(self, path: Path) -> Checkpoint:
        """Open a folder (or file) in this packing."""
        ...


def packing(name: str) -> Packing:
    """The packing called ``name``."""
    module, _, attribute = PACKINGS[name].partition(":")
    found = importlib.import_module(module)
    return cast("Packing", getattr(found, attribute) if attribute else found)
