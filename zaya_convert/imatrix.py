"""Calibration shared with llama.cpp: its importance matrix, a GGUF file, written and read.

For every matrix of a model such a file holds the squares of its inputs, summed over the rows that
it received, and the number of those rows::

    general.type = "imatrix" · imatrix.datasets [str] · imatrix.chunk_count u32 · .chunk_size u32
    NAME.in_sum2   F32 [in], experts [E, in]
    NAME.counts    F32 [1],  experts [E, 1]

NAME is what the model's own GGUF file calls the matrix. ``write`` uses the names of the dialect
pr23112; of the others, yggdrasil calls these matrices the same, and combined40 is told apart when
reading. Entries of other matrices (the router's, the head's) are not looked at.

Such a file names no tokens, so ``read`` gives statistics that are enough for the method imatrix and
for ``equalize``, but not for methods that run the model (``check_uses``). What llama.cpp has no
place for stands in keys of our own: version, calibration (its digest), model, min_tokens, skipped.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from zaya_convert import __version__
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError, UsageError
from zaya_convert.export.gguf.names import DIALECTS, Dialect
from zaya_convert.gguf_format import aligned
from zaya_convert.gguf_header import GgufHeader, read_gguf
from zaya_convert.gguf_writing import build_header
from zaya_convert.headers import RawTensor
from zaya_convert.layout import TensorKey
from zaya_convert.publish import io_errors, write_whole
from zaya_convert.runtime.walk import SITES
from zaya_convert.stats import EXPERT_SITES, Stats, widths
from zaya_quant.methods import METHODS

SUFFIX = ".gguf"

_DIALECT = "pr23112"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_CHUNK = 512  # what tokens are counted in; llama-imatrix's own default
_ALIGNMENT = 32
_OWN = "zaya_convert."
_MOST = 1 << 53  # rows; more could not be counted in a float64 either
_SHOWN = 200  # characters of what a file says of its data


def write(stats: Stats, config: ModelConfig, path: Path) -> None:
    """Write statistics as an imatrix, atomically; the same for the same contents.

    Raises:
        InputError: sums that fp32 cannot hold.
        OutputError: no space, or not writable.
    """
    entries, end = [], 0
    tensors = list(_tensors(stats, config))
    for name, values in tensors:
        offset = aligned(end, _ALIGNMENT)
        entries.append((name, "F32", tuple(values.shape), offset))
        end = offset + 4 * values.numel()
    parts = [build_header(_metadata(stats), entries, _ALIGNMENT)]
    for _, values in tensors:
        data = values.numpy().astype("<f4").tobytes()
        parts.append(data.ljust(aligned(len(data), _ALIGNMENT), b"\0"))
    path = path.absolute()
    with io_errors(path):
        write_whole(path, b"".join(parts))


def _metadata(stats: Stats) -> list[tuple[str, str, Any]]:
    return [
        ("general.type", "str", "imatrix"),
        ("imatrix.datasets", "[str]", [stats.facts["description"]]),
        ("imatrix.chunk_count", "u32", -(-stats.tokens // _CHUNK)),
        ("imatrix.chunk_size", "u32", _CHUNK),
        (_OWN + "version", "str", __version__),
        (_OWN + "calibration", "str", stats.digest),
        (_OWN + "model", "str", stats.facts["model"]),
        (_OWN + "min_tokens", "u64", stats.min_tokens),
        (_OWN + "skipped", "[u64]", stats.counts[:, -1].tolist()),
    ]


def _tensors(stats: Stats, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Names and values as the file has them."""
    for layer in range(config.layers):
        for site in SITES:
            moments = stats.arrays[f"layers.{layer}.{site}.second_moment"].double()
            counts = torch.tensor([stats.tokens])
            if site in EXPERT_SITES:
                counts = stats.counts[layer, :-1, None]
            sums = (moments * counts).float()
            if not bool(torch.isfinite(sums).all()):
                raise InputError("is too large for an imatrix", f"layer {layer}, {site}")
            for name in _names(DIALECTS[_DIALECT], config, layer, site):
                yield name + _SUMS, sums
                yield name + _COUNTS, counts.float()


def _names(dialect: Dialect, config: ModelConfig, layer: int, site: str) -> list[str]:
    """What a file calls the matrices that receive the same inputs."""
    expert = 0 if site in EXPERT_SITES else -1
    keys = (TensorKey(layer, part, expert) for part in SITES[site])
    return list(dict.fromkeys(dialect.place(key, config).name for key in keys))


# ---- reading ------------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Whether a file is an imatrix, and not statistics of our own form.

    Raises:
        InputError: an imatrix older than GGUF, or GGUF of another kind.
    """
    start = b""
    if path.is_file():
        with suppress(OSError), path.open("rb") as file:
            start = file.read(128)
    if _is_old(start):
        raise InputError(
            "is an imatrix in llama.cpp's old format; convert it: "
            "llama-imatrix -m MODEL.gguf --in-file OLD.dat -o NEW.gguf",
            path.name,
        )
    if start[:4] != b"GGUF":
        return False
    _header(path)
    return True


def _is_old(start: bytes) -> bool:
    """Whether a file begins like an imatrix older than GGUF: u32 entries, u32 length, name."""
    if len(start) < 8:
        return False
    entries, length = struct.unpack_from("<II", start)
    name = start[8 : 8 + length]
    return entries > 0 and len(name) == length and name.endswith(b".weight") and name.isascii()


def check_uses(path: Path, methods: Iterable[str], allocates: bool) -> None:
    """Refuse what an imatrix does not hold enough for.

    Args:
        path: the file, for the message.
        methods: names in ``METHODS``.
        allocates: bits are to be chosen by sensitivity.

    Raises:
        UsageError: it does not.
    """
    wanting = sorted({name for name in methods if METHODS[name].on_prefix})
    if wanting:
        raise UsageError(
            f"{path.name} is an imatrix, which holds second moments only, and {wanting[0]} runs "
            "the model on tokens; use --method imatrix, or calibrate with zaya-convert"
        )
    if allocates:
        raise UsageError(
            f"{path.name} is an imatrix, which holds second moments only, and choosing bits for a "
            "size takes sensitivities; calibrate with `zaya-convert calibrate --sensitivity`"
        )


def read(path: Path, checkpoint: Checkpoint, min_tokens: int = 256) -> Stats:
    """Read an imatrix of a model: ours, or one by llama-imatrix.

    Of matrices with the same inputs the first entry that is there counts. Experts without data
    have received nothing, as ``Stats.of`` understands it.

    Args:
        min_tokens: what every expert should have, where the file does not say.

    Raises:
        InputError: not an imatrix, one of another model, or a damaged one; all reasons together.
    """
    header, config = _header(path), checkpoint.config
    with path.open("rb") as file:
        found = _Reader(path, file, header, config)
        arrays, tokens = found.arrays()
        facts = found.facts(tokens, min_tokens)
        if not found.problems:  # else tokens are not known
            arrays["counts"][:, -1] = found.skipped(tokens)
        if found.problems:
            raise InputError(found.problems, path.name)
        file.seek(0)
        return Stats(arrays, facts, hashlib.file_digest(file, "sha256").hexdigest())


def _header(path: Path) -> GgufHeader:
    """The header of an imatrix.

    Raises:
        InputError: damaged, or another kind of GGUF file.
    """
    header = read_gguf(path)
    kind = header.short("general.type")
    if kind != "imatrix":
        said = f"its general.type is {str(kind)[:_SHOWN]!r}" if kind else "it has no general.type"
        raise InputError(f"is a GGUF file, but not an imatrix: {said}", path.name)
    return header


@dataclass
class _Reader:
    """One file, and what is wrong with it."""

    path: Path
    file: BinaryIO
    header: GgufHeader
    config: ModelConfig
    problems: list[str] = field(default_factory=list)

    @property
    def dialect(self) -> Dialect:
        """Half-layers have no experts in block 0."""
        whole = DIALECTS["combined40"]
        names = (n for site in EXPERT_SITES for n in _names(whole, self.config, 0, site))
        return whole if any(map(self._has, names)) else DIALECTS[_DIALECT]

    def arrays(self) -> tuple[dict[str, Tensor], int]:
        """As in ``Stats``, with no tokens and none skipped; and how many tokens there were."""
        config, dialect = self.config, self.dialect
        counts = torch.zeros(config.layers, config.experts + 1, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int32)
        arrays = {"counts": counts, "tokens.ids": none, "tokens.lengths": none}
        tokens = 0
        for layer in range(config.layers):
            rows: dict[str, Tensor] = {}
            for site in SITES:
                found = self._site(_names(dialect, config, layer, site), site)
                if found is not None:
                    arrays[f"layers.{layer}.{site}.second_moment"], rows[site] = found
            if len(rows) < len(SITES):  # what is wrong is noted
                continue
            up, down = (rows[site] for site in EXPERT_SITES)
            if not torch.equal(up, down):
                self.problems.append(f"the experts of layer {layer} disagree on their counts")
            counts[layer, :-1] = up
            tokens = max(tokens, int(rows["qkv_proj"]), int(rows["o_proj"]))
        if any(self._has(name) for name in _names(dialect, config, config.layers, "o_proj")):
            self.problems.append(f"is of a model with more than {config.layers} layers")
        if not self.problems and not bool(counts.any()):
            self.problems.append("no expert received anything")
        return arrays, tokens

    def _has(self, name: str) -> bool:
        return any(name + suffix in self.header.tensors for suffix in (_SUMS, _COUNTS))

    def _site(self, names: list[str], site: str) -> tuple[Tensor, Tensor] | None:
        """Second moments and counts of the first entry that is there; all of them are checked."""
        shape = (self.config.experts if site in EXPERT_SITES else 1, widths(self.config)[site])
        there = [name for name in names if self._has(name)]
        if not there:
            self.problems.append(f"has no entry {' or '.join(names)}")
        found = [entry for name in there if (entry := self._entry(name, *shape)) is not None]
        if not found:
            return None
        moments, counts = found[0]
        return (moments if site in EXPERT_SITES else moments[0]), counts.long()

    def _entry(self, name: str, matrices: int, width: int) -> tuple[Tensor, Tensor] | None:
        """Second moments [matrices, width] and counts [matrices] of one entry, if it is sound."""
        sums, counts = (self.header.tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS))
        if sums is None or counts is None:
            problem = f"has no {_COUNTS if counts is None else _SUMS}"
        elif not (problem := _shape_problem(sums, counts, matrices, width)):
            # Converted from the old format, experts share one count.
            own = self._values(counts).expand(matrices)
            total = self._values(sums).view(matrices, width)
            if not (problem := _value_problem(total, own)):
                return (total / own.clamp_min(1)[:, None]).float(), own
        self.problems.append(f"{name} {problem}")
        return None

    def _values(self, tensor: RawTensor) -> Tensor:
        self.file.seek(tensor.begin)
        data = self.file.read(tensor.end - tensor.begin)
        if len(data) != tensor.end - tensor.begin:
            raise InputError("truncated while it was read", self.path.name)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).double()

    def facts(self, tokens: int, min_tokens: int) -> dict[str, Any]:
        """As in ``Stats``; an unknown model is ""."""
        model = self.header.short(_OWN + "model")
        own = self._own("min_tokens", "u64")
        return {
            "description": _description(self.header.short("imatrix.datasets"), ours=bool(model)),
            "tokens": tokens,
            "tokens_digest": "",
            "model": str(model or ""),
            "rounds": 0,
            "not_finite": 0,
            "settings": {"min_tokens": min_tokens if own is None else own},
        }

    def skipped(self, tokens: int) -> Tensor:
        """Tokens of the skip expert by layer, which llama.cpp does not write."""
        layers = self.config.layers
        values = self._own("skipped", "[u64]")
        if values is None:
            return torch.zeros(layers, dtype=torch.int64)
        if len(values) != layers or max(values) > tokens:
            self.problems.append(f"{_OWN}skipped is not a number of tokens for each layer")
            return torch.zeros(layers, dtype=torch.int64)
        return torch.tensor(values)

    def _own(self, key: str, kind: str) -> Any:
        """The value of a key of ours, or None."""
        found = self.header.kinds.get(_OWN + key, kind)
        if found != kind:
            self.problems.append(f"{_OWN}{key} is of type {found}, not {kind}")
            return None
        return self.header.short(_OWN + key)


def _shape_problem(sums: RawTensor, counts: RawTensor, matrices: int, width: int) -> str:
    if (sums.dtype, counts.dtype) != ("F32", "F32"):
        return f"is of type {sums.dtype} and {counts.dtype}, not F32"
    numbers = counts.shape[0] if counts.shape[1:] in ((), (1,)) else 0
    whole = (matrices, width) if matrices > 1 else (width,)
    # What was converted from the old format is one row of everything, with one count.
    old = sums.shape == (matrices * width,) and numbers == 1
    if old or (sums.shape in (whole, (matrices, width)) and numbers == matrices):
        return ""
    return f"has shapes {list(sums.shape)} and {list(counts.shape)}, the model {list(whole)}"


def _value_problem(sums: Tensor, counts: Tensor) -> str:
    if not bool(((counts >= 0) & (counts <= _MOST) & (counts == counts.floor())).all()):
        return "has a count that is not a whole number of rows"
    if not bool((torch.isfinite(sums) & (sums >= 0)).all()):
        return "has a sum of squares that is negative or not finite"
    if bool(sums[counts == 0].any()):
        return "has sums of squares where it counted no rows"
    return "" if len(counts) > 1 or bool(counts.all()) else "received nothing"


def _description(datasets: object, ours: bool) -> str:
    """Of the data, without the folders of whoever made the file."""
    names = [str(name) for name in datasets] if isinstance(datasets, list) else []
    if ours and len(names) == 1:
        return names[0][:_SHOWN]
    names = [re.split(r"[/\\]", name)[-1] for name in names]
    return "imatrix" + (f" of {', '.join(names)}"[:_SHOWN] if names else "")
