"""``Model``: the forward pass of ZAYA1 over a ``Checkpoint``.

The residual stream is a flat fp32 matrix [n, d] of all tokens in flight. Attention sees it as
blocks [B, T]; norms, router and experts do not care where a row belongs. So one loop over the
layers serves both a batch with a cache (``forward``) and many sequences at once, layer outermost,
each weight read once (``evaluate``).

fp32 is the oracle. By default it is *exact*: matrix products, attention and head lengths are
accumulated in fp64 and rounded to fp32, which hides the order of summation, so token by token,
chunks, batches and the whole prefill agree to the bit. bf16 computes what transformers' bf16 model
computes: weights and products in bf16, the residual stream in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.runtime.attention import Batch, attend, project
from zaya_convert.runtime.cache import Cache
from zaya_convert.runtime.inputs import check_block, check_sequences, full_mask
from zaya_convert.runtime.router import Routing, rms_norm, route
from zaya_convert.runtime.step import NativeStep, refusal
from zaya_convert.runtime.weights import Parts, Weights, kernel
from zaya_kernels import native
from zaya_kernels.reference import Expert
from zaya_kernels.request import TILES, Request

# (layer, site, rows [m, in], expert): what the projections of a site receive, padding left out.
# Sites: "qkv_proj", "o_proj" (expert -1); "gate_up_proj", "down_proj" (rows of that expert only;
# skipped rows are nobody's); "router" (the rows it scores, expert -1).
Observer = Callable[[int, str, Tensor, int], None]

PADDING = -1


@dataclass(frozen=True, slots=True)
class Output:
    """What ``forward`` returns.

    Attributes:
        logits: [B, T, V] fp32, or [B, 1, V] with ``last_only``.
        routes: [L, B, T] int32: the class chosen, E = skip, -1 = padding.
        weights: [L, B, T] fp32: the probability of that class.
    """

    logits: Tensor
    routes: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``evaluate`` returns.

    Attributes:
        hidden: of each sequence [T, d] after the final norm; ``Model.logits`` finishes it.
        routes: [L, tokens of all sequences] int32: the class chosen, E = skip.
        weights: [L, tokens of all sequences] fp32: the probability of that class.
    """

    hidden: list[Tensor]
    routes: Tensor
    weights: Tensor


class Model:
    """A checkpoint, runnable.

    Args:
        checkpoint: a source or an artifact; quantized tensors are dequantized when used.
        dtype: torch.float32 (the oracle) or torch.bfloat16.
        resident: keep weights in memory once read; otherwise read them for each pass.
        exact: accumulate fp32 in fp64 (about half the speed); bf16 is never exact.
        fast: compute with quantized matrices as they are, activations rounded to int8, where a
            kernel can; what is exact stays so. Single tokens then go through the native decode
            step, with fp32 between its products. For resident weights only.

    Attributes:
        step_refusal: why single tokens take the way of blocks, "" when nothing is known against
            the native decode step; the first of them tells.
    """

    name = "reference runtime"

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype = torch.float32,
        resident: bool = True,
        exact: bool = True,
        fast: bool = False,
    ) -> None:
        exact = exact and dtype == torch.float32
        self.config, self.dtype = checkpoint.config, dtype
        self.wide = torch.float64 if exact else dtype
        request = Request(dtype, exact=exact, fast=fast)
        self._linear = kernel("linear", request).body
        self._moe = kernel("moe_ffn", request).body
        self._observed_moe = kernel("moe_ffn", replace(request, observed=True)).body
        packing = request if fast and resident and not exact else None
        if packing is not None:
            self._linear = native.with_packed(self._linear)
            self._moe = kernel("moe_ffn", replace(request, layout=TILES)).body
        self.weights = Weights(checkpoint, dtype, self.wide, resident, packing)
        self.step_refusal = refusal() if packing else "for resident weights and fast kernels only"
        self._step: NativeStep | None = None

    def new_cache(self) -> Cache:
        """An empty cache; it takes the batch size of the first block it meets."""
        return Cache(self.config)

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        *,
        cache: Cache | None = None,
        mask: Tensor | None = None,
        last_only: bool = False,
        observer: Observer | None = None,
    ) -> Output:
        """Run a block of tokens, continuing from ``cache`` and advancing it.

        Args:
            ids: [B, T] token ids, T >= 1.
            mask: [B, cached + T] booleans, False for (left) padding. Without it new tokens are
                real and the cache remembers which earlier columns were not.
            last_only: logits of the last column only.

        Raises:
            InputError: an id outside the vocabulary, an empty block.
        """
        check_block(ids)
        if cache is not None and observer is None and ids.shape[1] == 1 and self._native_step():
            return self._advance(ids, cache, mask)
        batch = self._batch(ids, cache, mask)
        rows, routings = self._run(ids.flatten(), [batch], observer)
        hidden = rows.view(*ids.shape, -1)
        if last_only:
            hidden = hidden[:, -1:]
        if cache is not None:
            cache.length, cache.valid = batch.past + ids.shape[1], batch.valid
        logits = self.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        routes, weights = _stack(routings)
        shape = (self.config.layers, *ids.shape)
        return Output(logits, routes.view(shape), weights.view(shape))

    @torch.no_grad()
    def evaluate(
        self,
        sequences: Sequence[Tensor],
        progress: Callable[[int, int], None] | None = None,
        observer: Observer | None = None,
    ) -> Evaluation:
        """Run whole sequences, layer outermost, so that each weight is read once.

        Memory is a few fp32 matrices [all tokens, d]; cut a long evaluation into several calls.

        Args:
            sequences: token ids [T] each, T >= 1.
            progress: called with (layers done, layers).
        """
        check_sequences(sequences)
        batches = [Batch(self.config, (1, len(s)), self.dtype, self.wide) for s in sequences]
        rows, routings = self._run(torch.cat(list(sequences)), batches, observer, progress)
        routes, weights = _stack(routings)
        return Evaluation(list(rows.split([len(s) for s in sequences])), routes, weights)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The head: hidden states [n, d] → fp32 logits [n, V]; call it on chunks of many rows."""
        bias = self.weights.vector("lm_head.bias")
        packed = self.weights.packed_head()
        if packed is not None:
            return self._linear(hidden, packed, bias).float()
        out = torch.empty(len(hidden), self.config.vocab_rows)
        for start, block in self.weights.head_blocks():
            part = slice(start, start + len(block))
            out[:, part] = self._linear(hidden, block, None if bias is None else bias[part])
        return out

    def _native_step(self) -> NativeStep | None:
        """The native decode step, made for the first token that needs it, or None."""
        if self._step is None and not self.step_refusal:
            try:
                self._step = NativeStep(self.config, self.weights, self.dtype)
            except ValueError as error:
                self.step_refusal = str(error)
        return self._step

    def _advance(self, ids: Tensor, cache: Cache, mask: Tensor | None) -> Output:
        """``forward`` of one column [B, 1] by the native step."""
        assert self._step is not None
        valid = full_mask(ids, cache.length, cache.valid, mask)
        logits, routes, weights = self._step(self._embed(ids[:, 0]), cache, valid)
        return Output(logits[:, None], routes[..., None], weights[..., None])

    def _batch(self, ids: Tensor, cache: Cache | None, mask: Tensor | None) -> Batch:
        past = 0 if cache is None else cache.length
        mask = full_mask(ids, past, None if cache is None else cache.valid, mask)
        size, length = ids.shape
        return Batch(self.config, (size, length), self.dtype, self.wide, past, mask, cache)

    def _run(
        self,
        ids: Tensor,
        batches: Sequence[Batch],
        observer: Observer | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        """All layers over all rows; returns the normed rows [n, d] and each layer's routing."""
        x = self._embed(ids)
        real = _real_rows(batches)
        state: Tensor | None = None
        routings: list[Routing] = []
        for index in range(self.config.layers):
            parts = self.weights.layer(index)
            x = self._attention(x, parts, index, batches, observer)
            x, routing = self._experts(x, parts, index, state, real, observer)
            state = routing.state
            routings.append(replace(routing, state=state[:0]))  # only the next layer needs it
            if progress is not None:
                progress(index + 1, self.config.layers)
        norm = self.weights.vector("norm.weight")
        assert norm is not None
        return rms_norm(x.to(self.dtype), norm, self.config.eps), routings

    def _embed(self, ids: Tensor) -> Tensor:
        """The residual stream at the start: ``(embedding + bias) · scale`` [n, d], fp32."""
        bias = self.weights.vector("input_hidden_states_bias")
        scale = self.weights.vector("input_hidden_states_scale")
        assert bias is not None
        assert scale is not None
        return ((self.weights.embed(ids) + bias) * scale).float()

    def _attention(
        self,
        x: Tensor,
        parts: Parts,
        index: int,
        batches: Sequence[Batch],
        observer: Observer | None,
    ) -> Tensor:
        """Attention and its residual: blocks are cut out of the rows and put back."""
        h = rms_norm(x.to(self.dtype), parts["input_layernorm.weight"], self.config.eps)
        sizes = [batch.shape[0] * batch.shape[1] for batch in batches]
        blocks: list[Tensor] = []
        for rows, batch in zip(h.split(sizes), batches, strict=True):
            seen, mixed = attend(rows.view(*batch.shape, -1), parts, index, batch, self._linear)
            if observer is not None:
                valid = slice(None) if batch.new_valid is None else batch.new_valid.flatten()
                observer(index, "qkv_proj", seen.flatten(0, 1)[valid], -1)
                observer(index, "o_proj", mixed.flatten(0, 1)[valid], -1)
            blocks.append(project(mixed, parts, "self_attn.o_proj", self._linear).flatten(0, 1))
        return residual(x, torch.cat(blocks), parts, "post_attention_residual_scale")

    def _experts(
        self,
        x: Tensor,
        parts: Parts,
        index: int,
        state: Tensor | None,
        real: Tensor | None,
        observer: Observer | None,
    ) -> tuple[Tensor, Routing]:
        """Router, experts and their residual. Skipped rows and padding reach no expert."""
        h = rms_norm(x.to(self.dtype), parts["post_attention_layernorm.weight"], self.config.eps)
        routing = route(h, parts, state, self.config.eps, self._linear)
        if real is not None:
            routing = replace(routing, choice=routing.choice.masked_fill(~real, PADDING))
        ids = routing.choice.masked_fill(routing.choice == self.config.experts, -1)

        def fetch(expert: int) -> Expert:
            return self.weights.expert(index, expert)

        if observer is None:
            out = self._moe(h, ids, routing.weight, fetch)
        else:
            see = observer  # a name the closure below knows to be set

            def observe(expert: int, inputs: Tensor, hidden: Tensor) -> None:
                see(index, "gate_up_proj", inputs, expert)
                see(index, "down_proj", hidden, expert)

            see(index, "router", h if real is None else h[real], -1)
            out = self._observed_moe(h, ids, routing.weight, fetch, observe)
        return residual(x, out, parts, "post_mlp_residual_scale"), routing


def residual(x: Tensor, update: Tensor, parts: Parts, name: str) -> Tensor:
    """``(x + b_r)·s_r + (update + b_h)·s_h``: each branch is shifted, then scaled."""
    update = (update + parts[f"{name}.hidden_states_bias"]) * parts[f"{name}.hidden_states_scale"]
    return update + (x + parts[f"{name}.residual_bias"]) * parts[f"{name}.residual_scale"]


def _real_rows(batches: Sequence[Batch]) -> Tensor | None:
    """[n] booleans, False for padding; None when nothing is padded."""
    if all(batch.new_valid is None for batch in batches):
        return None
    return torch.cat(
        [
            torch.ones(batch.shape, dtype=torch.bool).flatten()
            if batch.new_valid is None
            else batch.new_valid.flatten()
            for batch in batches
        ]
    )


def _stack(routings: Sequence[Routing]) -> tuple[Tensor, Tensor]:
    """Choices [L, n] as int32 and their probabilities [L, n] as fp32."""
    choices = torch.stack([routing.choice for routing in routings]).int()
    return choices, torch.stack([routing.weight for routing in routings]).float()
