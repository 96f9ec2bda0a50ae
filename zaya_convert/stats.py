"""``Stats``: what calibration found out about a model, as one safetensors file.

Per layer and projection: how many rows it received, their mean square by input channel and their
largest magnitude by input channel; per layer the tokens of every expert and of the skip expert; and
the token ids themselves, so that later steps run on exactly these. It says nothing about any target
format, so one file serves every export.

Arrays (L layers, E experts): ``tokens.ids`` int32 [n], ``tokens.lengths`` int32 [sequences],
``counts`` int64 [L, E + 1] (the last column is the skip expert), and for each layer i and site s
of ``runtime.walk.SITES`` ``layers.i.s.second_moment`` and ``.absmax``, fp32 [in] or, in experts,
[E, in]. With sensitivity, also ``layers.i.PART.sensitivity``, fp32 [out] or [E, out].

What ``imatrix.read`` makes of an imatrix of llama.cpp's is less: no token ids and no ``absmax``
(``moments_only``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.config import ModelConfig
from zaya_convert.errors import InputError
from zaya_convert.headers import read_header
from zaya_convert.layout import TensorKey
from zaya_convert.publish import write_whole
from zaya_convert.runtime.walk import SITE_OF, SITES
from zaya_quant.stats import InputStats

SCHEMA = "1"
SUFFIX = ".safetensors"
EXPERT_SITES = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Stats:
    """See the top of this file.

    Attributes:
        arrays: by name, as in the file.
        facts: what was calibrated, on which data, with which settings.
        digest: sha256 of the file.
    """

    arrays: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    digest: str = ""
    _sequences: list[Tensor] = field(default_factory=list, repr=False, compare=False)

    @property
    def sequences(self) -> list[Tensor]:
        """The token ids, int64 [T] each.

        Raises:
            InputError: an imatrix, which holds none.
        """
        if self.moments_only:
            raise InputError("holds second moments only, no tokens to run the model on", "imatrix")
        if not self._sequences:
            lengths = self.arrays["tokens.lengths"].tolist()
            self._sequences.extend(self.arrays["tokens.ids"].long().split(lengths))
        return self._sequences

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.facts["tokens"]) if self.moments_only else len(self.arrays["tokens.ids"])

    @property
    def moments_only(self) -> bool:
        """Whether they come from an imatrix: no ids, so nothing can be run on the same tokens."""
        return not len(self.arrays["tokens.ids"])

    @property
    def counts(self) -> Tensor:
        """Tokens of every expert, int64 [L, E + 1]; the last column is the skip expert."""
        return self.arrays["counts"]

    @property
    def skip_rate(self) -> float:
        """Share of routing decisions that chose the skip expert."""
        return float(self.counts[:, -1].sum() / self.counts.sum())

    @property
    def min_tokens(self) -> int:
        """What an expert should have at least."""
        return int(self.facts["settings"]["min_tokens"])

    def below(self, limit: int | None = None) -> list[tuple[int, int, int]]:
        """(layer, expert, tokens) of every expert with fewer than ``limit`` tokens."""
        limit = self.min_tokens if limit is None else limit
        starved = (self.counts[:, :-1] < limit).nonzero().tolist()
        return [(layer, e, int(self.counts[layer, e])) for layer, e in starved]

    def of(self, layer: int, part: str, expert: int) -> InputStats | None:
        """Second moments of one matrix's inputs; None when it received nothing.

        An expert with fewer than ``min_tokens`` rows leans on its layer's pooled figures: its own
        weigh n / min_tokens.
        """
        site = SITE_OF[part]
        moments = self.arrays[f"layers.{layer}.{site}.second_moment"]
        if expert < 0:
            return InputStats(self.tokens, moments)
        count = int(self.counts[layer, expert])
        if count == 0:
            return None
        own = moments[expert]
        if count < self.min_tokens:
            share = self.counts[layer, :-1].float()
            pooled = (moments * share[:, None]).sum(0) / share.sum()
            own = pooled + (own - pooled) * (count / self.min_tokens)
        return InputStats(count, own)

    @property
    def has_sensitivity(self) -> bool:
        """Whether ``sensitivity`` can be asked."""
        return any(name.endswith(".sensitivity") for name in self.arrays)

    def sensitivity(self, key: TensorKey) -> Tensor:
        """How much each output of a matrix matters, [out] (see ``sensitivity.measure``)."""
        values = self.arrays[f"layers.{key.layer}.{key.part}.sensitivity"]
        return values if key.expert < 0 else values[key.expert]

    def check_fits(self, checkpoint: Checkpoint) -> None:
        """Refuse statistics of another model; of an imatrix by others, only shapes are known.

        Raises:
            InputError: shapes or the source differ.
        """
        config, ids = checkpoint.config, self.arrays["tokens.ids"]
        expected = (config.layers, config.experts + 1)
        fits = tuple(self.counts.shape) == expected and all(
            self.arrays[f"layers.{layer}.{site}.second_moment"].shape[-1] == width
            for layer in range(config.layers)
            for site, width in widths(config).items()
        )
        if not self.moments_only:
            fits = fits and 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_rows
        model = self.facts.get("model")
        if model or not self.moments_only:
            fits = fits and model == identity(checkpoint)
        if not fits:
            raise InputError(
                "was made from another model (or another copy of it); calibrate this one",
                "calibration",
            )

    def write(self, path: Path) -> Stats:
        """Write the file, atomically; returns it with its digest."""
        data = self.serialise()
        write_whole(path, data)
        return Stats(self.arrays, self.facts, hashlib.sha256(data).hexdigest())

    def serialise(self) -> bytes:
        """The bytes of the file: the same for the same contents."""
        metadata = {
            "format": "zaya-convert calibration",
            "schema": SCHEMA,
            "facts": json.dumps(self.facts, sort_keys=True, ensure_ascii=False),
        }
        ordered = {name: self.arrays[name].contiguous() for name in sorted(self.arrays)}
        data = save(ordered, metadata)
        # The library writes metadata in random order.
        end = 8 + int.from_bytes(data[:8], "little")
        header = {**json.loads(data[8:end]), "__metadata__": metadata}
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw + data[end:]


def widths(config: ModelConfig) -> dict[str, int]:
    """Input channels of every site."""
    return {
        "qkv_proj": config.hidden,
        "o_proj": config.heads * config.head_dim,
        "gate_up_proj": config.hidden,
        "down_proj": config.expert_width,
    }


def read(path: Path) -> Stats:
    """Read a calibration file.

    Raises:
        InputError: not one, damaged, or of another version.
    """
    if not path.is_file():
        raise InputError("no such file; `zaya-convert calibrate` makes one", str(path))
    _, metadata = read_header(path)
    if metadata.get("format") != "zaya-convert calibration":
        raise InputError("is not a calibration file; `zaya-convert calibrate` makes one", path.name)
    if metadata.get("schema") != SCHEMA:
        raise InputError("was written by another version; calibrate again", path.name)
    data = path.read_bytes()
    try:
        facts = json.loads(metadata["facts"])
        arrays = load(data)
        stats = Stats(arrays, facts, hashlib.sha256(data).hexdigest())
        _check(stats)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"is damaged ({error})", path.name) from None
    return stats


def identity(checkpoint: Checkpoint) -> str:
    """What statistics remember of their model: a digest of names, shapes and a few bytes of each.

    Reading every weight would take longer than some calibrations. 64 bytes of each tensor tell
    models, and versions of one, apart; both layouts of a model have the same identity.
    """
    total = hashlib.sha256()
    for key, info in checkpoint.infos.items():
        total.update(f"{key} {info.dtype} {list(info.shape)}\n".encode())
        for chunk in checkpoint.first_bytes(key, 64):
            total.update(chunk)
    return total.hexdigest()


def _check(stats: Stats) -> None:
    """Shapes must agree with each other, figures must be finite."""
    layers, classes = stats.counts.shape
    lengths, ids = stats.arrays["tokens.lengths"], stats.arrays["tokens.ids"]
    if int(lengths.sum()) != len(ids) or bool((lengths < 1).any()) or not stats.min_tokens >= 0:
        raise ValueError("lengths do not add up")
    if not len(ids):
        raise ValueError("no tokens")
    if bool((stats.counts < 0).any()):
        raise ValueError("negative counts")
    for name in ("description", "tokens_digest", "model", "rounds", "not_finite"):
        _ = stats.facts[name]
    for layer in range(layers):
        for site in SITES:
            for kind in ("second_moment", "absmax"):
                array = stats.arrays[f"layers.{layer}.{site}.{kind}"]
                experts = site in EXPERT_SITES
                if array.ndim != 1 + experts or (experts and len(array) != classes - 1):
                    raise ValueError(f"{site} of layer {layer} has shape {list(array.shape)}")
                if not bool(torch.isfinite(array).all()) or bool((array < 0).any()):
                    raise ValueError(f"{site} of layer {layer} holds impossible figures")
