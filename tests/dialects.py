"""The tensors of a two-layer model in every GGUF dialect, to the letter, as its loaders read them.

A line holds the name in the file, the shape as numpy has it, and the tensor of the hybrid layout
that is stored there; "0." stands for "model.layers.0.".  The dimensions are those of ``CONFIG``.
Written down from the loaders' sources, so that the package's own table is not its own witness.
"""

from synthetic import nano_config

CONFIG = nano_config(layers=2, experts=2, router_width=256)

_PR23112 = """
token_embd.weight 96 64 = model.embed_tokens.weight
blk.0.res_scale_hs.weight 64 = model.input_hidden_states_scale
blk.0.res_scale_hs.bias 64 = model.input_hidden_states_bias
blk.0.attn_norm.weight 64 = 0.input_layernorm.weight
blk.0.attn_q.weight 128 64 = 0.self_attn.qkv_proj.q_proj.weight
blk.0.attn_k.weight 64 64 = 0.self_attn.qkv_proj.k_proj.weight
blk.0.cca_val_proj1.weight 32 64 = 0.self_attn.qkv_proj.v_proj_current.weight
blk.0.cca_val_proj2.weight 32 64 = 0.self_attn.qkv_proj.v_proj_delayed.weight
blk.0.ssm_conv1d.weight 192 2 = 0.self_attn.qkv_proj.conv_qk_depthwise.weight
blk.0.ssm_conv1d.bias 192 = 0.self_attn.qkv_proj.conv_qk_depthwise.bias
blk.0.cca_conv_grp.weight 192 32 2 = 0.self_attn.qkv_proj.conv_qk_grouped.weight
blk.0.cca_conv_grp.bias 192 = 0.self_attn.qkv_proj.conv_qk_grouped.bias
blk.0.cca_k_scale.weight 2 = 0.self_attn.qk_norm.temp
blk.0.attn_output.weight 64 128 = 0.self_attn.o_proj.weight
blk.1.res_scale_hs.weight 64 = 0.post_attention_residual_scale.hidden_states_scale
blk.1.res_scale_hs.bias 64 = 0.post_attention_residual_scale.hidden_states_bias
blk.1.res_scale_res.weight 64 = 0.post_attention_residual_scale.residual_scale
blk.1.res_scale_res.bias 64 = 0.post_attention_residual_scale.residual_bias
blk.1.attn_norm.weight 64 = 0.post_attention_layernorm.weight
blk.1.ffn_gate_inp.weight 256 64 = 0.mlp.gate.down_proj.weight
blk.1.ffn_gate_inp.bias 256 = 0.mlp.gate.down_proj.bias
blk.1.ffn_norm.weight 256 = 0.mlp.gate.router_mlp.norm.weight
blk.1.ffn_gate.weight 256 256 = 0.mlp.gate.router_mlp.fc1.weight
blk.1.ffn_gate.bias 256 = 0.mlp.gate.router_mlp.fc1.bias
blk.1.zaya_router_mlp2.weight 256 256 = 0.mlp.gate.router_mlp.fc2.weight
blk.1.zaya_router_mlp2.bias 256 = 0.mlp.gate.router_mlp.fc2.bias
blk.1.zaya_router_mlp4.weight 3 256 = 0.mlp.gate.router_mlp.out_proj.weight
blk.1.zaya_router_biases.weight 3 = 0.mlp.gate.balancing_biases
blk.1.ffn_gate_up_exps.weight 2 128 64 = 0.mlp.experts.gate_up_proj
blk.1.ffn_down_exps.weight 2 64 64 = 0.mlp.experts.down_proj
blk.2.res_scale_hs.weight 64 = 0.post_mlp_residual_scale.hidden_states_scale
blk.2.res_scale_hs.bias 64 = 0.post_mlp_residual_scale.hidden_states_bias
blk.2.res_scale_res.weight 64 = 0.post_mlp_residual_scale.residual_scale
blk.2.res_scale_res.bias 64 = 0.post_mlp_residual_scale.residual_bias
blk.2.attn_norm.weight 64 = 1.input_layernorm.weight
blk.2.attn_q.weight 128 64 = 1.self_attn.qkv_proj.q_proj.weight
blk.2.attn_k.weight 64 64 = 1.self_attn.qkv_proj.k_proj.weight
blk.2.cca_val_proj1.weight 32 64 = 1.self_attn.qkv_proj.v_proj_current.weight
blk.2.cca_val_proj2.weight 32 64 = 1.self_attn.qkv_proj.v_proj_delayed.weight
blk.2.ssm_conv1d.weight 192 2 = 1.self_attn.qkv_proj.conv_qk_depthwise.weight
blk.2.ssm_conv1d.bias 192 = 1.self_attn.qkv_proj.conv_qk_depthwise.bias
blk.2.cca_conv_grp.weight 192 32 2 = 1.self_attn.qkv_proj.conv_qk_grouped.weight
blk.2.cca_conv_grp.bias 192 = 1.self_attn.qkv_proj.conv_qk_grouped.bias
blk.2.cca_k_scale.weight 2 = 1.self_attn.qk_norm.temp
blk.2.attn_output.weight 64 128 = 1.self_attn.o_proj.weight
blk.3.res_scale_hs.weight 64 = 1.post_attention_residual_scale.hidden_states_scale
blk.3.res_scale_hs.bias 64 = 1.post_attention_residual_scale.hidden_states_bias
blk.3.res_scale_res.weight 64 = 1.post_attention_residual_scale.residual_scale
blk.3.res_scale_res.bias 64 = 1.post_attention_residual_scale.residual_bias
blk.3.attn_norm.weight 64 = 1.post_attention_layernorm.weight
blk.3.ffn_gate_inp.weight 256 64 = 1.mlp.gate.down_proj.weight
blk.3.ffn_gate_inp.bias 256 = 1.mlp.gate.down_proj.bias
blk.3.zaya_router_eda.weight 256 = 1.mlp.gate.router_states_scale
blk.3.ffn_norm.weight 256 = 1.mlp.gate.router_mlp.norm.weight
blk.3.ffn_gate.weight 256 256 = 1.mlp.gate.router_mlp.fc1.weight
blk.3.ffn_gate.bias 256 = 1.mlp.gate.router_mlp.fc1.bias
blk.3.zaya_router_mlp2.weight 256 256 = 1.mlp.gate.router_mlp.fc2.weight
blk.3.zaya_router_mlp2.bias 256 = 1.mlp.gate.router_mlp.fc2.bias
blk.3.zaya_router_mlp4.weight 3 256 = 1.mlp.gate.router_mlp.out_proj.weight
blk.3.zaya_router_biases.weight 3 = 1.mlp.gate.balancing_biases
blk.3.ffn_gate_up_exps.weight 2 128 64 = 1.mlp.experts.gate_up_proj
blk.3.ffn_down_exps.weight 2 64 64 = 1.mlp.experts.down_proj
res_scale_hs.weight 64 = 1.post_mlp_residual_scale.hidden_states_scale
res_scale_hs.bias 64 = 1.post_mlp_residual_scale.hidden_states_bias
res_scale_res.weight 64 = 1.post_mlp_residual_scale.residual_scale
res_scale_res.bias 64 = 1.post_mlp_residual_scale.residual_bias
output_norm.weight 64 = model.norm.weight
"""

_COMBINED40 = """
token_embd.weight 96 64 = model.embed_tokens.weight
input_hidden_states_scale.weight 64 = model.input_hidden_states_scale
input_hidden_states_scale.bias 64 = model.input_hidden_states_bias
blk.0.attn_norm.weight 64 = 0.input_layernorm.weight
blk.0.attn_q.weight 128 64 = 0.self_attn.qkv_proj.q_proj.weight
blk.0.attn_k.weight 64 64 = 0.self_attn.qkv_proj.k_proj.weight
blk.0.cca_val_proj1.weight 32 64 = 0.self_attn.qkv_proj.v_proj_current.weight
blk.0.cca_val_proj2.weight 32 64 = 0.self_attn.qkv_proj.v_proj_delayed.weight
blk.0.ssm_conv1d.weight 192 2 = 0.self_attn.qkv_proj.conv_qk_depthwise.weight
blk.0.ssm_conv1d.bias 192 = 0.self_attn.qkv_proj.conv_qk_depthwise.bias
blk.0.cca_conv_grp.weight 2 192 32 = 0.self_attn.qkv_proj.conv_qk_grouped.weight
blk.0.cca_conv_grp.bias 192 = 0.self_attn.qkv_proj.conv_qk_grouped.bias
blk.0.cca_k_scale.weight 2 = 0.self_attn.qk_norm.temp
blk.0.attn_output.weight 64 128 = 0.self_attn.o_proj.weight
blk.0.res_scale_hs.weight 64 = 0.post_attention_residual_scale.hidden_states_scale
blk.0.res_scale_hs.bias 64 = 0.post_attention_residual_scale.hidden_states_bias
blk.0.res_scale_res.weight 64 = 0.post_attention_residual_scale.residual_scale
blk.0.res_scale_res.bias 64 = 0.post_attention_residual_scale.residual_bias
blk.0.post_attention_norm.weight 64 = 0.post_attention_layernorm.weight
blk.0.ffn_gate_inp.weight 256 64 = 0.mlp.gate.down_proj.weight
blk.0.ffn_gate_inp.bias 256 = 0.mlp.gate.down_proj.bias
blk.0.ffn_norm.weight 256 = 0.mlp.gate.router_mlp.norm.weight
blk.0.ffn_gate.weight 256 256 = 0.mlp.gate.router_mlp.fc1.weight
blk.0.ffn_gate.bias 256 = 0.mlp.gate.router_mlp.fc1.bias
blk.0.zaya_router_mlp2.weight 256 256 = 0.mlp.gate.router_mlp.fc2.weight
blk.0.zaya_router_mlp2.bias 256 = 0.mlp.gate.router_mlp.fc2.bias
blk.0.zaya_router_mlp4.weight 3 256 = 0.mlp.gate.router_mlp.out_proj.weight
blk.0.zaya_router_biases.weight 3 = 0.mlp.gate.balancing_biases
blk.0.ffn_gate_up_exps.weight 2 128 64 = 0.mlp.experts.gate_up_proj
blk.0.ffn_down_exps.weight 2 64 64 = 0.mlp.experts.down_proj
blk.0.res_scale_hs_mlp.weight 64 = 0.post_mlp_residual_scale.hidden_states_scale
blk.0.res_scale_hs_mlp.bias 64 = 0.post_mlp_residual_scale.hidden_states_bias
blk.0.res_scale_res_mlp.weight 64 = 0.post_mlp_residual_scale.residual_scale
blk.0.res_scale_res_mlp.bias 64 = 0.post_mlp_residual_scale.residual_bias
blk.1.attn_norm.weight 64 = 1.input_layernorm.weight
blk.1.attn_q.weight 128 64 = 1.self_attn.qkv_proj.q_proj.weight
blk.1.attn_k.weight 64 64 = 1.self_attn.qkv_proj.k_proj.weight
blk.1.cca_val_proj1.weight 32 64 = 1.self_attn.qkv_proj.v_proj_current.weight
blk.1.cca_val_proj2.weight 32 64 = 1.self_attn.qkv_proj.v_proj_delayed.weight
blk.1.ssm_conv1d.weight 192 2 = 1.self_attn.qkv_proj.conv_qk_depthwise.weight
blk.1.ssm_conv1d.bias 192 = 1.self_attn.qkv_proj.conv_qk_depthwise.bias
blk.1.cca_conv_grp.weight 2 192 32 = 1.self_attn.qkv_proj.conv_qk_grouped.weight
blk.1.cca_conv_grp.bias 192 = 1.self_attn.qkv_proj.conv_qk_grouped.bias
blk.1.cca_k_scale.weight 2 = 1.self_attn.qk_norm.temp
blk.1.attn_output.weight 64 128 = 1.self_attn.o_proj.weight
blk.1.res_scale_hs.weight 64 = 1.post_attention_residual_scale.hidden_states_scale
blk.1.res_scale_hs.bias 64 = 1.post_attention_residual_scale.hidden_states_bias
blk.1.res_scale_res.weight 64 = 1.post_attention_residual_scale.residual_scale
blk.1.res_scale_res.bias 64 = 1.post_attention_residual_scale.residual_bias
blk.1.post_attention_norm.weight 64 = 1.post_attention_layernorm.weight
blk.1.ffn_gate_inp.weight 256 64 = 1.mlp.gate.down_proj.weight
blk.1.ffn_gate_inp.bias 256 = 1.mlp.gate.down_proj.bias
blk.1.zaya_router_eda.weight 256 = 1.mlp.gate.router_states_scale
blk.1.ffn_norm.weight 256 = 1.mlp.gate.router_mlp.norm.weight
blk.1.ffn_gate.weight 256 256 = 1.mlp.gate.router_mlp.fc1.weight
blk.1.ffn_gate.bias 256 = 1.mlp.gate.router_mlp.fc1.bias
blk.1.zaya_router_mlp2.weight 256 256 = 1.mlp.gate.router_mlp.fc2.weight
blk.1.zaya_router_mlp2.bias 256 = 1.mlp.gate.router_mlp.fc2.bias
blk.1.zaya_router_mlp4.weight 3 256 = 1.mlp.gate.router_mlp.out_proj.weight
blk.1.zaya_router_biases.weight 3 = 1.mlp.gate.balancing_biases
blk.1.ffn_gate_up_exps.weight 2 128 64 = 1.mlp.experts.gate_up_proj
blk.1.ffn_down_exps.weight 2 64 64 = 1.mlp.experts.down_proj
blk.1.res_scale_hs_mlp.weight 64 = 1.post_mlp_residual_scale.hidden_states_scale
blk.1.res_scale_hs_mlp.bias 64 = 1.post_mlp_residual_scale.hidden_states_bias
blk.1.res_scale_res_mlp.weight 64 = 1.post_mlp_residual_scale.residual_scale
blk.1.res_scale_res_mlp.bias 64 = 1.post_mlp_residual_scale.residual_bias
output_norm.weight 64 = model.norm.weight
"""

_YGGDRASIL = """
token_embd.weight 96 64 = model.embed_tokens.weight
blk.0.res_scale_hs.weight 64 = model.input_hidden_states_scale
blk.0.res_scale_hs_b.bias 64 = model.input_hidden_states_bias
blk.0.attn_norm.weight 64 = 0.input_layernorm.weight
blk.0.attn_q.weight 128 64 = 0.self_attn.qkv_proj.q_proj.weight
blk.0.attn_k.weight 64 64 = 0.self_attn.qkv_proj.k_proj.weight
blk.0.cca_val_proj1.weight 32 64 = 0.self_attn.qkv_proj.v_proj_current.weight
blk.0.cca_val_proj2.weight 32 64 = 0.self_attn.qkv_proj.v_proj_delayed.weight
blk.0.cca_conv_dw.weight 192 2 = 0.self_attn.qkv_proj.conv_qk_depthwise.weight
blk.0.cca_conv_dw_b.bias 192 = 0.self_attn.qkv_proj.conv_qk_depthwise.bias
blk.0.cca_conv_grp.weight 192 32 2 = 0.self_attn.qkv_proj.conv_qk_grouped.weight
blk.0.cca_conv_grp.bias 192 = 0.self_attn.qkv_proj.conv_qk_grouped.bias
blk.0.cca_k_scale.weight 2 = 0.self_attn.qk_norm.temp
blk.0.attn_output.weight 64 128 = 0.self_attn.o_proj.weight
blk.1.res_scale_hs.weight 64 = 0.post_attention_residual_scale.hidden_states_scale
blk.1.res_scale_hs_b.bias 64 = 0.post_attention_residual_scale.hidden_states_bias
blk.1.res_scale_res.weight 64 = 0.post_attention_residual_scale.residual_scale
blk.1.res_scale_res_b.bias 64 = 0.post_attention_residual_scale.residual_bias
blk.1.attn_norm.weight 64 = 0.post_attention_layernorm.weight
blk.1.zaya_router_down.weight 256 64 = 0.mlp.gate.down_proj.weight
blk.1.zaya_router_down_b.bias 256 = 0.mlp.gate.down_proj.bias
blk.1.zaya_router_norm.weight 256 = 0.mlp.gate.router_mlp.norm.weight
blk.1.zaya_router_mlp0.weight 256 256 = 0.mlp.gate.router_mlp.fc1.weight
blk.1.zaya_router_mlp0_b.bias 256 = 0.mlp.gate.router_mlp.fc1.bias
blk.1.zaya_router_mlp2.weight 256 256 = 0.mlp.gate.router_mlp.fc2.weight
blk.1.zaya_router_mlp2_b.bias 256 = 0.mlp.gate.router_mlp.fc2.bias
blk.1.zaya_router_mlp4.weight 3 256 = 0.mlp.gate.router_mlp.out_proj.weight
blk.1.zaya_router_biases.weight 3 = 0.mlp.gate.balancing_biases
blk.1.ffn_gate_up_exps.weight 2 128 64 = 0.mlp.experts.gate_up_proj
blk.1.ffn_down_exps.weight 2 64 64 = 0.mlp.experts.down_proj
blk.2.res_scale_hs.weight 64 = 0.post_mlp_residual_scale.hidden_states_scale
blk.2.res_scale_hs_b.bias 64 = 0.post_mlp_residual_scale.hidden_states_bias
blk.2.res_scale_res.weight 64 = 0.post_mlp_residual_scale.residual_scale
blk.2.res_scale_res_b.bias 64 = 0.post_mlp_residual_scale.residual_bias
blk.2.attn_norm.weight 64 = 1.input_layernorm.weight
blk.2.attn_q.weight 128 64 = 1.self_attn.qkv_proj.q_proj.weight
blk.2.attn_k.weight 64 64 = 1.self_attn.qkv_proj.k_proj.weight
blk.2.cca_val_proj1.weight 32 64 = 1.self_attn.qkv_proj.v_proj_current.weight
blk.2.cca_val_proj2.weight 32 64 = 1.self_attn.qkv_proj.v_proj_delayed.weight
blk.2.cca_conv_dw.weight 192 2 = 1.self_attn.qkv_proj.conv_qk_depthwise.weight
blk.2.cca_conv_dw_b.bias 192 = 1.self_attn.qkv_proj.conv_qk_depthwise.bias
blk.2.cca_conv_grp.weight 192 32 2 = 1.self_attn.qkv_proj.conv_qk_grouped.weight
blk.2.cca_conv_grp.bias 192 = 1.self_attn.qkv_proj.conv_qk_grouped.bias
blk.2.cca_k_scale.weight 2 = 1.self_attn.qk_norm.temp
blk.2.attn_output.weight 64 128 = 1.self_attn.o_proj.weight
blk.3.res_scale_hs.weight 64 = 1.post_attention_residual_scale.hidden_states_scale
blk.3.res_scale_hs_b.bias 64 = 1.post_attention_residual_scale.hidden_states_bias
blk.3.res_scale_res.weight 64 = 1.post_attention_residual_scale.residual_scale
blk.3.res_scale_res_b.bias 64 = 1.post_attention_residual_scale.residual_bias
blk.3.attn_norm.weight 64 = 1.post_attention_layernorm.weight
blk.3.zaya_router_down.weight 256 64 = 1.mlp.gate.down_proj.weight
blk.3.zaya_router_down_b.bias 256 = 1.mlp.gate.down_proj.bias
blk.3.zaya_router_eda.weight 256 = 1.mlp.gate.router_states_scale
blk.3.zaya_router_norm.weight 256 = 1.mlp.gate.router_mlp.norm.weight
blk.3.zaya_router_mlp0.weight 256 256 = 1.mlp.gate.router_mlp.fc1.weight
blk.3.zaya_router_mlp0_b.bias 256 = 1.mlp.gate.router_mlp.fc1.bias
blk.3.zaya_router_mlp2.weight 256 256 = 1.mlp.gate.router_mlp.fc2.weight
blk.3.zaya_router_mlp2_b.bias 256 = 1.mlp.gate.router_mlp.fc2.bias
blk.3.zaya_router_mlp4.weight 3 256 = 1.mlp.gate.router_mlp.out_proj.weight
blk.3.zaya_router_biases.weight 3 = 1.mlp.gate.balancing_biases
blk.3.ffn_gate_up_exps.weight 2 128 64 = 1.mlp.experts.gate_up_proj
blk.3.ffn_down_exps.weight 2 64 64 = 1.mlp.experts.down_proj
res_scale_hs.weight 64 = 1.post_mlp_residual_scale.hidden_states_scale
res_scale_hs_b.bias 64 = 1.post_mlp_residual_scale.hidden_states_bias
res_scale_res.weight 64 = 1.post_mlp_residual_scale.residual_scale
res_scale_res_b.bias 64 = 1.post_mlp_residual_scale.residual_bias
output_norm.weight 64 = model.norm.weight
"""


def _parse(text: str) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for line in text.strip().splitlines():
        left, _, stored = line.partition(" = ")
        name, *shape = left.split()
        whole = f"model.layers.{stored}" if stored[0].isdigit() else stored
        found[name] = (tuple(map(int, shape)), whole)
    return found


# dialect: name in the file: shape, and the name in the hybrid layout
NAMES = {
    "pr23112": _parse(_PR23112),
    "combined40": _parse(_COMBINED40),
    "yggdrasil": _parse(_YGGDRASIL),
}
PACKINGS = {"pr23112": "gguf", "combined40": "gguf-combined40", "yggdrasil": "gguf-yggdrasil"}
