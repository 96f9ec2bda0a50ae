"""Random checkpoints whose every parameter is non-trivial."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from zaya_convert import layout
from zaya_convert.config import ModelConfig

BASE = ModelConfig(
    layers=3,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    experts=16,
    expert_width=32,
    router_width=24,
    vocab_rows=160,
    windows=(0, 0, 0),
    rope_thetas=(5e6, 5e6, 5e6),
    rotary_dim=8,
    max_positions=4096,
    pad_id=0,
    bos_id=2,
    eos_ids=(3,),
)

VARIANTS: dict[str, ModelConfig] = {
    "e16": BASE,
    "e24-sliding": replace(
        BASE,
        layers=4,
        heads=8,
        experts=24,
        windows=(0, 17, 0, 17),
        rope_thetas=(5e6, 1e4, 5e6, 1e4),
    ),
    "biased-untied": replace(
        BASE, attention_bias=True, lm_head_bias=True, tied=False, conv_taps=(3, 2)
    ),
}


def random_value(key: layout.TensorKey, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """A value that makes every parameter matter: nothing is 0 or 1 throughout."""
    noise = torch.randn(shape, generator=draw)
    name = key.part
    if name == "mlp.gate.balancing_biases":
        return noise * 0.02
    if name == "self_attn.qk_norm.temp":
        return noise.abs() + 0.5
    if name in ("embed_tokens.weight", "lm_head.weight"):
        return noise
    if name == "norm.weight":
        return 0.15 + 0.03 * noise  # logits of order one
    if name.endswith(("norm.weight", "_scale")):
        return 1 + 0.3 * noise
    if len(shape) == 1:
        return 0.3 * noise
    fan_in = shape[-1] if len(shape) == 2 else shape[1] * shape[2]
    gain = 3.0 if "router_mlp" in name else 1.0
    return noise * gain / fan_in**0.5


def favour_skip(config: ModelConfig, bias: float) -> Callable[[layout.TensorKey, Tensor], Tensor]:
    """An edit that biases the router towards the skip expert (10.0 forces it)."""

    def change(key: layout.TensorKey, value: Tensor) -> Tensor:
        if key.part == "mlp.gate.balancing_biases":
            value[config.experts] = bias
        return value

    return change


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    change: Callable[[layout.TensorKey, Tensor], Tensor] | None = None,
) -> Path:
    """Write a random hybrid checkpoint; ``change`` may edit any tensor on the way."""
    draw = torch.Generator().manual_seed(seed)
    whole: dict[str, Tensor] = {}
    for key in layout.keys(config.layers, config.experts, config.flags):
        part = layout.PART_BY_NAME[key.part]
        value = random_value(key, layout.resolve(part.shape, config.dims), draw)
        value = change(key, value) if change else value
        place = layout.stored("hybrid", key, config.dims, config.layers)
        kept = torch.float32 if key.part == "mlp.gate.balancing_biases" else dtype
        target = whole.setdefault(place.name, torch.empty(place.shape, dtype=kept))
        if place.expert is not None:
            target = target[place.expert]
        target[slice(*place.rows) if place.rows else slice(None)] = value.to(kept)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    raw: dict[str, Any] = config.to_transformers()
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    return folder
