"""Compressed convolutional attention (CCA): projections, two causal convolutions, GQA.

Formulas: CCA paper (arXiv 2510.04476) as ZAYA1 uses it. Queries and keys are the sum of a
convolved path and a mean path; half of every value comes from the token before. Sums over many
terms run in ``Batch.wide``, everything else in the dtype of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from zaya_convert.config import ModelConfig
from zaya_convert.runtime.cache import Cache
from zaya_convert.runtime.weights import Parts

_QKV = "self_attn.qkv_proj."

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Batch:
    """A block of tokens [B, T] on its way through the layers, with what attention must know.

    Attributes:
        dtype: of the activations.
        wide: dtype of attention and of head lengths: float64 in the exact mode, where chunks and
            batches then give the same bits as the whole; otherwise ``dtype``.
        past: columns already in the cache.
        valid: [B, past + T] booleans, False for padding; None when nothing is padded.
        cache: states to continue and to update, or None for a block that stands alone.
    """

    config: ModelConfig
    shape: tuple[int, int]
    dtype: torch.dtype
    wide: torch.dtype
    past: int = 0
    valid: Tensor | None = None
    cache: Cache | None = None
    _rotations: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)

    @property
    def new_valid(self) -> Tensor | None:
        """Validity of this block's own tokens [B, T]."""
        return None if self.valid is None else self.valid[:, self.past :]

    def rotation(self, theta: float) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, 1, T, rotary_dim]; positions do not count left padding."""
        if theta not in self._rotations:
            if self.valid is None:
                positions = torch.arange(self.past, self.past + self.shape[1])[None]
            else:
                positions = (self.valid.cumsum(1) - 1).clamp_min(0)[:, self.past :]
            dim = self.config.rotary_dim
            frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
            angles = positions[:, None, :, None].float() * frequencies.repeat(2)
            self._rotations[theta] = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return self._rotations[theta]

    def mask(self, columns: int, window: int) -> Tensor | None:
        """Which of the last ``columns`` keys each query sees: [B or 1, 1, T, columns], or None.

        None means every key. A window counts the query's own token. Padding sees itself only, so
        that no row is empty (an empty softmax is NaN); nothing sees padding.
        """
        key = (columns, window)
        if key not in self._masks:
            total = self.past + self.shape[1]
            queries = torch.arange(self.past, total)[:, None]
            keys = torch.arange(total - columns, total)[None]
            seen = keys <= queries
            if window:
                seen &= keys > queries - window
            seen = seen[None]
            if self.valid is not None:
                seen = seen & self.valid[:, None, total - columns :] | (keys == queries)
            self._masks[key] = None if bool(seen.all()) else seen[:, None]
        return self._masks[key]


def attend(
    h: Tensor, parts: Parts, layer: int, batch: Batch, linear: Linear
) -> tuple[Tensor, Tensor]:
    """Attention of one layer before its output projection.

    Args:
        h: normalised hidden states [B, T, d].
        parts: the layer's tensors.
        layer: its index (which window, rotary base and states are its own).
        batch: the block that h belongs to; its cache is advanced.
        linear: the kernel of projections.

    Returns:
        What the projections received (h without padding) and what ``o_proj`` is to receive
        [B, T, nh·D].
    """
    config = batch.config
    if batch.new_valid is not None:
        h = h * batch.new_valid[..., None].to(h.dtype)
    query, key = _query_key(h, parts, layer, batch, linear)
    value = _value(h, parts, layer, batch, linear)
    temp = parts["self_attn.qk_norm.temp"]
    cos, sin = batch.rotation(config.rope_thetas[layer])
    query = _unit(query, batch.wide)
    key = _unit(key, batch.wide) * temp[:, None]
    query = _rotate(query.transpose(1, 2), cos, sin).to(batch.wide)
    key = _rotate(key.transpose(1, 2), cos, sin).to(batch.wide)
    value = value.transpose(1, 2).to(batch.wide)
    if batch.cache is not None:
        key, value = batch.cache.keys_values[layer].append(key, value)
    mask = batch.mask(key.shape[2], config.windows[layer])
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=config.head_dim**-0.5, enable_gqa=True
    )
    return h, out.transpose(1, 2).flatten(2).to(batch.dtype)


def project(x: Tensor, parts: Parts, name: str, linear: Linear) -> Tensor:
    """The linear layer ``name``, with its bias where the model has one."""
    return linear(x, parts[f"{name}.weight"], parts.get(f"{name}.bias"))


def _query_key(
    h: Tensor, parts: Parts, layer: int, batch: Batch, linear: Linear
) -> tuple[Tensor, Tensor]:
    """Queries [B, T, nh, D] and keys [B, T, nkv, D], before normalisation.

    Means: ``q' = (q + k of its group) / 2``, ``k' = mean of q' over the group``. Convolved path:
    [q; k] over time through a depthwise, then a grouped causal convolution.
    """
    config = batch.config
    heads, groups, dim = config.heads, config.kv_heads, config.head_dim
    qk = torch.cat([project(h, parts, f"{_QKV}{n}_proj", linear) for n in ("q", "k")], dim=-1)
    if batch.new_valid is not None:
        # Only matters with attention_bias: a padded column must be zero, as before the start.
        qk = qk * batch.new_valid[..., None].to(qk.dtype)
    split = qk.unflatten(-1, (heads + groups, dim))
    query = split[:, :, :heads].unflatten(2, (groups, heads // groups))
    query = (query + split[:, :, heads:, None]) * 0.5
    convolved = _convolve(qk.transpose(1, 2), parts, layer, batch)
    convolved = convolved.transpose(1, 2).unflatten(-1, (heads + groups, dim))
    return convolved[:, :, :heads] + query.flatten(2, 3), convolved[:, :, heads:] + query.mean(3)


def _convolve(columns: Tensor, parts: Parts, layer: int, batch: Batch) -> Tensor:
    """Both causal convolutions over raw columns [B, c, T], continuing from the cached columns."""
    config, cache = batch.config, batch.cache
    taps = sum(config.conv_taps) - 2
    before = cache.conv[layer] if cache is not None else None
    if before is None:
        before = columns.new_zeros(*columns.shape[:2], taps)
    columns = torch.cat([before, columns], dim=-1)
    if cache is not None:
        cache.conv[layer] = columns[..., columns.shape[-1] - taps :].clone()
    for name, groups in (
        ("conv_qk_depthwise", columns.shape[1]),
        ("conv_qk_grouped", config.heads + config.kv_heads),
    ):
        weight, bias = parts[f"{_QKV}{name}.weight"], parts[f"{_QKV}{name}.bias"]
        columns = F.conv1d(columns, weight, bias, groups=groups)
    return columns


def _value(h: Tensor, parts: Parts, layer: int, batch: Batch, linear: Linear) -> Tensor:
    """Values [B, T, nkv, D]: this token's half rows, then those of the token before."""
    current = project(h, parts, f"{_QKV}v_proj_current", linear)
    delayed = project(h, parts, f"{_QKV}v_proj_delayed", linear)
    cache = batch.cache
    before = cache.delayed[layer] if cache is not None else None
    if before is None:
        # Before the first token stands a zero hidden state, so the row is the bias, if any.
        before = torch.zeros_like(delayed[:, 0])
        bias = parts.get(f"{_QKV}v_proj_delayed.bias")
        before = before if bias is None else before + bias
    if cache is not None:
        cache.delayed[layer] = delayed[:, -1].clone()
    shifted = torch.cat([before[:, None], delayed[:, :-1]], dim=1)
    value = torch.cat([current, shifted], dim=-1)
    return value.unflatten(-1, (batch.config.kv_heads, batch.config.head_dim))


def _unit(x: Tensor, wide: torch.dtype) -> Tensor:
    """Scale each head to length √D; a head shorter than the dtype's eps is left short."""
    length = x.to(wide).norm(p=2, dim=-1, keepdim=True).to(x.dtype)
    return x * (x.shape[-1] ** 0.5 / length.clamp_min(torch.finfo(x.dtype).eps))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, NeoX style, of the first ``rotary_dim`` values of each head."""
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)
