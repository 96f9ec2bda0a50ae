"""Token sequences to run models on: from text, JSONL or ids, cut to length, with a digest.

Accepted files: ``.txt`` (one document), ``.jsonl`` with one of ``text``, ``messages`` (the chat
template is applied) or ``ids`` per line. Without a file it is the validation text bundled with
``zaya1-tiny``. A checkpoint without a tokenizer gets random token ids: enough to compare two
forms of one model, and said so in the report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.files import read_small
from zaya_convert.models import BUNDLED
from zaya_convert.runtime.tokenizer import Tokenizer

VALIDATION = BUNDLED / "data" / "validation.jsonl"
_FIELDS = ("ids", "messages", "text")


@dataclass(frozen=True)
class Sequences:
    """Sequences of token ids, each int64 [T].

    Attributes:
        description: what they are, for the report.
        digest: sha256 over the token ids, so that a result names its evidence.
    """

    ids: list[Tensor]
    description: str
    digest: str

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(len(ids) for ids in self.ids)


def load_sequences(
    checkpoint: Checkpoint, data: str | None, *, tokens: int, length: int, seed: int = 0
) -> Sequences:
    """Read up to ``tokens`` tokens in sequences of at most ``length``.

    Documents are not joined, so no sequence contains text of two.

    Raises:
        InputError: a file that cannot be read, is empty, or holds ids outside the vocabulary.
    """
    has_tokenizer = (checkpoint.path / "tokenizer.json").is_file()
    if data is None and not has_tokenizer:
        ids = _random(checkpoint, tokens, length, seed)
        return Sequences(ids, f"random token ids (no tokenizer), seed {seed}", _digest(ids))
    path = VALIDATION if data is None else Path(data)
    tokenizer = Tokenizer.load(checkpoint.path) if has_tokenizer else None
    ids: list[Tensor] = []
    left = tokens
    for document in _documents(path, tokenizer):
        for start in range(0, len(document), length):
            piece = document[start : start + min(length, left)]
            if len(piece) > 1:
                ids.append(torch.tensor(piece, dtype=torch.int64))
                left -= len(piece)
        if left < 2:
            break
    if not ids:
        raise InputError("holds no text to run", path.name)
    _check_ids(ids, checkpoint, path)
    name = "bundled validation text" if data is None else path.name
    return Sequences(ids, name, _digest(ids))


def _documents(path: Path, tokenizer: Tokenizer | None) -> Iterator[list[int]]:
    raw = read_small(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start})", path.name) from None
    if path.suffix != ".jsonl":
        yield _encode(text, tokenizer, path.name)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _document(line, tokenizer, f"{path.name}:{number}")


def _document(line: str, tokenizer: Tokenizer | None, where: str) -> list[int]:
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"not valid JSON ({error})", where) from None
    field = next((f for f in _FIELDS if isinstance(entry, dict) and f in entry), None)
    if field == "text" and isinstance(entry["text"], str):
        return _encode(entry["text"], tokenizer, where)
    if field == "ids" and all(type(i) is int for i in entry["ids"]):
        return entry["ids"]
    if field == "messages" and isinstance(entry["messages"], list):
        if tokenizer is None:
            raise InputError("needs a tokenizer, and the checkpoint has none", where)
        return tokenizer.chat(entry["messages"], add_generation_prompt=False)
    raise InputError(f"needs one of {', '.join(_FIELDS)}", where)


def _encode(text: str, tokenizer: Tokenizer | None, where: str) -> list[int]:
    if tokenizer is None:
        raise InputError("needs a tokenizer, and the checkpoint has none", where)
    return tokenizer.encode(text)


def _random(checkpoint: Checkpoint, tokens: int, length: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (max(tokens // length, 1), min(length, tokens))
    ids = torch.randint(checkpoint.config.vocab_rows, shape, generator=generator)
    return list(ids)


def _check_ids(ids: list[Tensor], checkpoint: Checkpoint, path: Path) -> None:
    rows = checkpoint.config.vocab_rows
    worst = max(int(sequence.max()) for sequence in ids)
    if worst >= rows or min(int(sequence.min()) for sequence in ids) < 0:
        raise InputError(
            f"token id {worst} is outside the model's {rows} embedding rows", path.name
        )


def _digest(ids: list[Tensor]) -> str:
    total = hashlib.sha256()
    for sequence in ids:
        total.update(len(sequence).to_bytes(8, "little"))
        total.update(sequence.to(torch.int64).numpy().tobytes())
    return total.hexdigest()
