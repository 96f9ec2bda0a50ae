"""What every engine asks of its inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zaya_convert.errors import InputError


def check_block(ids: Tensor) -> None:
    """A block of tokens [B, T].

    Raises:
        InputError: of another form, or empty.
    """
    if ids.ndim != 2 or not ids.numel():
        raise InputError(f"need at least one token, got ids of shape {list(ids.shape)}")


def check_sequences(sequences: Sequence[Tensor]) -> None:
    """Whole sequences [T].

    Raises:
        InputError: there are none, or one is empty.
    """
    if not sequences or any(s.ndim != 1 or not len(s) for s in sequences):
        raise InputError("nothing to evaluate: every sequence needs at least one token")


def check_ids(ids: Tensor, rows: int) -> None:
    """Token ids of a vocabulary of ``rows``.

    Raises:
        InputError: an id is outside.
    """
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise InputError(f"token ids must lie in 0..{rows - 1}; is this the right tokenizer?")


def full_mask(ids: Tensor, past: int, valid: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Which columns [B, past + T] are real, None when all are.

    Args:
        ids: the new columns [B, T].
        past: how many columns there were before.
        valid: what was known of those, None when all are real.
        mask: what the caller says of all of them; without it the new ones are real.

    Raises:
        InputError: ``mask`` has another shape.
    """
    total = past + ids.shape[1]
    if mask is not None:
        if mask.shape != (ids.shape[0], total):
            raise InputError(f"mask has shape {list(mask.shape)}, expected {[ids.shape[0], total]}")
        mask = mask.bool()
    elif valid is not None:
        mask = torch.cat([valid, torch.ones_like(ids, dtype=torch.bool)], dim=1)
    return None if mask is None or bool(mask.all()) else mask


def used_columns(length: int, valid: Tensor | None) -> int:
    """Columns of a batch from the first that is not padding in every row."""
    return length if valid is None else length - int(valid.any(0).int().argmax())


def join_valid(
    parts: Sequence[tuple[int, Tensor | None]], rows: Sequence[int], width: int
) -> Tensor | None:
    """Validity [all rows, width] of batches aligned at their last column; None when all is real.

    Args:
        parts: columns and validity of each batch.
        rows: of each batch.
        width: at least what each batch uses (``used_columns``).
    """
    joined = torch.zeros(sum(rows), width, dtype=torch.bool)
    for target, (length, valid) in zip(joined.split(list(rows)), parts, strict=True):
        count = min(length, width)
        target[:, width - count :] = True if valid is None else valid[:, length - count :]
    return None if bool(joined.all()) else joined
