"""A training forward of ZAYA for CPU: the parameters of `ZayaForCausalLM`, tokens sorted by expert.

Written from the architecture, not from transformers' code, and checked against it
(`difference_from_transformers`). Matrix products may run in bf16, as autocast would; the residual
stream, the norms, the router and the loss stay in fp32. Padding goes on the right, where a causal
model never sees it from a real token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import ZayaConfig, ZayaForCausalLM

RUN_STEP = 32


class _SortedExperts(torch.autograd.Function):
    """The experts over runs of rows: expert e has rows `starts[e]` to `starts[e + 1]`.

    `order` lists the tokens that have an expert, `slots` the row each of them takes; runs are
    padded to a multiple of `RUN_STEP` rows, because the CPU's matrix library prepares a kernel for
    every new shape it meets.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        h: Tensor,
        gate_up: Tensor,
        down: Tensor,
        order: Tensor,
        slots: Tensor,
        starts: list[int],
    ) -> Tensor:
        x = h.new_zeros(starts[-1], h.shape[1])
        x[slots] = h[order]
        hidden = h.new_empty(starts[-1], gate_up.shape[1])
        for expert, (a, b) in enumerate(pairwise(starts)):
            torch.mm(x[a:b], gate_up[expert].t(), out=hidden[a:b])
        gate, up = hidden.chunk(2, dim=-1)
        activated = F.silu(gate) * up
        y = torch.empty_like(x)
        for expert, (a, b) in enumerate(pairwise(starts)):
            torch.mm(activated[a:b], down[expert].t(), out=y[a:b])
        ctx.save_for_backward(x, gate_up, down, hidden, order, slots)  # pyright: ignore
        ctx.starts, ctx.tokens = starts, h.shape[0]  # pyright: ignore
        return y[slots]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, gate_up, down, hidden, order, slots = ctx.saved_tensors
        spread = torch.zeros_like(x)
        spread[slots] = grad
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        activated = silu * up
        grad_activated, grad_x = torch.empty_like(activated), torch.empty_like(x)
        grad_down, grad_gate_up = torch.empty_like(down), torch.empty_like(gate_up)
        for expert, (a, b) in enumerate(pairwise(ctx.starts)):
            torch.mm(spread[a:b].t(), activated[a:b], out=grad_down[expert])
            torch.mm(spread[a:b], down[expert], out=grad_activated[a:b])
        grad_gate = grad_activated * up * (sigmoid + silu * (1 - sigmoid))
        grad_hidden = torch.cat([grad_gate, grad_activated * silu], dim=-1)
        for expert, (a, b) in enumerate(pairwise(ctx.starts)):
            torch.mm(grad_hidden[a:b].t(), x[a:b], out=grad_gate_up[expert])
            torch.mm(grad_hidden[a:b], gate_up[expert], out=grad_x[a:b])
        grad_h = grad.new_zeros(ctx.tokens, x.shape[1])
        grad_h[order] = grad_x[slots]
        return grad_h, grad_gate_up, grad_down, None, None, None


class FastForward:
    """The logits of `model` and the router's choices, through this module's own forward."""

    def __init__(self, model: ZayaForCausalLM, compute: torch.dtype = torch.float32) -> None:
        self.model = model
        self.config = cast(ZayaConfig, model.config)
        self.compute = compute
        self._rope: tuple[Tensor, Tensor] | None = None

    def __call__(self, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits [B, S, V]; a layer each, every token's class [B·S] (E is skip) and mean shares.

        The shares are the router's mean probabilities, which carry a gradient.
        """
        body = self.model.model
        x = F.embedding(ids, body.embed_tokens.weight)
        x = (x + body.input_hidden_states_bias) * body.input_hidden_states_scale
        router_state: Tensor | None = None
        choices: list[Tensor] = []
        shares: list[Tensor] = []
        for layer in cast(Any, body.layers):
            attended = self._attention(layer.self_attn, self._norm(layer.input_layernorm, x))
            x = _residual(layer.post_attention_residual_scale, attended, x)
            h = self._norm(layer.post_attention_layernorm, x)
            mixed, router_state, choice, share = self._moe(layer.mlp, h.flatten(0, 1), router_state)
            x = _residual(layer.post_mlp_residual_scale, mixed.view_as(x), x)
            choices.append(choice)
            shares.append(share)
        hidden = self._norm(body.norm, x)
        return self._linear(hidden, body.embed_tokens.weight).float(), choices, shares

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.to(self.compute), weight.to(self.compute))

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), cast(Tensor, norm.weight), self.config.rms_norm_eps)

    def _attention(self, attention: Any, h: Tensor) -> Tensor:
        cfg, cca = self.config, attention.qkv_proj
        batch, length, _ = h.shape
        nh, nkv, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        weight = torch.cat(
            [
                getattr(cca, n).weight
                for n in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")
            ]
        )
        projected = self._linear(h, weight).float()
        half = nkv * dim // 2
        qk, current, delayed = projected.split([(nh + nkv) * dim, half, half], dim=-1)
        q = qk[..., : nh * dim].view(batch, length, nkv, nh // nkv, dim)
        k = qk[..., nh * dim :].view(batch, length, nkv, 1, dim)
        q_mean = (q + k) * 0.5
        k_mean = q_mean.mean(dim=3)
        mixed = self._convolve(cca, qk).view(batch, length, nh + nkv, dim)
        q = mixed[:, :, :nh] + q_mean.flatten(2, 3)
        k = mixed[:, :, nh:] + k_mean
        q = F.normalize(q, dim=-1) * dim**0.5
        k = F.normalize(k, dim=-1) * (dim**0.5 * attention.qk_norm.temp[:, None])
        value = torch.cat([current, F.pad(delayed, (0, 0, 1, 0))[:, :-1]], dim=-1)
        value = value.view(batch, length, nkv, dim)
        q, k = self._rotate(q).transpose(1, 2), self._rotate(k).transpose(1, 2)
        # Batched products beat the CPU's fused attention at these lengths (see `RUN_STEP`).
        q = q.reshape(batch, nkv, -1, dim).to(self.compute)  # one kv head's query heads, stacked
        k = k.reshape(batch, nkv, length, dim).to(self.compute)
        value = value.transpose(1, 2).to(self.compute)
        scores = (q @ k.transpose(2, 3)).float().view(batch, nh, length, length) * dim**-0.5
        scores = scores + torch.full((length, length), -1e30).triu(1)
        weights = scores.softmax(dim=-1).to(self.compute).view(batch, nkv, -1, length)
        out = (weights @ value).view(batch, nh, length, dim)
        return self._linear(out.transpose(1, 2).flatten(2), attention.o_proj.weight).float()

    def _convolve(self, cca: Any, qk: Tensor) -> Tensor:
        """The depthwise, then the grouped causal convolution (both of width 2) over [B, S, c]."""
        batch, length, channels = qk.shape
        dim = self.config.head_dim
        padded = F.pad(qk, (0, 0, 2, 0))
        taps = cca.conv_qk_depthwise.weight[:, 0]
        depthwise = padded[:, :-1] * taps[:, 0] + padded[:, 1:] * taps[:, 1]
        depthwise = depthwise + cca.conv_qk_depthwise.bias
        groups = channels // dim
        pairs = torch.cat(
            [part.unflatten(-1, (groups, dim)) for part in (depthwise[:, :-1], depthwise[:, 1:])],
            -1,
        )
        kernel = cca.conv_qk_grouped.weight.view(groups, dim, dim, 2)
        kernel = kernel.permute(0, 3, 2, 1).reshape(groups, 2 * dim, dim)
        flat = pairs.flatten(0, 1).transpose(0, 1).to(self.compute)
        out = torch.bmm(flat, kernel.to(self.compute)).float()
        return out.transpose(0, 1).reshape(batch, length, channels) + cca.conv_qk_grouped.bias

    def _rotate(self, x: Tensor) -> Tensor:
        length, dim = x.shape[1], x.shape[-1]
        if self._rope is None or self._rope[0].shape[0] < length:
            rope = cast(dict[str, Any], self.config.rope_parameters)["hybrid"]
            rotary = int(dim * rope["partial_rotary_factor"])
            inverse = 1.0 / rope["rope_theta"] ** (torch.arange(0, rotary, 2).float() / rotary)
            angles = torch.arange(max(length, 640)).float()[:, None] * inverse
            self._rope = angles.cos()[:, None], angles.sin()[:, None]
        cos, sin = (part[:length] for part in self._rope)
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def _moe(
        self, mlp: Any, h: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate = mlp.gate
        router = self._linear(h, gate.down_proj.weight).float() + gate.down_proj.bias
        if state is not None:
            router = router + state * gate.router_states_scale
        layers = gate.router_mlp
        hidden = self._norm(layers.norm, router)
        for linear in (layers.fc1, layers.fc2):
            hidden = F.gelu(self._linear(hidden, linear.weight).float() + linear.bias)
        probabilities = self._linear(hidden, layers.out_proj.weight).float().softmax(dim=-1)
        choice = (probabilities.detach() + gate.balancing_biases).argmax(dim=-1)
        counts = torch.bincount(choice, minlength=self.config.num_experts + 1)
        padded = (counts[:-1] + RUN_STEP - 1) // RUN_STEP * RUN_STEP
        starts = F.pad(padded.cumsum(0), (1, 0))
        order = choice.argsort(stable=True)[: int(counts[:-1].sum())]  # skip sorts last: dropped
        chosen = choice[order]
        first = counts.cumsum(0) - counts
        slots = starts[chosen] + torch.arange(len(order)) - first[chosen]
        out = cast(
            Tensor,
            _SortedExperts.apply(
                h.to(self.compute),
                mlp.experts.gate_up_proj.to(self.compute),
                mlp.experts.down_proj.to(self.compute),
                order,
                slots,
                starts.tolist(),
            ),
        )
        weight = probabilities[order, chosen]
        mixed = torch.zeros_like(h).index_copy(0, order, out.float() * weight[:, None])
        return mixed, router, choice, probabilities.mean(dim=0)


def _residual(scale: Any, update: Tensor, x: Tensor) -> Tensor:
    x = (x + scale.residual_bias) * scale.residual_scale
    return x + (update + scale.hidden_states_bias) * scale.hidden_states_scale


@torch.no_grad()
def difference_from_transformers(model: ZayaForCausalLM, ids: Tensor) -> float:
    """The largest absolute difference of this module's fp32 logits from transformers' own."""
    ours, _, _ = FastForward(model)(ids)
    return float((ours - model(input_ids=ids).logits).abs().max())
