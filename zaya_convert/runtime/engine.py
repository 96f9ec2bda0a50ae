"""``Engine``: what generation and validation need of anything that runs a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

from torch import Tensor

from zaya_convert.config import ModelConfig
from zaya_convert.runtime.model import Evaluation, Output


class States(Protocol):
    """What a batch of sequences carries from block to block, as ``cache.Cache`` does."""

    length: int

    def select(self, rows: Sequence[int] | Tensor, /) -> Self:
        """The states of the given rows of the batch, in the given order."""
        ...

    def join(self, other: Self, /) -> Self:
        """Both batches as one, the shorter padded on the left; both have seen a block."""
        ...


S = TypeVar("S", bound=States)


class Engine(Protocol[S]):
    """``model.Model`` is one, and documents the methods.

    Attributes:
        name: for people.
    """

    name: str
    config: ModelConfig

    def new_cache(self) -> S:
        """Empty states."""
        ...

    def forward(
        self,
        ids: Tensor,
        *,
        cache: S | None = None,
        mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Output:
        """Run a block of tokens [B, T], continuing from ``cache`` and advancing it."""
        ...

    def evaluate(
        self, sequences: Sequence[Tensor], progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Run whole sequences; ``logits`` finishes what it returns."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: hidden states [n, d] → fp32 logits [n, V]."""
        ...
