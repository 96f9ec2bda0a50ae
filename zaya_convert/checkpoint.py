"""``Checkpoint``: an indexed, lazily read model. Headers first; weights only when asked for.

A checkpoint is a configuration plus a table ``TensorKey → TensorInfo``. Sources (either layout)
and artifacts (every exporter's reader returns one) are the same type, so every tool works on both.
Opening is strict: every expected tensor present, no unknown one, shapes and dtypes right, all
problems in one message.

Tensors are read with ``pread`` into fresh buffers rather than mapped: resident memory is then what
we hold, nothing else, and several threads can read at once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zaya_convert import layout as layouts
from zaya_convert.config import ModelConfig, normalise
from zaya_convert.errors import InputError
from zaya_convert.files import load_tensors, read_json, read_small
from zaya_convert.headers import FLOAT_DTYPES, RawTensor
from zaya_convert.layout import PART_BY_NAME, Stored, TensorKey

if TYPE_CHECKING:
    import torch

    from zaya_quant.qtensor import Quantized
    from zaya_quant.spec import Spec

# What is read, hashed, quantized and written stays in the processor's cache meanwhile: with pieces
# of 32 MB the same work took a third longer.
CHUNK_BYTES = 4 << 20

# Copied along unchanged with every artifact, so tokenizer and chat template are never lost.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "equalization.npz", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous byte range of a file holding one array.

    ``turns`` tensors share it row by row, ``shape`` being that of all their rows; a ``Decoder``
    knows which are whose.
    """

    file: Path
    begin: int
    end: int
    dtype: str
    shape: tuple[int, ...]
    turns: int = 1

    @property
    def bytes(self) -> int:
        """The share of one tensor."""
        return (self.end - self.begin) // self.turns


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One logical tensor: what it is and where its bytes lie.

    Attributes:
        shape: logical shape (of the dequantized weight for quantized tensors).
        dtype: safetensors dtype of a float tensor's values as ``read`` returns them, or the dtype
            of the codes' container.
        pieces: ``{"": piece}`` for float tensors stored as they are; named components for
            quantized ones, and for float tensors that a ``Decoder`` makes from codes.
        spec: how the tensor is quantized, None for float tensors.
    """

    key: TensorKey
    shape: tuple[int, ...]
    dtype: str
    pieces: Mapping[str, Piece]
    spec: Spec | None = None

    @property
    def bytes(self) -> int:
        """Bytes on disk, scales included."""
        return sum(piece.bytes for piece in self.pieces.values())

    @property
    def plain(self) -> bool:
        """Whether the file holds the values themselves, in one run of bytes."""
        return self.spec is None and "" in self.pieces

    @property
    def stored_dtype(self) -> str:
        """What the file holds: the dtype of the values, or of the codes."""
        return next(iter(self.pieces.values())).dtype

    @property
    def numel(self) -> int:
        """Number of logical weights."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count


class Scaling(Protocol):
    """An exact change of a float tensor that other tensors make up for."""

    def of(self, value: torch.Tensor | Quantized) -> torch.Tensor:
        """The changed tensor, in the same dtype."""
        ...

    def of_moments(self, moments: torch.Tensor) -> torch.Tensor:
        """Second moments [in] of the inputs that the changed tensor receives."""
        ...


# Makes a tensor from its components; a float tensor comes in the dtype that its info promises.
Decoder = Callable[[TensorInfo, dict[str, "torch.Tensor"]], "torch.Tensor | Quantized"]


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: folder (or single file) it was opened from.
        format: "hybrid", "legacy", or the name of the artifact's packing.
        config: normalised configuration.
        raw_config: ``config.json`` as found.
        infos: every logical tensor, in execution order.
        notes: things worth telling a person that are not errors.
        manifest: the artifact's manifest, empty for sources.
        extras: side files of a format that keeps them inside its weight files.
        scaling: powers of two that ``read`` multiplies a float tensor with (see ``equalize``).
    """

    path: Path
    format: str
    config: ModelConfig
    raw_config: Mapping[str, Any]
    infos: Mapping[TensorKey, TensorInfo]
    notes: tuple[str, ...] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    decoder: Decoder | None = None
    tied_copy: TensorInfo | None = None
    scaling: Mapping[TensorKey, Scaling] = field(default_factory=dict)
    extras: Callable[[], dict[str, bytes]] | None = None

    def read(self, key: TensorKey) -> torch.Tensor | Quantized:
        """Read one tensor: a float tensor in its info's dtype, or a ``Quantized``.

        Raises:
            InputError: the file cannot be read, or shrank since it was opened.
        """
        value = self.read_stored(key)
        return self.scaling[key].of(value) if key in self.scaling else value

    def read_stored(self, key: TensorKey) -> torch.Tensor | Quantized:
        """``read`` without ``scaling``: what the file holds."""
        info = self.infos[key]
        if info.plain:
            return _tensor(info.pieces[""])
        assert self.decoder is not None
        pieces = {name: _tensor(piece) for name, piece in info.pieces.items()}
        try:
            return self.decoder(info, pieces)
        except ValueError as error:
            raise InputError(str(error), str(key)) from None

    def read_float(self, key: TensorKey, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Read one tensor as floats, dequantizing when needed."""
        import torch

        value = self.read(key)
        if isinstance(value, torch.Tensor):
            return value if dtype is None else value.to(dtype)
        return value.dequantize(dtype or torch.float32)

    def chunks(self, key: TensorKey, size: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The bytes of a float tensor's values in bounded pieces."""
        info = self.infos[key]
        if info.plain:
            yield from piece_chunks(info.pieces[""], size)
        else:
            yield from _value_chunks(self.read_stored(key), size)

    def first_bytes(self, key: TensorKey, size: int) -> Iterator[memoryview]:
        """The first ``size`` bytes of every array of a tensor."""
        for piece in self.infos[key].pieces.values():
            with _opened(piece) as file:
                end = min(piece.begin + size, piece.end)
                yield _pread(file.fileno(), piece, piece.begin, end)

    def forget(self, key: TensorKey) -> None:
        """Tell the system that the cached pages of a tensor will not be needed again."""
        for piece in self.infos[key].pieces.values():
            with _opened(piece) as file:
                os.posix_fadvise(
                    file.fileno(), piece.begin, piece.end - piece.begin, os.POSIX_FADV_DONTNEED
                )

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer, template and licence files that belong to the model, by name."""
        own_tokenizer = self.extras is None or (self.path / "tokenizer.json").is_file()
        found = {} if own_tokenizer or self.extras is None else self.extras()
        for name in SIDE_FILES:
            path = self.path / name
            if path.is_file():
                found[name] = read_small(path)
        return found

    @property
    def has_tokenizer(self) -> bool:
        """Whether ``side_files`` has a tokenizer."""
        return (self.path / "tokenizer.json").is_file() or "tokenizer.json" in self.side_files()

    @property
    def made_from(self) -> Mapping[str, str]:
        """``model`` and ``digest`` of an artifact's source, "" where unknown; {} for others."""
        return self.manifest.get("source", {})

    @property
    def files(self) -> tuple[Path, ...]:
        """The weight files, sorted."""
        return tuple(sorted({p.file for i in self.infos.values() for p in i.pieces.values()}))

    @property
    def bytes(self) -> int:
        """Size of all tensors, scales included."""
        return sum(info.bytes for info in self.infos.values())

    @property
    def weights(self) -> int:
        """Number of logical weights."""
        return sum(info.numel for info in self.infos.values())

    def stamp(self) -> dict[str, list[int]]:
        """Size and modification time of every weight file: a cheap "has it changed?"."""
        stats = {path.name: path.stat() for path in self.files}
        return {name: [s.st_size, s.st_mtime_ns] for name, s in stats.items()}

    def check_tied_copy(self) -> None:
        """A stored ``lm_head.weight`` of a tied model must equal the embedding byte for byte."""
        if self.tied_copy is None:
            return
        pieces = zip(
            self.chunks(TensorKey(-1, "embed_tokens.weight")),
            piece_chunks(self.tied_copy.pieces[""], CHUNK_BYTES),
            strict=True,
        )
        if any(a != b for a, b in pieces):
            raise InputError(
                "config.json ties the head to the embedding, but lm_head.weight differs from "
                "model.embed_tokens.weight; remove it or set tie_word_embeddings to false",
                self.path.name,
            )


class SourceDigest:
    """Digest of a model's contents that does not depend on its layout, sharding or file names.

    sha256 over one line per logical tensor, ``key dtype shape blake3(bytes)``, in execution order.
    (BLAKE3, because sha256 of the source took a third of a conversion's time.)
    """

    def __init__(self) -> None:
        self._lines: dict[TensorKey, str] = {}

    def add(self, info: TensorInfo, digest: str) -> None:
        """Record the BLAKE3 digest of one tensor's raw bytes, in hexadecimal."""
        self._lines[info.key] = f"{info.key} {info.dtype} {list(info.shape)} {digest}\n"

    def hexdigest(self, keys: Mapping[TensorKey, TensorInfo]) -> str:
        """The digest over ``keys`` in order; every one of them must have been added."""
        total = hashlib.sha256()
        for key in keys:
            total.update(self._lines[key].encode())
        return total.hexdigest()


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors one that this package reads."""
    import torch

    return {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
        "I64": torch.int64, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
    }[name]  # fmt: skip


def open_source(folder: Path) -> Checkpoint:
    """Open a float checkpoint in either layout. Reads headers only.

    Raises:
        InputError: with every problem found.
    """
    raw = read_json(folder / "config.json")
    tensors = load_tensors(folder)
    layout = layouts.detect(tensors)
    if not layout:
        raise InputError(
            "these are not ZAYA1 tensors: neither '.mlp.experts.' (hybrid) nor '.zaya_block.' "
            "(legacy) occurs in any name",
            folder.name,
        )
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config, notes = normalise(raw, layout, shapes)
    infos, tied_copy = match_tensors(layout, config, tensors, folder.name)
    return Checkpoint(folder, layout, config, raw, infos, tuple(notes), tied_copy=tied_copy)


def match_tensors(
    layout: str,
    config: ModelConfig,
    tensors: Mapping[str, RawTensor],
    where: str,
    skip: frozenset[TensorKey] = frozenset(),
) -> tuple[dict[TensorKey, TensorInfo], TensorInfo | None]:
    """Match what the model needs with what the files hold, strictly.

    Args:
        skip: keys that are stored in another form (quantized) and are matched by the caller.

    Returns:
        Infos of all float tensors, and the redundant ``lm_head.weight`` of a tied model if stored.
    """
    infos: dict[TensorKey, TensorInfo] = {}
    problems: dict[str, None] = {}
    unused = set(tensors)
    for key in layouts.keys(config.layers, config.experts, config.flags):
        if key in skip:
            continue
        place = layouts.stored(layout, key, config.dims, config.layers)
        raw = tensors.get(place.name) or tensors.get(place.alias)
        if raw is None:
            problems[f"{place.name!r} is missing"] = None
            continue
        unused.discard(raw.name)
        if raw.shape != place.shape:
            problems[
                f"{raw.name!r} in {raw.file.name} has shape {list(raw.shape)}, "
                f"expected {list(place.shape)}"
            ] = None
        elif raw.dtype not in FLOAT_DTYPES:
            problems[
                f"{raw.name!r} in {raw.file.name} is {raw.dtype}, expected one of "
                + ", ".join(FLOAT_DTYPES)
            ] = None
        else:
            infos[key] = _info(key, raw, place, config)
    tied_copy = None
    if config.tied and "lm_head.weight" in unused:
        unused.remove("lm_head.weight")
        raw, key = tensors["lm_head.weight"], TensorKey(-1, "embed_tokens.weight")
        place = layouts.stored(layout, key, config.dims, config.layers)
        if key in infos and (raw.shape, raw.dtype) == (place.shape, infos[key].dtype):
            tied_copy = _info(key, raw, place, config)
        else:
            problems["'lm_head.weight' is stored but cannot equal the tied embedding"] = None
    problems |= {f"{n!r} in {tensors[n].file.name} is unknown": None for n in sorted(unused)}
    if problems:
        raise InputError(list(problems), where)
    return infos, tied_copy


def _info(key: TensorKey, raw: RawTensor, place: Stored, config: ModelConfig) -> TensorInfo:
    shape = layouts.resolve(PART_BY_NAME[key.part].shape, config.dims)
    return TensorInfo(key, shape, raw.dtype, {"": piece_at(raw, place, shape)})


def piece_at(raw: RawTensor, place: Stored, shape: tuple[int, ...]) -> Piece:
    """The bytes that ``place`` means within the array stored there, as an array of ``shape``.

    The array's rows are those of ``place``; its columns need not be: codes may be packed.
    """
    begin, end = raw.begin, raw.end
    if place.expert is not None:
        size = (end - begin) // raw.shape[0]
        begin, end = begin + place.expert * size, begin + (place.expert + 1) * size
    if place.rows:
        row = (end - begin) // place.shape[-2]
        begin, end = begin + place.rows[0] * row, begin + place.rows[1] * row
    return Piece(raw.file, begin, end, raw.dtype, shape)


def _value_chunks(value: torch.Tensor | Quantized, size: int) -> Iterator[memoryview]:
    import torch

    assert isinstance(value, torch.Tensor)
    data = value.contiguous().view(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


def piece_chunks(piece: Piece, size: int) -> Iterator[memoryview]:
    """The bytes of a piece in parts of at most ``size``."""
    with _opened(piece) as file:
        for begin in range(piece.begin, piece.end, size):
            yield _pread(file.fileno(), piece, begin, min(begin + size, piece.end))


def _opened(piece: Piece) -> FileIO:
    try:
        return piece.file.open("rb", buffering=0)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", piece.file.name) from None


def _pread(descriptor: int, piece: Piece, begin: int, end: int) -> memoryview:
    import numpy

    buffer = numpy.empty(end - begin, numpy.uint8).data  # unlike a bytearray, not zeroed first
    view, position = buffer, begin
    while position < end:
        try:
            count = os.preadv(descriptor, [view[position - begin :]], position)
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", piece.file.name) from None
        if count == 0:
            raise InputError(f"shrank while it was read (at byte {position})", piece.file.name)
        position += count
    return buffer


def _tensor(piece: Piece) -> torch.Tensor:
    import torch

    with _opened(piece) as file:
        buffer = _pread(file.fileno(), piece, piece.begin, piece.end)
    return torch.frombuffer(buffer, dtype=torch_dtype(piece.dtype)).reshape(piece.shape)
