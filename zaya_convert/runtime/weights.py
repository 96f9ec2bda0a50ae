"""Weights on their way into the runtime: kept in memory, or read when a layer runs and dropped.

Streaming keeps about one layer's float part and one expert at a time, gathers embedding rows by
reading those rows only and walks the head in blocks of vocabulary, so that a model larger than
memory can be evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint, Piece, torch_dtype
from zaya_convert.errors import InputError, UsageError
from zaya_convert.layout import BALANCING_BIASES, EXPERT_PARTS, PART_BY_NAME, TensorKey
from zaya_convert.runtime import packed_cache
from zaya_convert.runtime.inputs import check_ids
from zaya_convert.runtime.mapping import map_file
from zaya_kernels import table
from zaya_kernels.packed import PackedWeight
from zaya_kernels.reference import Expert
from zaya_kernels.request import Request
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import Spec

Parts = Mapping[str, Tensor]
Held = Tensor | Quantized | PackedWeight

_MAPPED_BYTES = 1 << 20  # float matrices from this size on are mapped by fast runs
_HEAD_BLOCK_BYTES = 8 << 20  # small enough for the allocator to reuse: 5 times faster than 64 MiB


def kernel(op: str, request: Request) -> table.Row:
    """The row of the table that computes an op.

    Raises:
        UsageError: the one that the user forces cannot.
    """
    try:
        return table.choose(op, request)
    except ValueError as error:
        raise UsageError(str(error)) from None


class Weights:
    """A checkpoint's tensors in the dtypes of the run, cached when ``resident``.

    Attributes:
        dtype: of activations and of everything that is applied element by element.
        matrix_dtype: of matrices; wider than ``dtype`` in the exact mode.
        packing: for which requests kernels may choose to have quantized matrices packed, which
            are then never dequantized; None: all are. For resident weights only.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        matrix_dtype: torch.dtype,
        resident: bool,
        packing: Request | None = None,
    ) -> None:
        self.checkpoint, self.resident = checkpoint, resident
        self.dtype, self.matrix_dtype = dtype, matrix_dtype
        self.packing = packing if resident else None
        self._keys: dict[int, list[TensorKey]] = {}
        for key in checkpoint.infos:
            if key.expert < 0:
                self._keys.setdefault(key.layer, []).append(key)
        self._layers: dict[int, Parts] = {}
        self._experts: dict[tuple[int, int], Expert] = {}
        self._matrices: dict[str, Held] = {}
        self._packs: dict[tuple[str, Spec], packed_cache.Pack | None] = {}
        self._mapped = self._map() if self.packing else {}
        self._files: dict[Path, Tensor] = {}
        self._vectors = {
            key.part: self._read_float(key)
            for key in self._keys[-1]
            if len(checkpoint.infos[key].shape) == 1
        }

    @property
    def head_part(self) -> str:
        """The matrix the hidden state meets last."""
        return "embed_tokens.weight" if self.checkpoint.config.tied else "lm_head.weight"

    def vector(self, part: str) -> Tensor | None:
        """A one-dimensional tensor of the whole model, or None when the model has none."""
        return self._vectors.get(part)

    def layer(self, index: int) -> Parts:
        """Every tensor of one layer but its experts, by part name.

        A packed matrix stands where its tensor would: only ``linear`` ever looks at matrices.
        """
        if index in self._layers:
            return self._layers[index]
        parts = {key.part: cast("Tensor", self._read(key)) for key in self._keys[index]}
        if self.resident:
            self._layers[index] = parts
        return parts

    def small_parts(self, index: int) -> Parts:
        """A layer's tensors without what recipes may quantize: attention matrices and experts."""
        keys = (key for key in self._keys[index] if PART_BY_NAME[key.part].role == "float")
        return {key.part: self._read_float(key) for key in keys}

    def expert(self, layer: int, index: int) -> Expert:
        """The matrices of one expert, packed or dequantized."""
        found = self._experts.get((layer, index))
        if found is None:
            found = Expert(*(self._read(TensorKey(layer, part, index)) for part in EXPERT_PARTS))
            if self.resident:
                self._experts[layer, index] = found
        return found

    def embed(self, ids: Tensor) -> Tensor:
        """Embedding rows: ids [n] → [n, d].

        Raises:
            InputError: an id is outside the embedding.
        """
        part = "embed_tokens.weight"
        check_ids(ids, self.checkpoint.config.vocab_rows)
        held = self._held(part)
        if isinstance(held, Tensor):
            return held[ids].to(self.dtype)
        if isinstance(held, PackedWeight):
            return held.rows(ids).to(self.dtype)
        used, places = torch.unique(ids, return_inverse=True)
        return torch.cat(list(self._rows(part, used.tolist(), 1)))[places].to(self.dtype)

    def packed_head(self) -> PackedWeight | None:
        """The head where it is packed; ``head_blocks`` is for others."""
        held = self._held(self.head_part)
        return held if isinstance(held, PackedWeight) else None

    def head_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The head in blocks of rows: (first row, [rows, d])."""
        part = self.head_part
        total, width = self.checkpoint.infos[TensorKey(-1, part)].shape
        size = max(1, _HEAD_BLOCK_BYTES // (width * self.matrix_dtype.itemsize))
        starts = range(0, total, total if self.resident else size)
        return zip(starts, self._rows(part, starts, starts.step), strict=True)

    def _held(self, part: str) -> Held | None:
        """A matrix of the whole model, or None when its rows are to be read as they are needed.

        Quantized ones are held as codes even when streaming: formats differ in where rows lie.
        """
        key = TensorKey(-1, part)
        if part not in self._matrices and (self.resident or self.checkpoint.infos[key].spec):
            self._matrices[part] = self._read(key) if self.resident else self.checkpoint.read(key)
        return self._matrices.get(part)

    def _rows(self, part: str, starts: Iterable[int], count: int) -> Iterator[Tensor]:
        """Rows [start, start + count) of a matrix for each start, as floats."""
        held = self._held(part)
        if held is None:
            piece = self.checkpoint.infos[TensorKey(-1, part)].pieces[""]
            yield from (rows.to(self.matrix_dtype) for rows in _read_rows(piece, starts, count))
            return
        for start in starts:
            if isinstance(held, Tensor):
                yield held[start : start + count]
            elif not isinstance(held, PackedWeight):
                rows = held.rows(slice(start, start + count)).dequantize(self.dtype)
                yield rows.to(self.matrix_dtype)

    def _map(self) -> Mapping[TensorKey, PackedWeight]:
        """What the cache of packed matrices has of this model: all that is packed, or nothing."""
        assert self.packing is not None
        wanted: list[packed_cache.Wanted] = []
        for key, info in self.checkpoint.infos.items():
            pack = self._pack(key)
            if info.spec is not None and pack is not None and key not in self.checkpoint.scaling:
                rows, columns = info.shape
                wanted.append(packed_cache.Wanted(key, (rows, columns), info.spec, pack))
        return packed_cache.mapped(self.checkpoint, wanted, self.packing.fast)

    def _pack(self, key: TensorKey) -> packed_cache.Pack | None:
        """How a matrix is packed, None when it is not."""
        spec = self.checkpoint.infos[key].spec
        if self.packing is None or spec is None:
            return None
        op = "linear" if key.expert < 0 else "moe_ffn"
        if (op, spec) not in self._packs:
            self._packs[op, spec] = kernel(op, replace(self.packing, spec=spec)).pack
        return self._packs[op, spec]

    def _read(self, key: TensorKey) -> Tensor | PackedWeight:
        if key in self._mapped:
            return self._mapped[key]
        pack = self._pack(key)
        if pack is None:
            return self._read_float(key)
        value = self.checkpoint.read(key)
        return self._as_float(value) if isinstance(value, Tensor) else pack(value)

    def _read_float(self, key: TensorKey) -> Tensor:
        if key.part == BALANCING_BIASES:
            return self.checkpoint.read_float(key, torch.float32)
        if self.packing is not None and (mapped := self._map_float(key)) is not None:
            return mapped
        return self._as_float(self.checkpoint.read(key))

    def _map_float(self, key: TensorKey) -> Tensor | None:
        """A large matrix whose file holds it as the run takes it, in place; None for others."""
        info = self.checkpoint.infos[key]
        piece = info.pieces.get("")
        dtype = self.matrix_dtype
        if piece is None or not info.plain or key in self.checkpoint.scaling:
            return None
        fits = torch_dtype(piece.dtype) == dtype and piece.begin % dtype.itemsize == 0
        if len(piece.shape) != 2 or piece.bytes < _MAPPED_BYTES or not fits:
            return None
        try:
            if piece.file not in self._files:
                self._files[piece.file] = map_file(piece.file)
        except OSError:  # reading it will tell what is wrong
            return None
        data = self._files[piece.file][piece.begin : piece.end]
        return data.view(dtype).view(piece.shape) if len(data) == piece.bytes else None

    def _as_float(self, value: Tensor | Quantized) -> Tensor:
        if not isinstance(value, Tensor):
            value = value.dequantize(self.dtype)
        return value.to(self.matrix_dtype if value.ndim == 2 else self.dtype)


def _read_rows(piece: Piece, starts: Iterable[int], count: int) -> Iterator[Tensor]:
    """Rows [start, start + count) of a float matrix on disk for each start, cut at its end."""
    dtype, (total, width) = torch_dtype(piece.dtype), piece.shape
    stride = width * dtype.itemsize
    try:
        with piece.file.open("rb") as file:
            for start in starts:
                size = min(count, total - start) * stride
                file.seek(piece.begin + start * stride)
                raw = bytearray(file.read(size))
                if len(raw) < size:
                    raise InputError("shrank while it was read", piece.file.name)
                yield torch.frombuffer(raw, dtype=dtype).view(-1, width)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", piece.file.name) from None
