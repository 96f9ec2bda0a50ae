"""``Walk``: many sequences through the model, layer by layer, on weights that a visitor chooses.

Calibration needs what every matrix receives, and quantization on the quantized prefix must be able
to change a matrix *between* seeing its inputs and computing its outputs. So a layer is run site by
site, and at each site the visitor is shown the inputs and returns the matrices to go on with::

    qkv_proj → attention → o_proj → residual → router
    → for each expert: gate_up_proj → down_proj → residual

Optionally the float model runs beside it (``reference``), so that the visitor sees how far the
inputs have drifted. Rows of the skip expert reach no site.

Work is cut into pieces whose shapes depend on the data alone, and torch runs one thread a piece, so
the result is the same bits for any number of threads. Weights are read when their layer runs.
What is kept from layer to layer is the residual stream, [tokens, d] in fp32, and the router's state
[tokens, R]; larger ones than the memory budget live in mapped files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import InputError
from zaya_convert.layout import EXPERT_PARTS, QKV_PARTS, TensorKey
from zaya_convert.runtime.attention import Batch, attend, project
from zaya_convert.runtime.model import residual
from zaya_convert.runtime.router import rms_norm, route
from zaya_convert.runtime.weights import Parts, Weights, kernel
from zaya_convert.threads import Threads, one_thread_each
from zaya_kernels.request import Request

ROWS = 2048  # rows of a piece of work that may be cut anywhere
POOLED = 1024  # rows of the pooled sample

SITES: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": QKV_PARTS,
    "o_proj": ("self_attn.o_proj.weight",),
    "gate_up_proj": EXPERT_PARTS[:2],
    "down_proj": EXPERT_PARTS[2:],
}
SITE_OF = {part: site for site, parts in SITES.items() for part in parts}


@dataclass(frozen=True, slots=True)
class Site:
    """Matrices that receive the same inputs; ``expert`` is -1 in attention."""

    layer: int
    name: str
    expert: int = -1

    @property
    def keys(self) -> tuple[TensorKey, ...]:
        """Its matrices."""
        return tuple(TensorKey(self.layer, part, self.expert) for part in SITES[self.name])


class Rows(NamedTuple):
    """Some rows that a site receives.

    Attributes:
        inputs: [m, in] fp32.
        reference: the same in the float model, [m, in]; None when it does not run. A row that the
            float model sends elsewhere stands here as it is in ``inputs``.
        weights: [m], how much the model makes of each row (an expert's output is multiplied by the
            router's probability); None: all alike.
    """

    inputs: Tensor
    reference: Tensor | None = None
    weights: Tensor | None = None


# Applies a function to each of some things, in order, perhaps side by side.
Spread = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

# Pieces of a site's rows: each is computed when its function is called, any number of times.
Pieces = Sequence[Callable[[], Rows]]


class Matrices(NamedTuple):
    """Of a site's matrices [out, in], fp32: those of the float model, and those to go on with."""

    original: tuple[Tensor, ...]
    used: tuple[Tensor, ...]

    @property
    def by_lane(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The visited model's, then the float model's."""
        return self.used, self.original


class Visitor(Protocol):
    """What is done at each site."""

    def visit(self, site: Site, pieces: Pieces, pooled: Pieces, spread: Spread) -> Matrices:
        """Look at a site's inputs and choose its matrices.

        Experts are visited from several threads at once, each expert from one.

        Args:
            pieces: what the site receives; empty for an expert without tokens.
            pooled: for experts, a sample of what all experts of the layer receive (for
                ``down_proj``: of what this expert would make of that); empty for attention.
            spread: ``map``, over the cores where that is free.
        """
        ...


class Lane:
    """One model's state in front of a layer: the residual stream and the router's state."""

    def __init__(self, x: Tensor, width: int, place: Callable[[str, tuple[int, int]], Tensor]):
        self.x = x
        self.state = place("state", (len(x), width))
        self.choice = torch.zeros(len(x), dtype=torch.int32)
        self.weight = torch.zeros(len(x))


class Walk:
    """Sequences on their way through a checkpoint's layers.

    Args:
        checkpoint: the float model.
        sequences: token ids [T] each.
        reference: also run the float model beside the visited one.
        threads: pieces in work at once; never changes a bit of the result.
        folder: where mapped files go when ``max_memory`` is too small for the streams.
        max_memory: bytes that streams may take in memory; None: all they need.

    Attributes:
        layer: the next layer to run.
        spans: where each sequence lies among all tokens.
        routes: the classes chosen in the layers that were run, int32 [tokens] each; E = skip.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sequences: Sequence[Tensor],
        *,
        reference: bool = False,
        threads: int = 1,
        folder: Path | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.checkpoint, self.config = checkpoint, checkpoint.config
        self.threads, self._folder = threads, folder
        self._weights = Weights(checkpoint, torch.float32, torch.float32, resident=False)
        self.spans = _spans(sequences)
        self._linear = kernel("linear", Request(torch.float32)).body
        self.layer = 0
        self.routes: list[Tensor] = []
        ids = torch.cat(list(sequences))
        self._digest = _digest(ids, self.spans)
        lanes = 2 if reference else 1
        # x and mixed of each lane, and the state of its router
        config = self.config
        widths = config.hidden + config.heads * config.head_dim + config.router_width
        needed = 4 * len(ids) * widths * lanes
        self._mapped = max_memory is not None and needed > max_memory and folder is not None
        embedded = self._embed(ids)
        self._lanes = []
        for name in ("visited", "reference")[:lanes]:
            x = self._place(f"{name}-x", (len(ids), config.hidden))
            x.copy_(embedded)
            self._lanes.append(
                Lane(x, config.router_width, lambda n, s, name=name: self._place(f"{name}-{n}", s))
            )

    @property
    def tokens(self) -> int:
        """Tokens in all sequences."""
        return self.spans[-1].stop

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """The visited model's residual stream [n, d] and router state [n, R] before ``layer``."""
        return self._lanes[0].x, self._lanes[0].state

    @torch.no_grad()
    def step(self, visitor: Visitor) -> None:
        """Run the next layer.

        Raises:
            InputError: more than 1 % of the rows are not finite any more.
        """
        parts = self._weights.small_parts(self.layer)
        with one_thread_each(), Threads(self.threads) as pool:
            self._attention(parts, visitor, pool)
            self._router(parts, pool)
            self._experts(parts, visitor, pool)
        self.routes.append(self._lanes[0].choice.clone())
        self.layer += 1

    def save(self, folder: Path) -> None:
        """Write the state in front of the next layer to ``folder``, atomically."""
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for index, lane in enumerate(self._lanes):
            np.save(new / f"x{index}.npy", lane.x.numpy())
            np.save(new / f"state{index}.npy", lane.state.numpy())
        routes = torch.stack(self.routes) if self.routes else torch.zeros(0, self.tokens)
        np.save(new / "routes.npy", routes.int().numpy())
        (new / "walk.json").write_text(json.dumps({"layer": self.layer, "sequences": self._digest}))
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)

    def restore(self, folder: Path, accept: Callable[[int], bool] = lambda layer: True) -> bool:
        """Continue from what ``save`` wrote; False, and nothing changed, when that does not fit.

        Args:
            accept: told the layer that would be next, whether to continue there.
        """
        try:
            facts = json.loads((folder / "walk.json").read_text())
            layer, fits = int(facts["layer"]), facts["sequences"] == self._digest
            arrays = [
                (np.load(folder / f"x{i}.npy"), np.load(folder / f"state{i}.npy"))
                for i in range(len(self._lanes))
            ]
            routes = np.load(folder / "routes.npy")
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            return False
        for lane, (x, state) in zip(self._lanes, arrays, strict=True):
            fits &= (x.shape, state.shape) == (tuple(lane.x.shape), tuple(lane.state.shape))
        if not fits or routes.shape != (layer, self.tokens) or not accept(layer):
            return False
        for lane, (x, state) in zip(self._lanes, arrays, strict=True):
            lane.x.copy_(torch.from_numpy(x))
            lane.state.copy_(torch.from_numpy(state))
        self.routes = list(torch.from_numpy(routes))
        self.layer = layer
        return True

    # ---- the parts of a layer ---------------------------------------------------------------

    def _attention(self, parts: Parts, visitor: Visitor, pool: Threads) -> None:
        eps, norm = self.config.eps, parts["input_layernorm.weight"]

        def normed(lane: Lane, span: slice) -> Tensor:
            return rms_norm(lane.x[span], norm, eps)

        site = Site(self.layer, "qkv_proj")
        chosen = visitor.visit(site, self._pieces(normed), (), pool.map)
        width = self.config.heads * self.config.head_dim
        mixed = [self._place(f"mixed{i}", (self.tokens, width)) for i in range(len(self._lanes))]
        for lane, out, matrices in zip(self._lanes, mixed, chosen.by_lane, strict=False):
            own = {**parts, **_named(site, matrices)}

            def mix(span: slice, lane: Lane = lane, out: Tensor = out, own: Parts = own) -> None:
                batch = Batch(
                    self.config, (1, span.stop - span.start), torch.float32, torch.float32
                )
                h = normed(lane, span)[None]
                out[span] = attend(h, own, self.layer, batch, self._linear)[1][0]

            list(pool.map(mix, self.spans))
        by_lane = {id(lane): out for lane, out in zip(self._lanes, mixed, strict=True)}
        site = Site(self.layer, "o_proj")
        pieces = self._pieces(lambda lane, span: by_lane[id(lane)][span])
        chosen = visitor.visit(site, pieces, (), pool.map)
        for lane, out, matrices in zip(self._lanes, mixed, chosen.by_lane, strict=False):
            own = {**parts, **_named(site, matrices)}

            def add(span: slice, lane: Lane = lane, out: Tensor = out, own: Parts = own) -> None:
                update = project(out[span], own, "self_attn.o_proj", self._linear)
                lane.x[span] = residual(lane.x[span], update, own, "post_attention_residual_scale")

            list(pool.map(add, self.spans))

    def _router(self, parts: Parts, pool: Threads) -> None:
        norm, eps = parts["post_attention_layernorm.weight"], self.config.eps
        for lane in self._lanes:

            def choose(span: slice, lane: Lane = lane) -> None:
                h = rms_norm(lane.x[span], norm, eps)
                before = lane.state[span] if self.layer else None
                routing = route(h, parts, before, eps, self._linear)
                lane.choice[span] = routing.choice.int()
                lane.weight[span] = routing.weight
                lane.state[span] = routing.state

            list(pool.map(choose, _cut(self.tokens)))

    def _experts(self, parts: Parts, visitor: Visitor, pool: Threads) -> None:
        norm, eps = parts["post_attention_layernorm.weight"], self.config.eps
        updates = [torch.zeros_like(lane.x) for lane in self._lanes]
        sample = self._sample()

        def normed(lane: Lane, rows: Tensor) -> Tensor:
            return rms_norm(lane.x[rows], norm, eps)

        def run(expert: int) -> None:
            self._expert(expert, normed, sample, updates, visitor)

        list(pool.map(run, range(self.config.experts)))
        for lane, update in zip(self._lanes, updates, strict=True):

            def add(span: slice, lane: Lane = lane, update: Tensor = update) -> None:
                lane.x[span] = residual(
                    lane.x[span], update[span], parts, "post_mlp_residual_scale"
                )

            list(pool.map(add, _cut(self.tokens)))

    def _expert(
        self,
        expert: int,
        normed: Callable[[Lane, Tensor], Tensor],
        sample: Tensor,
        updates: list[Tensor],
        visitor: Visitor,
    ) -> None:
        lanes = self._lanes
        linear = self._linear
        own = [(lane.choice == expert).nonzero().squeeze(1) for lane in lanes]
        rows = own[0]
        weights = lanes[0].weight[rows].square()
        pool_rows = normed(lanes[0], sample)
        site = Site(self.layer, "gate_up_proj", expert)
        inputs = [normed(lane, mine) for lane, mine in zip(lanes, own, strict=True)]
        shared = _shared_rows(own) if len(lanes) > 1 else None
        chosen = visitor.visit(
            site,
            _rows_of(inputs, shared, weights),
            [lambda: Rows(pool_rows)],
            map,
        )
        hidden = [
            F.silu(linear(x, gate)) * linear(x, up)
            for x, (gate, up) in zip(inputs, chosen.by_lane, strict=False)
        ]
        gate, up = chosen.used

        def pooled_hidden() -> Rows:
            return Rows(F.silu(linear(pool_rows, gate)) * linear(pool_rows, up))

        site = Site(self.layer, "down_proj", expert)
        chosen = visitor.visit(site, _rows_of(hidden, shared, weights), [pooled_hidden], map)
        for lane, mine, h, (down,), update in zip(
            lanes, own, hidden, chosen.by_lane, updates, strict=False
        ):
            update[mine] = linear(h, down) * lane.weight[mine, None]

    # ---- pieces and places ------------------------------------------------------------------

    def _pieces(self, rows: Callable[[Lane, slice], Tensor]) -> Pieces:
        """What attention's sites receive, one piece a sequence."""

        def piece(span: slice) -> Callable[[], Rows]:
            def compute() -> Rows:
                found = [rows(lane, span) for lane in self._lanes]
                return Rows(found[0], found[1] if len(found) > 1 else None)

            return compute

        return [piece(span) for span in self.spans]

    def _sample(self) -> Tensor:
        """Evenly spaced tokens of this layer that reach an expert: its pooled inputs."""
        reached = (self._lanes[0].choice < self.config.experts).nonzero().squeeze(1)
        if len(reached) <= POOLED:
            return reached
        return reached[torch.linspace(0, len(reached) - 1, POOLED).long()]

    def _embed(self, ids: Tensor) -> Tensor:
        bias = self._weights.vector("input_hidden_states_bias")
        scale = self._weights.vector("input_hidden_states_scale")
        assert bias is not None
        assert scale is not None
        return ((self._weights.embed(ids) + bias) * scale).float()

    def _place(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Zeros in memory, or in a mapped file when memory is short."""
        if not self._mapped:
            return torch.zeros(shape)
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{name}.stream"
        return torch.from_numpy(np.memmap(path, np.float32, "w+", shape=shape))


def finite_rows(rows: Rows) -> tuple[Rows, int]:
    """Rows without those that hold NaN or infinity, and how many those were."""
    good = torch.isfinite(rows.inputs).all(dim=1)
    if rows.reference is not None:
        good &= torch.isfinite(rows.reference).all(dim=1)
    if bool(good.all()):
        return rows, 0
    kept = Rows(*(None if part is None else part[good] for part in rows))  # type: ignore[arg-type]
    return kept, int((~good).sum())


def check_finite_share(bad: int, rows: int, where: str) -> None:
    """Refuse inputs of which more than 1 % are not finite.

    Raises:
        InputError: naming the site.
    """
    if bad > 0.01 * rows:
        raise InputError(
            f"{bad} of {rows} calibration rows are not finite; the model is broken before here",
            where,
        )


def _rows_of(values: list[Tensor], shared: tuple[Tensor, Tensor] | None, weights: Tensor) -> Pieces:
    """An expert's rows in one piece; where both models chose it, beside the reference's."""
    inputs = values[0]
    if not len(inputs):
        return ()
    if shared is None:
        return [lambda: Rows(inputs, None, weights)]
    here, there = shared

    def compute() -> Rows:
        reference = inputs.clone()
        reference[here] = values[1][there]
        return Rows(inputs, reference, weights)

    return [compute]


def _shared_rows(own: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Positions, in either list of ascending token numbers, of tokens that stand in both."""
    where = torch.searchsorted(own[1], own[0])
    where = where.clamp_max(max(len(own[1]) - 1, 0))
    if not len(own[1]):
        return own[0][:0], own[0][:0]
    same = own[1][where] == own[0]
    return same.nonzero().squeeze(1), where[same]


def _named(site: Site, matrices: Iterable[Tensor]) -> dict[str, Tensor]:
    return dict(zip(SITES[site.name], matrices, strict=True))


def _spans(sequences: Sequence[Tensor]) -> list[slice]:
    """Where each sequence lies among all tokens."""
    spans, start = [], 0
    for sequence in sequences:
        spans.append(slice(start, start + len(sequence)))
        start += len(sequence)
    return spans


def _digest(ids: Tensor, spans: Sequence[slice]) -> str:
    """sha256 over sequences of token ids."""
    total = hashlib.sha256(json.dumps([span.stop for span in spans]).encode())
    total.update(ids.long().numpy().tobytes())
    return total.hexdigest()


def _cut(tokens: int) -> list[slice]:
    return [slice(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS)]
