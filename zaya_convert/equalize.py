"""Exact equivalent scaling: make channels alike before rounding, where ZAYA1 allows it for free.

Multiplying one matrix's output channels by powers of two and dividing the inputs of what follows
by them changes no bit of the float model's function, but spreads the weights of one group more
evenly. Three places take no extra operation:

* an expert's ``up`` rows ↔ its ``down`` columns (``silu(gate x) * (up x)`` is linear in up);
* ``v`` rows ↔ ``o`` columns (attention only averages values; a row of a kv head meets the columns
  of every query head of its group);
* a norm's weight ↔ everything that reads it: q, k and v behind ``input_layernorm``; gates and ups
  of all experts *and the router's down projection*, which stays a float, behind
  ``post_attention_layernorm``.

A channel whose inputs have root mean square r gets ``2^round(strength · log2(r / geometric mean))``
(SmoothQuant's and AWQ's rule, arXiv 2211.10438 and 2306.00978, at powers of two so that float
tensors stay exact). The strength is chosen from ``STRENGTHS`` for each place by the weighted
rounding error of the matrices that gain, 0 included, so a place where it does not help is left.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.layout import TensorKey
from zaya_convert.recipe import Recipe
from zaya_convert.runtime.walk import SITES
from zaya_convert.stats import Stats
from zaya_quant.methods import method
from zaya_quant.spec import Spec
from zaya_quant.stats import InputStats

NAME = "equalization.npz"
STRENGTHS = (0.0, 0.25, 0.5)
_LIMIT = 4  # powers of two either way: nothing comes near the limits of bf16

_GATE, _UP = SITES["gate_up_proj"]
(_DOWN,) = SITES["down_proj"]
(_O,) = SITES["o_proj"]
_QKV = SITES["qkv_proj"]
_VALUES = _QKV[2:]
_ROUTER = "mlp.gate.down_proj.weight"
_NORMS = {"qkv_proj": "input_layernorm.weight", "gate_up_proj": "post_attention_layernorm.weight"}


@dataclass
class PowersOfTwo:
    """Exponents of a tensor's rows [out] and columns [in], int8; a vector has rows only."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, value: Any) -> Tensor:
        """The tensor times 2^rows and 2^columns, in its dtype.

        Raises:
            InputError: a value leaves the dtype's range.
        """
        assert isinstance(value, Tensor)
        result = value.float()
        if self.rows is not None:
            factor = torch.exp2(self.rows.float())
            result = result * (factor[:, None] if value.ndim == 2 else factor)
        if self.columns is not None:
            result = result * torch.exp2(self.columns.float())
        narrow = result.to(value.dtype)
        if not torch.equal(narrow.float(), result):
            raise InputError("a power of two does not fit the dtype; do without --equalize")
        return narrow

    def of_moments(self, moments: Tensor) -> Tensor:
        """Second moments [in] of the inputs, which shrink as the columns grow."""
        return moments if self.columns is None else moments * torch.exp2(-2 * self.columns.float())

    def add(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        """Multiply once more."""
        if rows is not None:
            self.rows = rows if self.rows is None else self.rows + rows
        if columns is not None:
            self.columns = columns if self.columns is None else self.columns + columns


Scalings = dict[TensorKey, PowersOfTwo]


def equalized(checkpoint: Checkpoint, recipe: Recipe, stats: Stats) -> Checkpoint:
    """The same function, with channels made alike where that lowers the rounding error.

    Args:
        recipe: on whose grids errors are judged; places that it leaves float are left.
        stats: second moments of the inputs.
    """
    scalings: Scalings = {}
    work = _Work(checkpoint, recipe, stats, scalings)
    for layer in range(checkpoint.config.layers):
        work.norm(layer, "qkv_proj")
        work.values(layer)
        work.norm(layer, "gate_up_proj")
        for expert in range(checkpoint.config.experts):
            work.hidden(layer, expert)
    return replace(checkpoint, scaling=scalings)


def with_scaling(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A reference as the artifact in ``folder`` scaled it; itself if that did not.

    Raises:
        InputError: the artifact's file is damaged.
    """
    if not (folder / NAME).is_file():
        return checkpoint
    try:
        with np.load(folder / NAME, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError) as error:
        raise InputError(f"is damaged ({error})", NAME) from None
    scalings = {
        key: PowersOfTwo(found.get(f"{key}:rows"), found.get(f"{key}:columns"))
        for key in checkpoint.infos
        if f"{key}:rows" in found or f"{key}:columns" in found
    }
    return replace(checkpoint, scaling=scalings)


def serialise(scaling: Mapping[TensorKey, Any]) -> bytes:
    """The file that an artifact keeps: exponents by tensor."""
    arrays = {}
    for key, powers in scaling.items():
        for kind in ("rows", "columns"):
            value = getattr(powers, kind)
            if value is not None:
                arrays[f"{key}:{kind}"] = value.to(torch.int8).numpy()
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


@dataclass
class _Work:
    checkpoint: Checkpoint
    recipe: Recipe
    stats: Stats
    scalings: Scalings

    def hidden(self, layer: int, expert: int) -> None:
        """An expert's up rows and down columns."""
        up, down = TensorKey(layer, _UP, expert), TensorKey(layer, _DOWN, expert)
        moments = self.stats.of(layer, _DOWN, expert)
        if moments is None:
            return
        powers = self._best(moments.second_moment, [down])
        if powers is not None:
            self._scale(up, rows=-powers)
            self._scale(down, columns=powers)

    def values(self, layer: int) -> None:
        """v rows and o columns: column i of every query head of a group meets one row."""
        config = self.checkpoint.config
        groups, dim = config.kv_heads, config.head_dim
        moments = self.stats.of(layer, _O, -1)
        assert moments is not None
        shape = (groups, config.heads // groups, dim)
        by_row = moments.second_moment.view(shape).mean(1).flatten()

        def spread(rows: Tensor) -> Tensor:
            return rows.view(groups, 1, dim).expand(shape).flatten()

        powers = self._best(by_row, [TensorKey(layer, _O)], spread)
        if powers is None:
            return
        self._scale(TensorKey(layer, _O), columns=spread(powers))
        half = len(powers) // 2
        for part, rows in zip(_VALUES, (powers[:half], powers[half:]), strict=True):
            self._scale(TensorKey(layer, part), rows=-rows)
            bias = TensorKey(layer, part.replace(".weight", ".bias"))
            if bias in self.checkpoint.infos:
                self._scale(bias, rows=-rows)

    def norm(self, layer: int, site: str) -> None:
        """A norm's weight and all that reads it."""
        experts = range(self.checkpoint.config.experts) if site == "gate_up_proj" else (-1,)
        readers = [TensorKey(layer, part, e) for e in experts for part in SITES[site]]
        counts = self.stats.counts[layer, :-1].float()
        moments = self.stats.arrays[f"layers.{layer}.{site}.second_moment"]
        if site == "gate_up_proj":
            moments = (moments * counts[:, None]).sum(0) / counts.sum().clamp_min(1)
        # Judged on a few experts: the norm is one for all of them.
        powers = self._best(moments, readers[:8])
        if powers is None:
            return
        self._scale(TensorKey(layer, _NORMS[site]), rows=-powers)
        for key in readers:
            self._scale(key, columns=powers)
        if site == "gate_up_proj":
            self._scale(TensorKey(layer, _ROUTER), columns=powers)

    def _best(
        self,
        moments: Tensor,
        readers: Sequence[TensorKey],
        spread: Callable[[Tensor], Tensor] = lambda powers: powers,
    ) -> Tensor | None:
        """The exponents with the least rounding error of ``readers``; None for no change."""
        rules = [self.recipe.rule_for(key) for key in readers]
        if not all(rules):
            return None
        weights = [self.checkpoint.read_float(key, torch.float32) for key in readers]
        found: list[tuple[float, int, Tensor]] = []
        for index, strength in enumerate(STRENGTHS):
            powers = _exponents(moments, strength)
            columns = spread(powers)
            seen = spread(moments) * torch.exp2(-2 * columns.float())
            error = sum(
                _error(w * torch.exp2(columns.float()), rule.spec, seen)
                for w, rule in zip(weights, rules, strict=True)
                if rule is not None and rule.spec is not None
            )
            found.append((float(error), index, powers))
        _, index, powers = min(found, key=lambda entry: entry[:2])
        return powers if index and bool(powers.any()) else None

    def _scale(
        self, key: TensorKey, rows: Tensor | None = None, columns: Tensor | None = None
    ) -> None:
        self.scalings.setdefault(key, PowersOfTwo()).add(rows, columns)


def _exponents(moments: Tensor, strength: float) -> Tensor:
    """int8 exponents by which matrix columns grow and their inputs shrink."""
    size = moments.double().clamp_min(float(moments.max()) * 1e-12 + 1e-30).sqrt().log2()
    powers = torch.round(strength * (size - size.mean())).clamp(-_LIMIT, _LIMIT)
    return powers.to(torch.int8)


def _error(weight: Tensor, spec: Spec, moments: Tensor) -> float:
    """Weighted squared error of rounding to nearest."""
    value = method("imatrix")(weight, spec, InputStats(1, moments)).dequantize()
    return float((weight - value).square().sum(0).double() @ moments.double())
