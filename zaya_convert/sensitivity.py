"""How much each output of each matrix matters: squared gradients of the float model's own loss.

If a matrix's output at token t is off by a small d_t, the KL divergence of the model grows by
about ``1/2 · (g_t · d_t)^2``, g_t being the gradient there of -log p(y) with y drawn from the
model's own distribution (the Fisher information as the second derivative of KL). With a weight
error E on inputs whose channels have second moments m, and taking outputs and channels as
uncorrelated::

    KL ≈ 1/2 · sum_j w_j · sum_c E_jc^2 · m_c        w_j = mean over all tokens of g_tj^2

``measure`` finds the w_j. Tokens that reach an expert alone have gradients there, so an expert that
is rarely used weighs little by itself. What the formula leaves out is tokens that change experts.

The backward pass goes layer by layer over stored residual streams, so memory is that of one layer
and a bf16 copy of the streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.data import take
from zaya_convert.runtime.attention import Batch, attend, project
from zaya_convert.runtime.model import residual
from zaya_convert.runtime.router import rms_norm, route
from zaya_convert.runtime.walk import SITES, Matrices, Pieces, Site, Spread, Walk
from zaya_convert.runtime.weights import Parts, Weights
from zaya_convert.threads import Threads, one_thread_each
from zaya_kernels.reference import Expert

TOKENS = 4096  # of the calibration tokens, the first that many
_HEAD_ROWS = 256  # rows of logits held at once

Progress = Callable[[str, int, int], None]


def measure(
    checkpoint: Checkpoint,
    sequences: Sequence[Tensor],
    *,
    threads: int = 1,
    seed: int = 0,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Tensor]:
    """The w_j of every quantizable matrix, fp32.

    Returns:
        ``layers.i.PART.sensitivity`` → [out], or [E, out] for experts.
    """
    chosen, _ = take(sequences, TOKENS)
    layers = checkpoint.config.layers
    walk = Walk(checkpoint, chosen, threads=threads)
    streams: list[tuple[Tensor, Tensor]] = []
    reader = _Reader(checkpoint)
    while walk.layer < layers:
        streams.append(tuple(t.bfloat16() for t in walk.state))  # type: ignore[arg-type]
        walk.step(reader)
        progress("measuring sensitivity", walk.layer, 2 * layers)
    result: dict[str, Tensor] = {}
    with one_thread_each(), Threads(threads) as pool:
        backward = _Backward(checkpoint, walk.spans, pool)
        gradient = backward.of_head(walk.state[0], seed)
        carried: Tensor | None = None
        for layer in reversed(range(layers)):
            x, state = (t.float() for t in streams.pop())
            gradient, carried, found = backward.of_layer(layer, x, state, gradient, carried)
            for part, energy in found.items():
                result[f"layers.{layer}.{part}.sensitivity"] = (energy / walk.tokens).float()
            progress("measuring sensitivity", 2 * layers - layer, 2 * layers)
    return result


class _Reader:
    """The visitor that changes nothing."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def visit(self, site: Site, pieces: Pieces, pooled: Pieces, spread: Spread) -> Matrices:
        matrices = tuple(self.checkpoint.read_float(key, torch.float32) for key in site.keys)
        return Matrices(matrices, matrices)


class _Backward:
    """Gradients, from the head down."""

    def __init__(self, checkpoint: Checkpoint, spans: Sequence[slice], pool: Threads) -> None:
        self.config, self.spans, self.pool = checkpoint.config, spans, pool
        self.weights = Weights(checkpoint, torch.float32, torch.float32, resident=False)

    def of_head(self, x: Tensor, seed: int) -> Tensor:
        """Of -log p(y), y drawn from p, by the residual stream after the last layer [n, d]."""
        norm = self.weights.vector("norm.weight")
        bias = self.weights.vector("lm_head.bias")
        assert norm is not None
        generator = torch.Generator().manual_seed(seed)
        result = torch.empty_like(x)
        for rows in torch.arange(len(x)).split(_HEAD_ROWS):
            start = x[rows].requires_grad_()
            hidden = rms_norm(start, norm, self.config.eps)
            with torch.no_grad():
                logits = torch.cat(
                    [hidden @ block.t() for _, block in self.weights.head_blocks()], dim=1
                )
                p = torch.softmax(logits if bias is None else logits + bias, dim=1)
                drawn = torch.multinomial(p, 1, generator=generator)
                p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
                pull = torch.zeros_like(hidden)
                for first, block in self.weights.head_blocks():
                    pull += p[:, first : first + len(block)] @ block
            hidden.backward(pull)
            assert start.grad is not None
            result[rows] = start.grad
        return result

    def of_layer(
        self, layer: int, x: Tensor, state: Tensor, gradient: Tensor, carried: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Through one layer.

        Args:
            x: residual stream before it [n, d].
            state: router state before it [n, R]; not used by layer 0.
            gradient: by the residual stream after it [n, d].
            carried: by the router state after it, None after the last layer.

        Returns:
            Both gradients before it, and for each matrix the sum of squared gradients by output.
        """
        parts = self.weights.layer(layer)
        experts = [self.weights.expert(layer, e) for e in range(self.config.experts)]

        def run(span: slice) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
            own = x[span].requires_grad_()
            before = state[span].requires_grad_() if layer else None
            taps = _Taps(parts, self.config.experts)
            after, routed = self._forward(layer, parts, experts, own, before, taps)
            ends, pulls = [after], [gradient[span]]
            if carried is not None:
                ends.append(routed)
                pulls.append(carried[span])
            torch.autograd.backward(ends, pulls)
            assert own.grad is not None
            return own.grad, None if before is None else before.grad, taps.energies()

        found = list(self.pool.map(run, self.spans))
        total = found[0][2]
        for _, _, energies in found[1:]:
            for part, energy in energies.items():
                total[part] = total[part] + energy
        passed = [s if s is not None else torch.zeros_like(state[:0]) for _, s, _ in found]
        return torch.cat([g for g, _, _ in found]), torch.cat(passed) if layer else None, total

    def _forward(
        self,
        layer: int,
        parts: Parts,
        experts: Sequence[Expert],
        x: Tensor,
        before: Tensor | None,
        taps: _Taps,
    ) -> tuple[Tensor, Tensor]:
        """The layer as ``Model`` has it, in a form that autograd can follow."""
        config, eps = self.config, self.config.eps
        batch = Batch(config, (1, len(x)), torch.float32, torch.float32)
        h = rms_norm(x, parts["input_layernorm.weight"], eps)
        mixed = attend(h[None], parts, layer, batch, taps.linear)[1][0]
        update = project(mixed, parts, "self_attn.o_proj", taps.linear)
        x = residual(x, update, parts, "post_attention_residual_scale")
        h = rms_norm(x, parts["post_attention_layernorm.weight"], eps)
        routing = route(h, parts, before, eps, F.linear)
        out = torch.zeros_like(x)
        for expert in routing.choice.unique().tolist():
            if expert == config.experts:
                continue
            rows = (routing.choice == expert).nonzero().squeeze(1)
            outputs = taps.expert(h[rows], experts[expert], expert)
            out = out.index_put((rows,), outputs * routing.weight[rows, None])
        return residual(x, out, parts, "post_mlp_residual_scale"), routing.state


class _Taps:
    """Keeps the outputs of quantizable matrices, to read their gradients afterwards."""

    def __init__(self, parts: Parts, experts: int) -> None:
        names = (*SITES["qkv_proj"], *SITES["o_proj"])
        self._names = {id(parts[name]): name for name in names}
        self._experts = experts
        self._outputs: dict[tuple[str, int], Tensor] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``, remembered if the matrix is one of those."""
        y = F.linear(x, weight, bias)
        name = self._names.get(id(weight))
        return y if name is None else self._keep(name, -1, y)

    def expert(self, x: Tensor, matrices: Expert, index: int) -> Tensor:
        """One expert's output for its rows, before the router's weight."""
        gate_name, up_name = SITES["gate_up_proj"]
        (down_name,) = SITES["down_proj"]
        gate, up, down = (m for m in matrices if isinstance(m, Tensor))
        a = self._keep(gate_name, index, F.linear(x, gate))
        b = self._keep(up_name, index, F.linear(x, up))
        return self._keep(down_name, index, F.linear(F.silu(a) * b, down))

    def energies(self) -> dict[str, Tensor]:
        """Sums of squared gradients by output, float64: [out], or [E, out] for experts."""
        result: dict[str, Tensor] = {}
        for (name, index), output in self._outputs.items():
            assert output.grad is not None
            energy = output.grad.double().flatten(0, -2).square().sum(0)
            if index < 0:
                result[name] = energy
            else:
                result.setdefault(name, energy.new_zeros(self._experts, len(energy)))
                result[name][index] = energy
        return result

    def _keep(self, name: str, index: int, output: Tensor) -> Tensor:
        output.retain_grad()
        self._outputs[name, index] = output
        return output
