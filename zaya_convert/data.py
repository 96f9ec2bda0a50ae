"""Token sequences to run models on: from text, JSONL or ids, cut to length, with a digest.

Accepted files: ``.txt`` (one document), ``.jsonl`` with one of ``text``, ``messages`` (the chat
template is applied) or ``ids`` per line. Without a file it is the validation text bundled with
``zaya1-tiny``. A checkpoint without a tokenizer, or with one that has more tokens than the model
has embedding rows, gets random token ids then: enough to compare two forms of one model, and said
so in the report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.files import read_small
from zaya_convert.headers import parse_json_object
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
        return _random(checkpoint, tokens, length, seed, "no tokenizer")
    path = VALIDATION if data is None else Path(data)
    tokenizer = Tokenizer.load(checkpoint.path) if has_tokenizer else None
    rows = checkpoint.config.vocab_rows
    ids: list[Tensor] = []
    left = tokens
    for where, document in _documents(path, tokenizer):
        outside = next((token for token in document if not 0 <= token < rows), None)
        if outside is not None and data is None:
            why = f"the tokenizer goes beyond the model's {rows} embedding rows"
            return _random(checkpoint, tokens, length, seed, why)
        if outside is not None:
            shown = outside if abs(outside) < 1 << 64 else "of more than 64 bits"
            raise InputError(
                f"token id {shown} is outside the model's {rows} embedding rows", where
            )
        for start in range(0, len(document), length):
            piece = document[start : start + min(length, left)]
            if len(piece) > 1:
                ids.append(torch.tensor(piece, dtype=torch.int64))
                left -= len(piece)
        if left < 2:
            break
    if not ids:
        raise InputError("holds no text to run", path.name)
    name = _bundled_name(checkpoint) if data is None else path.name
    return Sequences(ids, name, _digest(ids))


def _bundled_name(checkpoint: Checkpoint) -> str:
    """What the bundled text is to this checkpoint: its own, or that of another model."""
    name, file = "bundled validation text", "tokenizer.json"
    if checkpoint.path == BUNDLED or read_small(checkpoint.path / file) == read_small(
        BUNDLED / file
    ):
        return name
    return f"{name} (arithmetic; pass --data for text like yours)"


def _documents(path: Path, tokenizer: Tokenizer | None) -> Iterator[tuple[str, list[int]]]:
    """Where each document stands, and its token ids."""
    raw = read_small(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start})", path.name) from None
    if path.suffix != ".jsonl":
        yield path.name, _encode(text, tokenizer, path.name)
        return
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path.name}:{number}"
            yield where, _document(line, tokenizer, where)


def _document(line: str, tokenizer: Tokenizer | None, where: str) -> list[int]:
    entry = parse_json_object(line.encode("utf-8"), where)
    field = next((f for f in _FIELDS if f in entry), None)
    if field == "text" and isinstance(entry["text"], str):
        return _encode(entry["text"], tokenizer, where)
    if field == "ids":
        ids = entry["ids"]
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise InputError("ids must be a list of integers", where)
        return ids
    if field == "messages" and isinstance(entry["messages"], list):
        if tokenizer is None:
            raise InputError("needs a tokenizer, and the checkpoint has none", where)
        try:
            return tokenizer.chat(entry["messages"], add_generation_prompt=False)
        except InputError as error:
            raise InputError(error.problems, where) from None
        except (TypeError, RecursionError) as error:  # half a surrogate pair; absurd nesting
            raise InputError(f"messages cannot be encoded ({error})", where) from None
    raise InputError(f"needs one of {', '.join(_FIELDS)}", where)


def _encode(text: str, tokenizer: Tokenizer | None, where: str) -> list[int]:
    if tokenizer is None:
        raise InputError("needs a tokenizer, and the checkpoint has none", where)
    try:
        return tokenizer.encode(text)
    except TypeError:  # how the library answers half a surrogate pair
        raise InputError("text is not valid Unicode", where) from None


def _random(checkpoint: Checkpoint, tokens: int, length: int, seed: int, why: str) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    shape = (max(tokens // length, 1), min(length, tokens))
    ids = list(torch.randint(checkpoint.config.vocab_rows, shape, generator=generator))
    return Sequences(ids, f"random token ids ({why}), seed {seed}", _digest(ids))


def _digest(ids: list[Tensor]) -> str:
    total = hashlib.sha256()
    for sequence in ids:
        total.update(len(sequence).to_bytes(8, "little"))
        total.update(sequence.to(torch.int64).numpy().tobytes())
    return total.hexdigest()
