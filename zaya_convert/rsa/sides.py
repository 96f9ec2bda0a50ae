"""The two sides of a parity test: what a model is, what runs it, and how that computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.rsa.generator import Generator
from zaya_convert.runtime.model import Model


@dataclass(frozen=True)
class Arithmetic:
    """How an engine computes, for the reference runtime to be like it.

    Attributes:
        dtype: "float32" or "bfloat16".
        exact: sums in float64 (float32 only): results then do not depend on batches.
        fast: quantized matrices as they are, activations rounded to 8 bits.
    """

    dtype: str = "float32"
    exact: bool = True
    fast: bool = False

    def model(self, checkpoint: Checkpoint, resident: bool = True) -> Model:
        """Our runtime in this arithmetic."""
        dtype = getattr(torch, self.dtype)
        return Model(checkpoint, dtype, resident, self.exact, self.fast and resident)

    def noisy(self) -> Arithmetic:
        """The same without sums in float64: what rounding alone may change."""
        return replace(self, exact=False)

    def __str__(self) -> str:
        extra = ", exact" * (self.exact and self.dtype == "float32")
        return self.dtype + extra + ", activations of 8 bits" * self.fast


@dataclass(frozen=True)
class Side:
    """A model in the test.

    Attributes:
        name: for people.
        open: makes what runs it; called once, and let go of before the other side is opened.
        checkpoint: its weights, None when only a server knows them.
        arithmetic: of the engine; only looked at where there are weights.
        identity: what says which model it is, for files of runs.
    """

    name: str
    open: Callable[[], Generator]
    checkpoint: Checkpoint | None
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    identity: dict[str, Any] = field(default_factory=dict)
