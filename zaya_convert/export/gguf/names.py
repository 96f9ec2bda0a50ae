"""The dialects of ``general.architecture = "zaya"``: what each calls a tensor, and in which shape.

No release of llama.cpp knows ZAYA1; three public forks do, each in its own way:

* ``pr23112``: 2L half-layers, attention at even numbers and experts at odd ones, as the pull
  request of that number and most forks have it (kmbandy, Guihal, HCX-Intel).
* ``combined40``: L blocks with both halves; the grouped convolution tap by tap; windows and the
  skip expert are supported (1bit-MONSTER).
* ``yggdrasil``: half-layers under names of its own (jimbothigpen); two key-value heads and a router
  of 256 only, the grouped convolution in F16.

In all of them experts are fused per layer, gate rows before up rows, nothing else is transposed,
and what is no matrix is F32. Names below: {i} layer, {a} = 2i, {m} = 2i + 1, {n} = 2i + 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zaya_convert import layout
from zaya_convert.config import ModelConfig
from zaya_convert.layout import PART_BY_NAME, TensorKey

GROUPED = "self_attn.qkv_proj.conv_qk_grouped.weight"
DEPTHWISE = "self_attn.qkv_proj.conv_qk_depthwise.weight"
# Matrices of the float set whose type a recipe may choose.
ROUTER_MLP = tuple(f"mlp.gate.router_mlp.{name}.weight" for name in ("fc1", "fc2", "out_proj"))

_SKIP = "the skip expert is never chosen"


@dataclass(frozen=True)
class Place:
    """Where a dialect keeps one logical tensor.

    Attributes:
        name: tensor name in the file.
        shape: of the whole stored tensor.
        expert: first index into a fused tensor, or None.
        rows: rows [start, stop) of that expert, or None for all.
        taps: the tensor is stored as one slice per convolution tap, in order.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    taps: bool = False


@dataclass(frozen=True)
class Dialect:
    """One way to name a model's tensors.

    Attributes:
        halves: blocks are half-layers.
        names: part of a ``TensorKey`` → name in the file.
        last: names that differ in the last layer.
        taps_first: the grouped convolution is stored [taps, channels, width].
        grouped_type: of the grouped convolution.
        windows: sliding windows can be expressed.
        note: what a reader of this dialect does differently from the model, or "".
    """

    name: str
    halves: bool
    names: Mapping[str, str]
    last: Mapping[str, str]
    taps_first: bool = False
    grouped_type: str = "F32"
    windows: bool = False
    note: str = ""

    def blocks(self, config: ModelConfig) -> int:
        """``zaya.block_count``."""
        return config.layers * (2 if self.halves else 1)

    def problems(self, config: ModelConfig) -> list[str]:
        """What a model has that this dialect has no form for."""
        found = []
        if config.attention_bias:
            found.append("attention biases have no name in GGUF's zaya dialects")
        if config.lm_head_bias:
            found.append("a bias of the head has no name in GGUF's zaya dialects")
        if config.conv_taps != (2, 2):
            found.append(f"loaders know convolutions of two taps, the model has {config.conv_taps}")
        if len(set(config.windows)) > 1 or any(config.windows):
            if not self.windows:
                found.append(f"{self.name} has no sliding windows; use the dialect combined40")
            elif len({window for window in config.windows if window}) > 1:
                found.append("layers have windows of different sizes, which GGUF cannot say")
        if self.name == "yggdrasil":
            if config.router_width != 256:
                found.append(f"its router must be 256 wide, the model's is {config.router_width}")
            if config.kv_heads != 2:
                found.append(f"it reads two key-value heads, the model has {config.kv_heads}")
        if self.name == "combined40":
            if 2 * config.rotary_dim != config.head_dim:
                found.append("combined40 rotates half of every head, the model another share")
            spare = 2 * config.dims["c"] - config.hidden  # its loader asserts this
            if spare <= 0 or spare % 2:
                found.append("combined40 wants twice the convolution channels above the width")
        return found

    def place(self, key: TensorKey, config: ModelConfig) -> Place:
        """Where the dialect keeps ``key``."""
        dims, part = config.dims, PART_BY_NAME[key.part]
        template = self.names[part.name]
        if key.layer == config.layers - 1:
            template = self.last.get(part.name, template)
        i = key.layer
        name = template.format(i=i, a=2 * i, m=2 * i + 1, n=2 * i + 2)
        shape = layout.resolve(part.shape, dims)
        if part.name == DEPTHWISE:
            return Place(name, (shape[0], shape[2]))
        if part.name == GROUPED and self.taps_first:
            return Place(name, (shape[2], *shape[:2]), taps=True)
        if key.expert < 0:
            return Place(name, shape)
        rows = None
        if part.rows:
            first = 0 if part.rows[0] == "0" else shape[0]
            rows = (first, first + shape[0])
            shape = (2 * shape[0], shape[1])
        return Place(name, (dims["E"], *shape), key.expert, rows)

    def type_of(self, key: TensorKey, dtype: str, wished: str) -> str:
        """Type of a float tensor: vectors, convolutions and the router's projection stay F32.

        Args:
            dtype: of the source.
            wished: by the recipe, or "".
        """
        part = PART_BY_NAME[key.part]
        if part.role != "float":
            return wished or dtype
        if part.name == GROUPED:
            return self.grouped_type
        if part.name in ROUTER_MLP:
            return wished or ("F16" if dtype == "F16" else "F32")
        return "F32"


def _table(rows: str) -> dict[str, str]:
    """Lines of ``part name`` as a table."""
    return dict(row.split() for row in rows.strip().splitlines())


_COMMON = """
    embed_tokens.weight                       token_embd.weight
    norm.weight                               output_norm.weight
    lm_head.weight                            output.weight
    input_layernorm.weight                    blk.{a}.attn_norm.weight
    self_attn.qkv_proj.q_proj.weight          blk.{a}.attn_q.weight
    self_attn.qkv_proj.k_proj.weight          blk.{a}.attn_k.weight
    self_attn.qkv_proj.v_proj_current.weight  blk.{a}.cca_val_proj1.weight
    self_attn.qkv_proj.v_proj_delayed.weight  blk.{a}.cca_val_proj2.weight
    self_attn.qkv_proj.conv_qk_grouped.weight blk.{a}.cca_conv_grp.weight
    self_attn.qkv_proj.conv_qk_grouped.bias   blk.{a}.cca_conv_grp.bias
    self_attn.qk_norm.temp                    blk.{a}.cca_k_scale.weight
    self_attn.o_proj.weight                   blk.{a}.attn_output.weight
    post_attention_layernorm.weight           blk.{m}.attn_norm.weight
    mlp.gate.router_states_scale              blk.{m}.zaya_router_eda.weight
    mlp.gate.router_mlp.fc2.weight            blk.{m}.zaya_router_mlp2.weight
    mlp.gate.router_mlp.out_proj.weight       blk.{m}.zaya_router_mlp4.weight
    mlp.gate.balancing_biases                 blk.{m}.zaya_router_biases.weight
    mlp.experts.gate_proj.weight              blk.{m}.ffn_gate_up_exps.weight
    mlp.experts.up_proj.weight                blk.{m}.ffn_gate_up_exps.weight
    mlp.experts.down_proj.weight              blk.{m}.ffn_down_exps.weight
"""

_CONVENTIONAL = """
    self_attn.qkv_proj.conv_qk_depthwise.weight blk.{a}.ssm_conv1d.weight
    self_attn.qkv_proj.conv_qk_depthwise.bias   blk.{a}.ssm_conv1d.bias
    mlp.gate.down_proj.weight                   blk.{m}.ffn_gate_inp.weight
    mlp.gate.down_proj.bias                     blk.{m}.ffn_gate_inp.bias
    mlp.gate.router_mlp.norm.weight             blk.{m}.ffn_norm.weight
    mlp.gate.router_mlp.fc1.weight              blk.{m}.ffn_gate.weight
    mlp.gate.router_mlp.fc1.bias                blk.{m}.ffn_gate.bias
    mlp.gate.router_mlp.fc2.bias                blk.{m}.zaya_router_mlp2.bias
"""

_OWN = """
    self_attn.qkv_proj.conv_qk_depthwise.weight blk.{a}.cca_conv_dw.weight
    self_attn.qkv_proj.conv_qk_depthwise.bias   blk.{a}.cca_conv_dw_b.bias
    mlp.gate.down_proj.weight                   blk.{m}.zaya_router_down.weight
    mlp.gate.down_proj.bias                     blk.{m}.zaya_router_down_b.bias
    mlp.gate.router_mlp.norm.weight             blk.{m}.zaya_router_norm.weight
    mlp.gate.router_mlp.fc1.weight              blk.{m}.zaya_router_mlp0.weight
    mlp.gate.router_mlp.fc1.bias                blk.{m}.zaya_router_mlp0_b.bias
    mlp.gate.router_mlp.fc2.bias                blk.{m}.zaya_router_mlp2_b.bias
"""


def _residual(where: str, prefix: str, suffix: str = "", bias: str = "") -> dict[str, str]:
    """The four parts of a residual scale; ``bias`` is appended to the names of biases."""
    names = {}
    for part, short in (("hidden_states", "hs"), ("residual", "res")):
        name = f"{prefix}res_scale_{short}{suffix}"
        names[f"{where}.{part}_scale"] = f"{name}.weight"
        names[f"{where}.{part}_bias"] = f"{name}{bias}.bias"
    return names


def _input(name: str, bias: str = "") -> dict[str, str]:
    return {
        "input_hidden_states_scale": f"{name}.weight",
        "input_hidden_states_bias": f"{name}{bias}.bias",
    }


_ATTENTION, _MLP = "post_attention_residual_scale", "post_mlp_residual_scale"


def _combined(table: Mapping[str, str]) -> dict[str, str]:
    """Names of half-layers as names of whole ones."""
    whole = {k: v.replace("{a}", "{i}").replace("{m}", "{i}") for k, v in table.items()}
    whole["post_attention_layernorm.weight"] = "blk.{i}.post_attention_norm.weight"
    return whole


DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        Dialect(
            "pr23112",
            halves=True,
            names=_table(_COMMON)
            | _table(_CONVENTIONAL)
            | _input("blk.0.res_scale_hs")
            | _residual(_ATTENTION, "blk.{m}.")
            | _residual(_MLP, "blk.{n}."),
            last=_residual(_MLP, ""),
            note=_SKIP,
        ),
        Dialect(
            "combined40",
            halves=False,
            names=_combined(_table(_COMMON) | _table(_CONVENTIONAL))
            | _input("input_hidden_states_scale")
            | _residual(_ATTENTION, "blk.{i}.")
            | _residual(_MLP, "blk.{i}.", "_mlp"),
            last={},
            taps_first=True,
            windows=True,
        ),
        Dialect(
            "yggdrasil",
            halves=True,
            names=_table(_COMMON)
            | _table(_OWN)
            | _input("blk.0.res_scale_hs", "_b")
            | _residual(_ATTENTION, "blk.{m}.", bias="_b")
            | _residual(_MLP, "blk.{n}.", bias="_b"),
            last=_residual(_MLP, "", bias="_b"),
            grouped_type="F16",
            note=_SKIP,
        ),
    )
}


def detect(names: Mapping[str, object]) -> Dialect | None:
    """Tell the dialect of a file from its tensor names."""
    if "blk.0.post_attention_norm.weight" in names:
        return DIALECTS["combined40"]
    if "blk.0.cca_conv_dw.weight" in names:
        return DIALECTS["yggdrasil"]
    return DIALECTS["pr23112"] if "blk.1.ffn_gate_inp.weight" in names else None
