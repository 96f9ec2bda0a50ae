"""``Cache``: the three states of a batch of sequences, carried across chunks and decode steps.

Per layer: keys and values [B, nkv, S, D]; the last raw query-key columns that the causal
convolutions look back on [B, c, t0 + t1 - 2]; the last row of the delayed value projection
[B, nkv·D/2]. Dropping any of them at a chunk boundary changes every later token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zaya_convert.config import ModelConfig
from zaya_convert.runtime.inputs import join_valid, used_columns

_FIRST_CAPACITY = 64


class KeyValues:
    """Keys and values of one layer in one growing buffer [2, B, nkv, capacity, D].

    Columns ``start`` to ``end`` are in use. A sliding layer moves ``start`` along, so its buffer
    stays about two windows wide.
    """

    def __init__(self, window: int) -> None:
        self.window, self.start, self.end = window, 0, 0
        self.buffer: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add [B, nkv, T, D] columns; return all columns that the new queries may look at."""
        new = keys.shape[2]
        buffer = self.reserve(keys)
        buffer[0, :, :, self.end : self.end + new] = keys
        buffer[1, :, :, self.end : self.end + new] = values
        self.end += new
        used = buffer[:, :, :, self.start : self.end]
        return used[0], used[1]

    def reserve(self, like: Tensor) -> Tensor:
        """The buffer with room behind ``end`` for [B, nkv, T, D] columns.

        What they cannot look at any more lies before ``start``.
        """
        if self.window:
            self.start = max(self.start, self.end - (self.window - 1))
        new = like.shape[2]
        if self.buffer is None or self.end + new > self.buffer.shape[3]:
            self._move(like, 2 * (self.end - self.start + new))
        assert self.buffer is not None
        return self.buffer

    def select(self, rows: Tensor) -> KeyValues:
        """A copy that holds the given rows of the batch."""
        copy = KeyValues(self.window)
        copy.start, copy.end = self.start, self.end
        copy.buffer = None if self.buffer is None else self.buffer[:, rows]
        return copy

    def join(self, other: KeyValues, most: int) -> KeyValues:
        """Both batches' last columns, at most ``most``, side by side and aligned at the end."""
        parts = [(layer.buffer, layer.start, layer.end) for layer in (self, other)]
        joined = KeyValues(self.window)
        joined.end = min(most, max(end - start for _, start, end in parts))
        rows = [buffer.shape[1] for buffer, _, _ in parts if buffer is not None]
        like = parts[0][0]
        assert like is not None
        shape = (2, sum(rows), like.shape[2], max(2 * joined.end, _FIRST_CAPACITY), like.shape[4])
        joined.buffer = like.new_zeros(shape)  # padding is never seen, but has to be finite
        for target, (buffer, start, end) in zip(joined.buffer.split(rows, 1), parts, strict=True):
            assert buffer is not None
            count = min(joined.end, end - start)
            target[:, :, :, joined.end - count : joined.end] = buffer[:, :, :, end - count : end]
        return joined

    def _move(self, like: Tensor, capacity: int) -> None:
        """Copy what is in use into a larger buffer, dropping what a window has left behind."""
        batch, heads, _, dim = like.shape
        bigger = like.new_empty(2, batch, heads, max(capacity, _FIRST_CAPACITY), dim)
        if self.buffer is not None:
            bigger[:, :, :, : self.end - self.start] = self.buffer[:, :, :, self.start : self.end]
        self.buffer, self.start, self.end = bigger, 0, self.end - self.start


class Cache:
    """States of B sequences that have advanced together by ``length`` columns, padding included.

    Attributes:
        length: columns seen so far.
        valid: [B, length] booleans, False where a column is padding; None when none is.
        keys_values: one buffer a layer.
        conv: raw query-key columns of each layer [B, c, taps], None before the first chunk.
        delayed: delayed value row of each layer [B, v], None before the first chunk.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.length = 0
        self.valid: Tensor | None = None
        self.keys_values = [KeyValues(window) for window in config.windows]
        self.conv: list[Tensor | None] = [None] * config.layers
        self.delayed: list[Tensor | None] = [None] * config.layers

    def select(self, rows: Sequence[int] | Tensor) -> Cache:
        """A cache of the given rows in the given order; the two share nothing afterwards.

        Dropping finished sequences and forking one prompt into many are both selections.
        """
        index = torch.as_tensor(rows, dtype=torch.long)
        copy = object.__new__(Cache)
        copy.length = self.length
        copy.valid = None if self.valid is None else self.valid[index]
        copy.keys_values = [layer.select(index) for layer in self.keys_values]
        copy.conv = [None if state is None else state[index] for state in self.conv]
        copy.delayed = [None if state is None else state[index] for state in self.delayed]
        return copy

    def fork(self, copies: int) -> Cache:
        """Every sequence ``copies`` times, copies of one sequence next to each other."""
        known = next((state for state in self.conv if state is not None), None)
        size = 0 if known is None else known.shape[0]
        return self.select(torch.arange(size).repeat_interleave(copies))

    def join(self, other: Cache) -> Cache:
        """Both batches as one, the rows of ``other`` behind; both have seen at least one block.

        The shorter is padded on the left; columns that are padding in every row are dropped.
        """
        parts = (self, other)
        joined = object.__new__(Cache)
        joined.length = max(used_columns(part.length, part.valid) for part in parts)
        joined.keys_values = [
            mine.join(its, joined.length)
            for mine, its in zip(self.keys_values, other.keys_values, strict=True)
        ]
        joined.conv = _stacked(self.conv, other.conv)
        joined.delayed = _stacked(self.delayed, other.delayed)
        rows = [len(part) for part in (self.delayed[0], other.delayed[0]) if part is not None]
        known = [(part.length, part.valid) for part in parts]
        joined.valid = join_valid(known, rows, joined.length)
        return joined

    @property
    def bytes(self) -> int:
        """Memory held by all states."""
        buffers = [layer.buffer for layer in self.keys_values]
        states = [*buffers, *self.conv, *self.delayed]
        return sum(state.nbytes for state in states if state is not None)


def rows_that_fit(config: ModelConfig, length: int, memory: int) -> int:
    """How many sequences of so many tokens keep their keys and values in ``memory``, at least one.

    In float64, in buffers that grow by doubling.
    """
    token = 2 * 2 * 8 * config.layers * config.kv_heads * config.head_dim
    return max(1, memory // (token * length))


def _stacked(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Each layer's states of two batches as one."""
    joined: list[Tensor | None] = []
    for a, b in zip(first, second, strict=True):
        assert a is not None
        assert b is not None
        joined.append(torch.cat([a, b]))
    return joined
