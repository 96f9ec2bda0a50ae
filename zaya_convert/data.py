"""Token sequences to run models on: from text, JSONL or ids, cut to length, with a digest.

Accepted are ``.txt`` files (one document), ``.jsonl`` files with one of ``text``, ``messages``
(the chat template is applied) or ``ids`` per line, and ``hf://datasets/org/name[@revision][/file]``.
Without data, validation runs on the text bundled with ``zaya1-tiny``, and calibration on the
bundled calibration set (on its own texts for ``zaya1-tiny``). A checkpoint without a tokenizer, or
with one that has more tokens than the model has embedding rows, gets random token ids then: enough
to compare two forms of one model, and said so in the report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.files import read_small
from zaya_convert.headers import parse_json_object
from zaya_convert.hub import fetch_dataset
from zaya_convert.models import BUNDLED
from zaya_convert.runtime.tokenizer import Tokenizer

VALIDATION = BUNDLED / "data" / "validation.jsonl"
# Calibration sets that ship with the package, by the name that --data takes.
CALIBRATION = {
    "general": BUNDLED.parent / "calibration" / "general.jsonl",
    "zaya1-tiny": BUNDLED / "data" / "calibration.jsonl",
}
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
    has_tokenizer = checkpoint.has_tokenizer
    if data is None and not has_tokenizer:
        return _random(checkpoint, tokens, length, seed, "no tokenizer")
    path = VALIDATION if data is None else find(data)
    documents = _checked(checkpoint, path, is_default=data is None)
    if isinstance(documents, str):
        return _random(checkpoint, tokens, length, seed, documents)
    ids: list[Tensor] = []
    left = tokens
    for document in documents:
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
    return Sequences(ids, name, digest_of(ids))


def load_documents(
    checkpoint: Checkpoint, data: str | None, *, length: int, pack: bool, tokens: int, seed: int = 0
) -> Sequences:
    """All documents of a calibration set, cut to sequences of at most ``length`` tokens.

    Args:
        data: a file, a Hub data set, or the name of a bundled set; None picks one of these.
        pack: join documents, so that every sequence but the last is full. A sequence may then hold
            the end of one document and the beginning of another, as in training.
        tokens: how many random tokens to draw when there is no text for this model.

    Raises:
        InputError: as ``load_sequences``.
    """
    has_tokenizer = checkpoint.has_tokenizer
    if data is None and not has_tokenizer:
        return _random(checkpoint, tokens, length, seed, "no tokenizer")
    name = data or ("zaya1-tiny" if _has_bundled_tokenizer(checkpoint) else "general")
    path = CALIBRATION.get(name) or find(name)
    documents = _checked(checkpoint, path, is_default=data is None)
    if isinstance(documents, str):
        return _random(checkpoint, tokens, length, seed, documents)
    if pack:
        joined = [token for document in documents for token in document]
        documents = [joined]
    ids = [
        torch.tensor(document[start : start + length], dtype=torch.int64)
        for document in documents
        for start in range(0, len(document), length)
        if len(document) - start > 1
    ]
    if not ids:
        raise InputError("holds no text to run", path.name)
    shown = f"bundled calibration set {name}" if name in CALIBRATION else path.name
    return Sequences(ids, shown + (", packed" if pack else ""), digest_of(ids))


def joined(first: Sequences, second: Sequences) -> Sequences:
    """One set after another."""
    ids = [*first.ids, *second.ids]
    return Sequences(ids, f"{first.description} + {second.description}", digest_of(ids))


def take(documents: Sequence[Tensor], tokens: int) -> tuple[list[Tensor], Sequence[Tensor]]:
    """The first ``tokens`` tokens, the last document cut to fit, and the untouched rest."""
    taken: list[Tensor] = []
    left = tokens
    for index, ids in enumerate(documents):
        if left < 2:
            return taken, documents[index:]
        taken.append(ids[:left])
        left -= len(taken[-1])
    return taken, ()


def find(name: str) -> Path:
    """The local file behind a name: a path, or a Hub data set, which is fetched."""
    return fetch_dataset(name) if name.startswith("hf://") else Path(name)


def _checked(checkpoint: Checkpoint, path: Path, is_default: bool) -> list[list[int]] | str:
    """Documents whose ids all lie inside the vocabulary.

    Returns:
        The documents; or, for a default set that does not fit the model, why not.

    Raises:
        InputError: an id outside the vocabulary in a set that was asked for.
    """
    has_tokenizer = checkpoint.has_tokenizer
    tokenizer = Tokenizer.of(checkpoint) if has_tokenizer else None
    rows = checkpoint.config.vocab_rows
    bundled = path in CALIBRATION.values()
    found: list[list[int]] = []
    for where, document in _documents(path, tokenizer, plain_messages=bundled):
        outside = next((token for token in document if not 0 <= token < rows), None)
        if outside is not None and is_default:
            return f"the tokenizer goes beyond the model's {rows} embedding rows"
        if outside is not None:
            shown = outside if abs(outside) < 1 << 64 else "of more than 64 bits"
            raise InputError(
                f"token id {shown} is outside the model's {rows} embedding rows", where
            )
        found.append(document)
    return found


def _has_bundled_tokenizer(checkpoint: Checkpoint) -> bool:
    file = "tokenizer.json"
    return checkpoint.path == BUNDLED or read_small(checkpoint.path / file) == read_small(
        BUNDLED / file
    )


def _bundled_name(checkpoint: Checkpoint) -> str:
    """What the bundled text is to this checkpoint: its own, or that of another model."""
    name = "bundled validation text"
    if _has_bundled_tokenizer(checkpoint):
        return name
    return f"{name} (arithmetic; pass --data for text like yours)"


def _documents(
    path: Path, tokenizer: Tokenizer | None, plain_messages: bool = False
) -> Iterator[tuple[str, list[int]]]:
    """Where each document stands, and its token ids.

    Args:
        plain_messages: without a chat template, take a conversation as plain paragraphs.
    """
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
            yield where, _document(line, tokenizer, where, plain_messages)


def _document(
    line: str, tokenizer: Tokenizer | None, where: str, plain_messages: bool
) -> list[int]:
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
        if plain_messages and not tokenizer.template:
            text = "\n\n".join(message["content"] for message in entry["messages"])
            return _encode(text, tokenizer, where)
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
    return Sequences(ids, f"random token ids ({why}), seed {seed}", digest_of(ids))


def digest_of(ids: Sequence[Tensor]) -> str:
    """sha256 over sequences of token ids, lengths included."""
    total = hashlib.sha256()
    for sequence in ids:
        total.update(len(sequence).to_bytes(8, "little"))
        total.update(sequence.to(torch.int64).numpy().tobytes())
    return total.hexdigest()
