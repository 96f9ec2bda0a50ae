"""A llama.cpp ZAYA file as a dense float32 folder, so that our runtime can judge it.

    gguf_dense.py FILE MODEL OUT        prints {"bytes": size of all tensors}

FILE is in the dialect of the branch that ``peers.py`` names: two blocks per layer, experts fused.
Everything is as the file stores it, dequantized by ``gguf``, except embedding rows beyond the
tokenizer, which its converter cuts off; they come from MODEL, a folder in hybrid layout.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from zaya_convert.checkpoint import SIDE_FILES

ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.qkv_proj.q_proj.weight",
    "attn_k.weight": "self_attn.qkv_proj.k_proj.weight",
    "cca_val_proj1.weight": "self_attn.qkv_proj.v_proj_current.weight",
    "cca_val_proj2.weight": "self_attn.qkv_proj.v_proj_delayed.weight",
    "ssm_conv1d.weight": "self_attn.qkv_proj.conv_qk_depthwise.weight",
    "ssm_conv1d.bias": "self_attn.qkv_proj.conv_qk_depthwise.bias",
    "cca_conv_grp.weight": "self_attn.qkv_proj.conv_qk_grouped.weight",
    "cca_conv_grp.bias": "self_attn.qkv_proj.conv_qk_grouped.bias",
    "cca_k_scale.weight": "self_attn.qk_norm.temp",
    "attn_output.weight": "self_attn.o_proj.weight",
}
EXPERTS = {
    "attn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.down_proj.weight",
    "ffn_gate_inp.bias": "mlp.gate.down_proj.bias",
    "ffn_norm.weight": "mlp.gate.router_mlp.norm.weight",
    "ffn_gate.weight": "mlp.gate.router_mlp.fc1.weight",
    "ffn_gate.bias": "mlp.gate.router_mlp.fc1.bias",
    "zaya_router_mlp2.weight": "mlp.gate.router_mlp.fc2.weight",
    "zaya_router_mlp2.bias": "mlp.gate.router_mlp.fc2.bias",
    "zaya_router_mlp4.weight": "mlp.gate.router_mlp.out_proj.weight",
    "zaya_router_biases.weight": "mlp.gate.balancing_biases",
    "zaya_router_eda.weight": "mlp.gate.router_states_scale",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
EMBEDDING = "model.embed_tokens.weight"


def names(layers: int) -> dict[str, str]:
    """Name in the file → name in the hybrid layout. Residual scales stand with what they follow."""
    found = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight"}
    for kind, ours in (("weight", "scale"), ("bias", "bias")):
        found[f"blk.0.res_scale_hs.{kind}"] = f"model.input_hidden_states_{ours}"
        for short, long in (("hs", "hidden_states"), ("res", "residual")):
            for i in range(layers):
                after = f"blk.{2 * i + 2}." if i < layers - 1 else ""
                scales = {"attention": f"blk.{2 * i + 1}.", "mlp": after}
                for place, block in scales.items():
                    name = f"model.layers.{i}.post_{place}_residual_scale.{long}_{ours}"
                    found[f"{block}res_scale_{short}.{kind}"] = name
    for i in range(layers):
        for block, table in ((2 * i, ATTENTION), (2 * i + 1, EXPERTS)):
            for name, ours in table.items():
                found[f"blk.{block}.{name}"] = f"model.layers.{i}.{ours}"
    return found


def values(tensor: ReaderTensor) -> Tensor:
    """What the file holds, float32, in the file's order of elements."""
    kind, data = tensor.tensor_type, np.array(tensor.data)
    if kind == GGMLQuantizationType.BF16:
        return torch.from_numpy(data.view(np.uint8)).view(torch.bfloat16).float()
    if kind in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        return torch.from_numpy(data).float()
    return torch.from_numpy(dequantize(data, kind).astype(np.float32))


def main() -> None:
    """Write OUT."""
    file, model, out = (Path(word) for word in sys.argv[1:4])
    config = json.loads((model / "config.json").read_text())
    wanted: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        wanted |= load_file(path)
    known, size = names(config["num_hidden_layers"]), 0
    tensors: dict[str, Tensor] = {}
    for tensor in GGUFReader(file).tensors:
        name = known[tensor.name]
        found, like = values(tensor).flatten(), wanted[name]
        if name == EMBEDDING:
            found = torch.cat([found, like.flatten()[len(found) :].float()])
        tensors[name] = found.view(like.shape)
        size += int(tensor.n_bytes)
    if tensors.keys() != wanted.keys():
        sys.exit(f"not the same tensors: {sorted(tensors.keys() ^ wanted.keys())[:9]}")
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    for side in ("config.json", *SIDE_FILES):
        if (model / side).is_file():
            shutil.copy(model / side, out / side)
    print(json.dumps({"bytes": size}))


if __name__ == "__main__":
    main()
