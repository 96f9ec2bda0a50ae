"""The GGUF container: one file or several parts, laid out before a weight is read.

The header's length is known beforehand, because what is filled in at the end (digests) always has
the same length. The last of them is of the header itself, as it is with zeros in that place.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_convert.export.container import Outcome, PlannedFile, PlannedFiles, offsets, split
from zaya_convert.export.gguf import metadata, tokenizer
from zaya_convert.export.gguf.names import Dialect
from zaya_convert.gguf_format import COUNT_KEY, NUMBER_KEY, TOTAL_KEY
from zaya_convert.gguf_writing import build_header

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

ALIGNMENT = 32
NAME = "model"


class GgufFiles:
    """The files of one output."""

    def __init__(self, plan: Plan, dialect: Dialect, folder: Path) -> None:
        """Lay the arrays out and create the files at their full size."""
        self._plan = plan
        config, card = plan.source.config, plan.source.side_files()
        self._model = metadata.general_entries(plan)
        self._model += metadata.model_entries(config, dialect)
        self._model += tokenizer.entries(card, config)[0]
        parts = split(plan.arrays, plan.shard_bytes)
        self._parts = [(part, offsets(part, ALIGNMENT)) for part in parts]
        outcome = metadata.placeholder(plan)
        planned = [
            PlannedFile(
                _name(i, len(parts)), len(self._header(i, outcome)), arrays, offsets, ALIGNMENT
            )
            for i, (arrays, offsets) in enumerate(self._parts)
        ]
        self.files = PlannedFiles(folder, planned)

    def finish(self, outcome: Outcome) -> dict[str, bytes]:
        """Write the headers."""
        self.files.pad()
        for i, file in enumerate(self.files.planned):
            header = self._header(i, outcome)
            digest = hashlib.sha256(header).hexdigest()
            header = header.replace(metadata.BLANK_DIGEST.encode(), digest.encode())
            assert len(header) == file.data_start
            self.files.write_at(i, 0, header)
        return {}

    def _header(self, index: int, outcome: Outcome) -> bytes:
        arrays, offsets = self._parts[index]
        entries: list[metadata.Entry] = []
        if index == 0:
            entries = self._model + metadata.provenance_entries(self._plan, outcome)
        if len(self._parts) > 1:
            entries = [
                *entries,
                (NUMBER_KEY, "u16", index),
                (COUNT_KEY, "u16", len(self._parts)),
                (TOTAL_KEY, "i32", len(self._plan.arrays)),
            ]
        entries = [*entries, (f"{metadata.HEADER_DIGEST}{index}", "str", metadata.BLANK_DIGEST)]
        tensors = [
            (array.name, array.dtype, array.shape, offset)
            for array, offset in zip(arrays, offsets, strict=True)
        ]
        return build_header(entries, tensors, ALIGNMENT)


def _name(index: int, total: int) -> str:
    return f"{NAME}.gguf" if total == 1 else f"{NAME}-{index + 1:05d}-of-{total:05d}.gguf"
