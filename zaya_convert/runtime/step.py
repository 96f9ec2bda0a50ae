"""The native decode step: a model's weights and a ``Cache`` as ``zaya_kernels.decode`` sees them.

The states stay where ``Cache`` keeps them, in the same form, so that torch and the native step can
take turns on one cache.
"""

from __future__ import annotations

import os
from dataclasses import fields

import torch
from torch import Tensor

from zaya_convert.config import ModelConfig
from zaya_convert.runtime.cache import Cache
from zaya_convert.runtime.weights import Weights
from zaya_kernels.decode import Shape, States, Step
from zaya_kernels.table import ENVIRONMENT


def refusal() -> str:
    """Why no model may take the native step, or ""."""
    forced = os.environ.get(ENVIRONMENT, "")
    return "" if forced in ("", "native", "native_fast") else f"{ENVIRONMENT}={forced}"


class NativeStep:
    """A model's decode step in one native call.

    It reads every weight that has not been read yet.

    Raises:
        ValueError: the native step cannot compute it, and why.
    """

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype) -> None:
        layers = [weights.layer(i) for i in range(config.layers)]
        experts = [
            [weights.expert(i, e) for e in range(config.experts)] for i in range(config.layers)
        ]
        norm = weights.vector("norm.weight")
        assert norm is not None
        head = weights.packed_head()
        if head is None:
            ((_, head),) = weights.head_blocks()
        self._config, self._dtype = config, dtype
        bias = weights.vector("lm_head.bias")
        shape = Shape(**{field.name: getattr(config, field.name) for field in fields(Shape)})
        self._step = Step(shape, dtype, layers, experts, norm, head, bias)
        self._before = [
            parts.get("self_attn.qkv_proj.v_proj_delayed.bias") for parts in layers
        ]  # the delayed row where there is no token before

    def __call__(
        self, x: Tensor, cache: Cache, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advance every sequence of ``cache`` by a token.

        Args:
            x: [B, d] fp32, the residual stream at the start.
            valid: [B, cached + 1] booleans, False for padding; None when nothing is padded.

        Returns:
            Logits [B, V] fp32, the chosen classes [L, B] and their probabilities.
        """
        states = self._states(cache, len(x))
        result = self._step(x, states, cache.length, valid)
        for layer in cache.keys_values:
            layer.end += 1
        cache.length, cache.valid = cache.length + 1, valid
        return result

    def _states(self, cache: Cache, batch: int) -> list[States]:
        """Every layer's states, contiguous and with room for one more column."""
        config = self._config
        like = torch.empty(batch, config.kv_heads, 1, config.head_dim, dtype=self._dtype)
        channels = (config.heads + config.kv_heads) * config.head_dim
        states: list[States] = []
        for i, layer in enumerate(cache.keys_values):
            layer.buffer = layer.reserve(like).contiguous()
            columns, delayed = cache.conv[i], cache.delayed[i]
            if columns is None:
                columns = like.new_zeros(batch, channels, sum(config.conv_taps) - 2)
            if delayed is None:
                delayed = like.new_zeros(batch, config.kv_heads * config.head_dim // 2)
                bias = self._before[i]
                delayed = delayed if bias is None else delayed + bias
            columns, delayed = columns.contiguous(), delayed.contiguous()
            cache.conv[i], cache.delayed[i] = columns, delayed
            states.append(States(layer.buffer, layer.start, layer.end, columns, delayed))
        return states
