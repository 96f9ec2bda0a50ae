"""The files of an ONNX folder: data laid out before a weight is read, graphs at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zaya_convert.config import ModelConfig
from zaya_convert.export.arrays import Array, piece_of
from zaya_convert.export.container import Outcome, PlannedFile, PlannedFiles, offsets, split
from zaya_convert.export.onnx import configs, graph, metadata, places
from zaya_convert.export.onnx.builder import Located

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

ALIGNMENT = 4096  # of arrays: onnxruntime maps pages of the file into memory


class OnnxFiles:
    """The files of one output."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """Lay the arrays out and create the data files at their full size."""
        self._plan = plan
        self._rotary = places.rotary_arrays(plan.source.config)
        parts = split(plan.arrays, plan.shard_bytes)
        # with the first, so that the number of files depends on the plan alone
        parts[0] = [*(array for pair in self._rotary.values() for array in pair), *parts[0]]
        names = configs.data_names(len(parts))
        planned = [_planned(name, arrays) for name, arrays in zip(names, parts, strict=True)]
        self._places = {
            array.name: Located(name, offset)
            for name, file in zip(names, planned, strict=True)
            for array, offset in zip(file.arrays, file.offsets, strict=True)
        }
        self.files = PlannedFiles(folder, planned)

    def finish(self, outcome: Outcome) -> dict[str, bytes]:
        """Write what no step does; returns the graphs."""
        config = self._plan.source.config
        for base, arrays in self._rotary.items():
            for array, values in zip(arrays, rotations(config, base), strict=True):
                self.files.write(piece_of(array), values.numpy().data.cast("B"))
        specs = metadata.specs_of(self._plan, outcome)
        entries = metadata.entries(self._plan, outcome, specs)
        return {
            f"{configs.FOLDER}/{name}": graph.build(
                config, specs, self._places.__getitem__, graph.Options(flavour), entries
            ).SerializeToString(deterministic=True)
            for flavour, name in configs.NAMES.items()
        }


def rotations(config: ModelConfig, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position [positions, rotary_dim/2], as the runtime has them."""
    dim = config.rotary_dim
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.arange(config.max_positions).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _planned(name: str, arrays: Sequence[Array]) -> PlannedFile:
    return PlannedFile(f"{configs.FOLDER}/{name}", 0, arrays, offsets(arrays, ALIGNMENT))
