"""What the fixtures of small checkpoints are made of, for tests to name in their signatures.

Apart from ``conftest.py``, because other folders of tests have a module of that name too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

NANO_SKIP_BIAS = 0.0  # the skip expert competes like any other


class Nano(Protocol):
    """See the fixture ``nano``."""

    def __call__(
        self,
        layout: str = "hybrid",
        *,
        dtype: torch.dtype = torch.bfloat16,
        shards: int = 1,
        index: bool | None = None,
        seed: int = 0,
        skip_bias: float = NANO_SKIP_BIAS,
        lying: bool = False,
        **changes: Any,
    ) -> Path: ...


@dataclass
class Stored:
    """One tensor of a file under surgery."""

    dtype: str
    shape: list[int]
    data: bytes


Surgery = Callable[[Path, Callable[[dict[str, Stored]], object]], None]


def safetensors_bytes(tensors: dict[str, Stored]) -> bytes:
    """A well-formed safetensors file with these tensors."""
    header, position = {}, 0
    for name, tensor in tensors.items():
        end = position + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + b"".join(t.data for t in tensors.values())
