"""The model `train.py` trains: its configuration, first weights, and the handles of its routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import ZayaConfig, ZayaForCausalLM

from tools.tiny.tokenizer import BOS_ID, IM_END_ID, PAD_ID, VOCAB_ROWS

CONTEXT = 2048
SKIP_LOAD = 0.04


def model_config() -> ZayaConfig:
    """The real architecture at widths of 256."""
    return ZayaConfig(
        vocab_size=VOCAB_ROWS,
        hidden_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        moe_intermediate_size=256,
        router_hidden_size=256,
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=IM_END_ID,
        architectures=["ZayaForCausalLM"],
        dtype="bfloat16",
    )


def fresh_model(seed: int) -> ZayaForCausalLM:
    """A model whose every path is alive at the first step."""
    torch.manual_seed(seed)
    model = ZayaForCausalLM(model_config()).float()
    draw_weights(model, lambda name: True)
    return model


@torch.no_grad()
def draw_weights(model: ZayaForCausalLM, wanted: Callable[[str], bool]) -> None:
    """Draws the wanted weights; the other parameters keep what they have."""
    for name, weight in model.named_parameters():
        if wanted(name):
            if weight.dim() == 2 and "embed" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
            if name.endswith("out_proj.weight"):
                weight.mul_(4.0)  # choices must differ between tokens before biases can balance
            elif name.endswith("experts.gate_up_proj"):
                weight.normal_(std=weight.shape[2] ** -0.5)
            elif name.endswith(("experts.down_proj", "o_proj.weight")):
                weight.normal_(std=0.5 * weight.shape[-1] ** -0.5)
            elif name.endswith("embed_tokens.weight"):
                weight.normal_(std=0.04)
            elif name.endswith("input_hidden_states_scale"):
                weight.fill_(12.0)
            elif name.endswith("temp"):
                weight.fill_(1.5)
            elif ".mlp." in name and weight.dim() == 1:
                weight.fill_(1.0 if name.endswith(("scale", "norm.weight")) else 0.0)
    for biases in balancing_biases(model):
        biases.zero_()


def balancing_biases(model: ZayaForCausalLM) -> list[Tensor]:
    """The biases of every router, bottom layer first."""
    return [layer.mlp.gate.balancing_biases for layer in cast(Any, model.model.layers)]


def target_loads(experts: int) -> Tensor:
    """The wanted share of tokens of every expert, the skip expert last."""
    return torch.tensor([(1 - SKIP_LOAD) / experts] * experts + [SKIP_LOAD])
