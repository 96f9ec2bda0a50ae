"""What a caller is about to compute: the question that every row of the table answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from zaya_quant.spec import Spec

# How weights may lie: as the native kernels read them, as the Triton kernels do, as floats.
TILES, WORDS, FLOATS = "tiles", "words", "floats"


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller is about to compute.

    Attributes:
        dtype: of the activations.
        device: torch device type, "cpu" or "cuda".
        spec: how the weights are quantized, None for float weights.
        observed: whether the caller watches intermediate values (calibration).
        exact: whether a row's result may not depend on the rows beside it (float64 weights).
        fast: whether activations may be rounded to int8 for products with quantized weights.
        layout: how the weights lie, "" as logical values. With ``TILES`` and no ``spec`` they are
            of several grids, and floats among them.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    spec: Spec | None = None
    observed: bool = False
    exact: bool = False
    fast: bool = False
    layout: str = ""
