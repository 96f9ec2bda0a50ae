"""Open a GGUF file, ours or another tool's, as a ``Checkpoint``.

Everything is checked before a weight is read: the header (``gguf_header``), the dimensions its
metadata gives against every tensor, and that nothing is missing or left over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_convert import layout, manifest
from zaya_convert.checkpoint import CHUNK_BYTES, Checkpoint, Piece, TensorInfo, piece_chunks
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.export.arrays import Array, piece_of
from zaya_convert.export.gguf import metadata, tokenizer
from zaya_convert.export.gguf.names import DIALECTS, Dialect, Place, detect
from zaya_convert.gguf_format import NUMBER_KEY
from zaya_convert.gguf_header import GgufHeader, read_gguf
from zaya_convert.gguf_parts import read_gguf_set
from zaya_convert.headers import FLOAT_DTYPES, RawTensor
from zaya_convert.layout import EXPERT_PARTS, PART_BY_NAME, TensorKey
from zaya_quant.spec import BLOCK_TYPES, spec_of_type

if TYPE_CHECKING:
    import torch

    from zaya_quant.qtensor import Quantized

_MAX_PROBLEMS = 1000
_GATE, _UP, _ = EXPERT_PARTS


def open_gguf(path: Path) -> Checkpoint:
    """Open a file (any part of a split one), or the folder that holds it.

    Raises:
        InputError: it cannot be trusted, is no ZAYA1 model, or does not hold what it says; every
            problem that was found.
    """
    folder = path if path.is_dir() else None
    file = _only_file(path) if folder else path
    return _opened(path, read_gguf_set(file)[0], folder, file)


def _opened(path: Path, header: GgufHeader, folder: Path | None, file: Path) -> Checkpoint:
    architecture = header.short("general.architecture")
    if architecture != "zaya":
        raise InputError(f"its architecture is {architecture!r}, not 'zaya'", file.name)
    dialect = detect(header.tensors)
    if dialect is None:
        known = ", ".join(DIALECTS)
        raise InputError(f"its tensors are named in no dialect we know ({known})", file.name)
    config = _config(header, dialect, file.name)
    infos = _match(header.tensors, config, dialect, file.name)
    facts = metadata.read_manifest(header)
    written = manifest.read(folder) if folder else {}
    stop = list(config.eos_ids)
    return Checkpoint(
        path, f"gguf {dialect.name}", config, {"model_type": "zaya", "eos_token_id": stop}, infos,
        (), written or facts, _decode, extras=cache(lambda: tokenizer.side_files(header)),
    )  # fmt: skip


def verify_file(path: Path, progress: Callable[[int], None] = lambda _: None) -> Checkpoint:
    """Check every tensor of a file that we wrote against the checksums in its header.

    Args:
        progress: called with the number of bytes just checked.

    Raises:
        InputError: no checksums, or tensors that have changed; all of them.
    """
    header, files = read_gguf_set(path)
    checkpoint = _opened(path, header, None, path)
    claimed = header.metadata.get(metadata.CHECKSUMS)
    if not isinstance(claimed, list):
        raise InputError(
            "holds no checksums; only files that zaya-convert wrote can be verified", path.name
        )
    pieces = [(k, piece) for k, info in checkpoint.infos.items() for piece in info.pieces.values()]
    if len(claimed) != len(pieces):
        raise InputError(f"lists {len(claimed)} checksums for {len(pieces)} tensors", path.name)
    changed = {f"{file.name}: the header has changed": None for file in files if not _intact(file)}
    for (key, piece), expected in zip(pieces, claimed, strict=True):
        digest = hashlib.sha256()
        for chunk in piece_chunks(piece, CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != expected:
            changed[f"{str(key)!r} has changed: not what the header says"] = None
        progress(piece.end - piece.begin)
    if changed:
        raise InputError(list(changed), path.name)
    return checkpoint


def _intact(path: Path) -> bool:
    """Whether a header has the digest that stands in it."""
    header = read_gguf(path)
    number = header.short(NUMBER_KEY, 0)
    claimed = header.short(f"{metadata.HEADER_DIGEST}{number}")
    if not isinstance(claimed, str):
        return False
    with path.open("rb") as file:
        raw = file.read(min(tensor.begin for tensor in header.tensors.values()))
    blank = raw.replace(claimed.encode(), metadata.BLANK_DIGEST.encode())
    return hashlib.sha256(blank).hexdigest() == claimed


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    firsts = [file for file in files if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(firsts) != 1:
        if not firsts:
            raise InputError("holds parts of a GGUF file, but not the first", folder.name)
        names = ", ".join(file.name for file in firsts[:5])
        raise InputError(f"holds several models ({names}); name one of the files", folder.name)
    return firsts[0]


def _config(header: GgufHeader, dialect: Dialect, where: str) -> ModelConfig:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError("'token_embd.weight' is missing", where)
    tied = "output.weight" not in header.tensors
    try:
        return metadata.read_config(header, dialect, embedding.shape[0], tied)
    except InputError as error:
        raise InputError(error.problems, where) from None


def _match(
    tensors: Mapping[str, RawTensor], config: ModelConfig, dialect: Dialect, where: str
) -> dict[TensorKey, TensorInfo]:
    """Match what the model needs with what the file holds, strictly."""
    problems: dict[str, None] = {}
    unused = set(tensors)
    # One expert speaks for all of its fused tensor: a file may promise millions that it lacks.
    for key in layout.keys(config.layers, 1, config.flags):
        place = _place(dialect, key, config, tensors)
        raw = tensors.get(place.name)
        unused.discard(place.name)
        found = "is missing" if raw is None else _mismatch(raw, place.shape, key)
        if found:
            problems[f"{place.name!r} {found}"] = None
        if len(problems) > _MAX_PROBLEMS:
            break
    else:
        problems |= {f"{name!r} is unknown": None for name in sorted(unused)}
    if problems:
        raise InputError(list(problems), where)
    infos = {}
    for key in layout.keys(config.layers, config.experts, config.flags):
        place = _place(dialect, key, config, tensors)
        infos[key] = _info(key, tensors[place.name], place, config)
    return infos


def _place(
    dialect: Dialect, key: TensorKey, config: ModelConfig, tensors: Mapping[str, object]
) -> Place:
    """Where a file keeps a tensor; some keep gate and up rows of the experts apart."""
    place = dialect.place(key, config)
    if key.part not in (_GATE, _UP) or place.name in tensors:
        return place
    half = "ffn_gate_exps" if key.part == _GATE else "ffn_up_exps"
    experts, rows, width = place.shape
    name = place.name.replace("ffn_gate_up_exps", half)
    return Place(name, (experts, rows // 2, width), place.expert)


def _mismatch(raw: RawTensor, shape: tuple[int, ...], key: TensorKey) -> str:
    """What is wrong with a stored tensor, or ""."""
    if raw.shape != shape:
        return f"has shape {list(raw.shape)}, expected {list(shape)}"
    if raw.dtype in FLOAT_DTYPES:
        return ""
    quantizable = PART_BY_NAME[key.part].role != "float" or len(shape) == 2
    return "" if quantizable else f"is {raw.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"


def _info(key: TensorKey, raw: RawTensor, place: Place, config: ModelConfig) -> TensorInfo:
    shape = layout.resolve(PART_BY_NAME[key.part].shape, config.dims)
    array = Array(raw.name, raw.dtype, raw.shape)

    def piece(expert: int | None, rows: tuple[int, int] | None, shape: tuple[int, ...]) -> Piece:
        region = piece_of(array, expert, rows)
        begin = raw.begin + region.offset
        dtype = raw.dtype
        if dtype in BLOCK_TYPES:
            weights, size = BLOCK_TYPES[dtype]
            dtype, shape = "U8", (*shape[:-1], shape[-1] // weights * size)
        return Piece(raw.file, begin, begin + region.bytes, dtype, shape)

    if place.taps:
        pieces = {f"tap{i}": piece(i, None, shape[:2]) for i in range(shape[2])}
    else:
        pieces = {"": piece(place.expert, place.rows, shape)}
    spec = spec_of_type(raw.dtype) if raw.dtype in BLOCK_TYPES else None
    return TensorInfo(key, shape, raw.dtype if spec is None else "U8", pieces, spec)


def _decode(info: TensorInfo, pieces: dict[str, torch.Tensor]) -> torch.Tensor | Quantized:
    """Blocks as codes; taps side by side."""
    import torch

    from zaya_quant.blocks import unpack

    if info.spec is None:
        return torch.stack(list(pieces.values()), dim=2)
    return unpack(pieces[""], info.spec.ggml_type)
