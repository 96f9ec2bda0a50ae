"""Output packings. A packing is one module and one line in ``PACKINGS``.

Such a module has these functions, which ``Packing`` states as types:

* ``problems(info, spec)``: reasons why it cannot hold a tensor quantized like that;
* ``regions(info, spec, config)``: the output arrays of a tensor and which bytes of them it fills;
* ``encode(value)``: a float tensor or ``QuantTensor`` as the components named in ``regions``;
* ``config(plan)``: the ``config.json`` that its readers expect;
* ``recognises(config)``: whether a raw ``config.json`` belongs to it;
* ``open_artifact(folder)``: read what was written, as a ``Checkpoint``.
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
    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import QuantTensor
    from zaya_quant.spec import QuantSpec

PACKINGS = {
    "compressed-tensors": "zaya_convert.export.compressed_tensors",
    "auto-round": "zaya_convert.export.auto_round",
    "dense": "zaya_convert.export.dense",
}


class Packing(Protocol):
    """What a packing module offers."""

    def problems(self, info: TensorInfo, spec: QuantSpec) -> list[str]:
        """Reasons why ``info`` cannot be stored with ``spec``."""
        ...

    def regions(
        self, info: TensorInfo, spec: QuantSpec | None, config: ModelConfig
    ) -> dict[str, Region]:
        """Where each component of the tensor goes."""
        ...

    def encode(self, value: torch.Tensor | QuantTensor) -> dict[str, torch.Tensor]:
        """The components, as tensors whose bytes are stored."""
        ...

    def config(self, plan: Plan) -> dict[str, Any]:
        """The output's ``config.json``."""
        ...

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a folder with this raw ``config.json`` was written in this packing."""
        ...

    def open_artifact(self, folder: Path) -> Checkpoint:
        """Open a folder in this packing."""
        ...


def packing(name: str) -> Packing:
    """The packing module called ``name``."""
    return cast("Packing", importlib.import_module(PACKINGS[name]))
