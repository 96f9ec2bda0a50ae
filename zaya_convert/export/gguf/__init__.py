"""GGUF for llama.cpp: block types, fused experts, everything else in the float set as it needs.

``names`` holds the dialects, ``metadata`` and ``tokenizer`` the header's keys, ``read`` the way
back. What a file holds of one logical tensor is one run of bytes, but for a convolution that a
dialect stores tap by tap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from zaya_convert.checkpoint import Checkpoint, TensorInfo
from zaya_convert.config import ModelConfig
from zaya_convert.export.arrays import Array, Region, piece_of
from zaya_convert.export.gguf.names import DIALECTS, Dialect
from zaya_convert.layout import TensorKey
from zaya_quant.spec import BLOCK_TYPES, Spec, holding_type

if TYPE_CHECKING:
    import torch

    from zaya_convert.export.container import Container
    from zaya_convert.plan import Plan
    from zaya_quant.qtensor import Quantized

_LEAST_BLOCK = BLOCK_TYPES["Q4_0"][0]  # weights


@dataclass(frozen=True)
class Gguf:
    """The packing of one dialect; see ``zaya_convert.export.Packing``."""

    dialect: Dialect
    by_rows: ClassVar[bool] = True

    def model_problems(self, config: ModelConfig) -> list[str]:
        """What the dialect has no form for."""
        return self.dialect.problems(config)

    def problems(self, info: TensorInfo, spec: Spec) -> list[str]:
        """No block type holds this grid exactly."""
        columns = info.shape[1]
        if holding_type(spec, columns):
            return []
        if columns % _LEAST_BLOCK:
            return [
                f"its rows of {columns} weights are no whole number of {_LEAST_BLOCK}, the least "
                "that GGUF has in a block; keep it float"
            ]
        return [
            f"no block type of GGUF holds {spec.label} with {columns} inputs exactly; blocks "
            f"are symmetric with fp16 scales for {_LEAST_BLOCK} weights, or of a type like Q4_K"
        ]

    def unit(self, key: TensorKey, spec: Spec | None) -> tuple[str, str]:
        """None: what is computed as one is one array."""
        return "", ""

    def regions(
        self, info: TensorInfo, spec: Spec | None, config: ModelConfig, dtype: str = ""
    ) -> dict[str, Region]:
        """One run of bytes, or one for each tap."""
        place = self.dialect.place(info.key, config)
        if spec is None:
            kind = self.dialect.type_of(info.key, info.dtype, dtype)
        else:
            kind = holding_type(spec, info.shape[1])
        array = Array(place.name, kind, place.shape)
        if place.taps:
            return {f"tap{i}": piece_of(array, i) for i in range(place.shape[0])}
        return {"": piece_of(array, place.expert, place.rows)}

    def encode(self, info: TensorInfo, value: torch.Tensor | Quantized) -> dict[str, torch.Tensor]:
        """Blocks, or floats in the order they are stored."""
        import torch

        if not isinstance(value, torch.Tensor):
            from zaya_quant.blocks import pack

            return {"": pack(value)}
        if self.dialect.taps_first and len(info.shape) == 3 and info.shape[1] > 1:
            return {f"tap{i}": tap for i, tap in enumerate(value.unbind(2))}
        return {"": value}

    def container(self, plan: Plan, folder: Path) -> Container:
        """One file, or as many as ``shard_bytes`` asks for."""
        from zaya_convert.export.gguf.write import GgufFiles

        return GgufFiles(plan, self.dialect, folder)

    def files(self, plan: Plan) -> dict[str, bytes]:
        """None: a GGUF file describes itself."""
        return {}

    def notes(self, plan: Plan) -> list[str]:
        """What a person should know of the file."""
        from zaya_convert.export.gguf.tokenizer import entries

        _, reason = entries(plan.source.side_files(), plan.source.config)
        found = [f"the file has no tokenizer: {reason}; feed it token ids"] if reason else []
        if self.dialect.note:
            found.append(f"loaders of the dialect {self.dialect.name}: {self.dialect.note}")
        return found

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """No ``config.json`` belongs to a GGUF file."""
        return False

    def open_artifact(self, path: Path) -> Checkpoint:
        """Open a file, or a folder that holds one or the parts of one."""
        from zaya_convert.export.gguf.read import open_gguf

        return open_gguf(path)


PR23112, COMBINED40, YGGDRASIL = (
    Gguf(DIALECTS[name]) for name in ("pr23112", "combined40", "yggdrasil")
)
