"""Names and fused slices on disk ⇄ ``TensorKey(layer, part, expert)``.

ZAYA1 checkpoints come in two layouts. *Hybrid* (L layers, experts fused into 3-D tensors) is what
transformers reads; *legacy* (2L alternating half-layers, one tensor per expert) is older. The one
table below, ``PARTS``, holds every tensor of the model once, with its symbolic shape and both
names, so the mapping can be read at a glance and a part is added in one line.

A part's own name is its hybrid name without ``model.`` and ``layers.i.``, except that experts are
addressed one matrix at a time: ``gate_proj``, ``up_proj`` [F, d] and ``down_proj`` [d, F]. These
are contiguous slices of what either layout stores (gate rows first, then up), so reading one never
copies another.

Symbols: d hidden, q = nh·D query rows, k = nkv·D key rows, v = nkv·D/2 half value rows,
c = q + k convolution channels, D head_dim, t0/t1 convolution taps, R router width, E experts,
S = E + 1 router classes, F expert width, V vocabulary rows.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

Dims = Mapping[str, int]


@dataclass(frozen=True, slots=True, order=True)
class TensorKey:
    """Identity of one logical tensor, the same in every layout and format.

    ``layer`` is -1 for tensors of the whole model, ``expert`` is -1 outside the experts.
    """

    layer: int
    part: str
    expert: int = -1

    def __str__(self) -> str:
        """The canonical name, which is also the per-expert name that artifacts use."""
        if self.layer < 0:
            return self.part if self.part.startswith("lm_head") else f"model.{self.part}"
        part = self.part
        if self.expert >= 0:
            part = part.replace("experts.", f"experts.{self.expert}.")
        return f"model.layers.{self.layer}.{part}"

    @property
    def module(self) -> str:
        """The canonical name without the trailing ``.weight``."""
        return str(self).removesuffix(".weight")


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table: a kind of tensor, its symbolic shape and where each layout keeps it.

    Attributes:
        name: the part of the ``TensorKey``.
        shape: symbols separated by spaces; ``2F`` means twice F.
        hybrid: name below ``model.layers.{i}.`` (or the whole name for model tensors).
        legacy: whole name; {a} = 2i, {m} = 2i+1, {n} = 2i+2, {e} = expert. ``@`` marks a residual
            scale whose last layer lives in ``model.res_scale``.
        scope: "model", "layer" or "expert".
        role: "expert", "attention", "embedding", "float" (never quantized) — what recipes match.
        when: condition on the configuration under which the tensor exists.
        rows: which rows of the stored tensor, as symbols, for gate/up halves.
    """

    name: str
    shape: str
    hybrid: str
    legacy: str
    scope: str = "layer"
    role: str = "float"
    when: str = ""
    rows: tuple[str, str] | None = None


_QKV = "model.layers.{a}.self_attn.qkv."
_ROUTER = "model.layers.{m}.zaya_block.router."
_EXPERT = "model.layers.{m}.zaya_block.experts.local_experts.{e}."


def _residual(where: str, legacy: str) -> list[Part]:
    return [
        Part(f"{where}.{kind}", "d", f"{where}.{kind}", f"{legacy}res_scale.{kind}")
        for kind in (
            "hidden_states_scale", "hidden_states_bias", "residual_scale", "residual_bias",
        )
    ]  # fmt: skip


def _attention(name: str, shape: str, legacy: str) -> list[Part]:
    bias = Part(
        f"{name}.bias", shape.split()[0], f"{name}.bias", f"{legacy}.bias", when="attention_bias"
    )
    return [
        Part(f"{name}.weight", shape, f"{name}.weight", f"{legacy}.weight", role="attention"),
        bias,
    ]


PARTS: tuple[Part, ...] = (
    Part("embed_tokens.weight", "V d", "model.embed_tokens.weight", "model.embed_tokens.weight",
         scope="model", role="embedding"),
    Part("input_hidden_states_scale", "d", "model.input_hidden_states_scale",
         "model.layers.0.res_scale.hidden_states_scale", scope="model"),
    Part("input_hidden_states_bias", "d", "model.input_hidden_states_bias",
         "model.layers.0.res_scale.hidden_states_bias", scope="model"),
    Part("input_layernorm.weight", "d", "input_layernorm.weight",
         "model.layers.{a}.input_norm.weight"),
    *_attention("self_attn.qkv_proj.q_proj", "q d", _QKV + "linear_q"),
    *_attention("self_attn.qkv_proj.k_proj", "k d", _QKV + "linear_k"),
    *_attention("self_attn.qkv_proj.v_proj_current", "v d", _QKV + "val_proj1"),
    *_attention("self_attn.qkv_proj.v_proj_delayed", "v d", _QKV + "val_proj2"),
    Part("self_attn.qkv_proj.conv_qk_depthwise.weight", "c 1 t0",
         "self_attn.qkv_proj.conv_qk_depthwise.weight", _QKV + "conv_qk.0.weight"),
    Part("self_attn.qkv_proj.conv_qk_depthwise.bias", "c",
         "self_attn.qkv_proj.conv_qk_depthwise.bias", _QKV + "conv_qk.0.bias"),
    Part("self_attn.qkv_proj.conv_qk_grouped.weight", "c D t1",
         "self_attn.qkv_proj.conv_qk_grouped.weight", _QKV + "conv_qk.1.weight"),
    Part("self_attn.qkv_proj.conv_qk_grouped.bias", "c",
         "self_attn.qkv_proj.conv_qk_grouped.bias", _QKV + "conv_qk.1.bias"),
    Part("self_attn.qk_norm.temp", "nkv", "self_attn.qk_norm.temp", _QKV + "temp"),
    *_attention("self_attn.o_proj", "d q", "model.layers.{a}.self_attn.o_proj"),
    *_residual("post_attention_residual_scale", "model.layers.{m}."),
    Part("post_attention_layernorm.weight", "d", "post_attention_layernorm.weight",
         "model.layers.{m}.input_norm.weight"),
    Part("mlp.gate.down_proj.weight", "R d", "mlp.gate.down_proj.weight",
         _ROUTER + "down_proj.weight"),
    Part("mlp.gate.down_proj.bias", "R", "mlp.gate.down_proj.bias", _ROUTER + "down_proj.bias"),
    Part("mlp.gate.router_states_scale", "R", "mlp.gate.router_states_scale",
         _ROUTER + "router_states_scale", when="not first"),
    Part("mlp.gate.router_mlp.norm.weight", "R", "mlp.gate.router_mlp.norm.weight",
         _ROUTER + "rmsnorm_eda.weight"),
    Part("mlp.gate.router_mlp.fc1.weight", "R R", "mlp.gate.router_mlp.fc1.weight",
         _ROUTER + "router_mlp.0.weight"),
    Part("mlp.gate.router_mlp.fc1.bias", "R", "mlp.gate.router_mlp.fc1.bias",
         _ROUTER + "router_mlp.0.bias"),
    Part("mlp.gate.router_mlp.fc2.weight", "R R", "mlp.gate.router_mlp.fc2.weight",
         _ROUTER + "router_mlp.2.weight"),
    Part("mlp.gate.router_mlp.fc2.bias", "R", "mlp.gate.router_mlp.fc2.bias",
         _ROUTER + "router_mlp.2.bias"),
    Part("mlp.gate.router_mlp.out_proj.weight", "S R", "mlp.gate.router_mlp.out_proj.weight",
         _ROUTER + "router_mlp.4.weight"),
    Part("mlp.gate.balancing_biases", "S", "mlp.gate.balancing_biases",
         _ROUTER + "balancing_biases"),
    Part("mlp.experts.gate_proj.weight", "F d", "mlp.experts.gate_up_proj",
         _EXPERT + "linear_fc1.weight", scope="expert", role="expert", rows=("0", "F")),
    Part("mlp.experts.up_proj.weight", "F d", "mlp.experts.gate_up_proj",
         _EXPERT + "linear_fc1.weight", scope="expert", role="expert", rows=("F", "2F")),
    Part("mlp.experts.down_proj.weight", "d F", "mlp.experts.down_proj",
         _EXPERT + "linear_fc2.weight", scope="expert", role="expert"),
    *_residual("post_mlp_residual_scale", "@model.layers.{n}."),
    Part("norm.weight", "d", "model.norm.weight", "model.final_norm.weight", scope="model"),
    Part("lm_head.weight", "V d", "lm_head.weight", "lm_head.weight", scope="model",
         role="embedding", when="untied"),
    Part("lm_head.bias", "V", "lm_head.bias", "lm_head.bias", scope="model", when="lm_head_bias"),
)  # fmt: skip

PART_BY_NAME: dict[str, Part] = {part.name: part for part in PARTS}

# Matrices that receive the same inputs, in the order in which they are joined.
QKV_PARTS = tuple(
    f"self_attn.qkv_proj.{name}.weight"
    for name in ("q_proj", "k_proj", "v_proj_current", "v_proj_delayed")
)
EXPERT_PARTS = tuple(f"mlp.experts.{name}_proj.weight" for name in ("gate", "up", "down"))
# Added to fp32 probabilities, whatever the dtype of the rest.
BALANCING_BIASES = "mlp.gate.balancing_biases"

# Older hybrid files kept the router norm under its legacy name.
_HYBRID_ALIASES = {"mlp.gate.router_mlp.norm.weight": "mlp.gate.rmsnorm_eda.weight"}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a layout keeps one logical tensor: a name, and for fused tensors which piece of it.

    Attributes:
        name: tensor name in the file.
        shape: shape of the whole stored tensor.
        expert: first index into a fused 3-D tensor, or None.
        rows: [start, stop) of the second-to-last dimension, or None for all rows.
        alias: another name the same tensor may have, or "".
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    rows: tuple[int, int] | None = None
    alias: str = ""


def detect(names: Mapping[str, object]) -> str:
    """Tell the layout from tensor names: "legacy", "hybrid" or "" when it is neither."""
    if any(".zaya_block." in name for name in names):
        return "legacy"
    if any(re.search(r"\.mlp\.(gate|experts)\.", name) for name in names):
        return "hybrid"
    return ""


@cache
def _symbol(token: str) -> tuple[int, str]:
    match = re.fullmatch(r"(\d*)(\D.*)?", token)
    assert match is not None
    return int(match[1] or 1), match[2] or ""


def resolve(shape: str, dims: Dims) -> tuple[int, ...]:
    """Turn a symbolic shape like ``"2F d"`` into numbers."""
    return tuple(_number(token, dims) for token in shape.split())


def _number(token: str, dims: Dims) -> int:
    if token.isdigit():
        return int(token)
    factor, symbol = _symbol(token)
    return factor * dims[symbol]


def keys(layers: int, experts: int, flags: frozenset[str]) -> Iterator[TensorKey]:
    """Every logical tensor of a model in a fixed order: the order of execution.

    Args:
        flags: which optional tensors exist: "attention_bias", "lm_head_bias", "untied".
    """
    first = [p for p in PARTS if p.scope == "model" and p.name.startswith(("embed", "input"))]
    last = [p for p in PARTS if p.scope == "model" and p not in first]
    yield from (TensorKey(-1, p.name) for p in first)
    for layer in range(layers):
        for part in PARTS:
            if part.scope == "model" or not _exists(part, layer, flags):
                continue
            for expert in range(experts) if part.scope == "expert" else (-1,):
                yield TensorKey(layer, part.name, expert)
    yield from (TensorKey(-1, p.name) for p in last if _exists(p, -1, flags))


def _exists(part: Part, layer: int, flags: frozenset[str]) -> bool:
    if part.when == "not first":
        return layer != 0
    return not part.when or part.when in flags


def stored(layout: str, key: TensorKey, dims: Dims, layers: int) -> Stored:
    """Where ``layout`` keeps ``key``.

    Args:
        layout: "hybrid", "legacy", or "split": hybrid names with one tensor per expert matrix,
            which is what quantized artifacts use.
    """
    part = PART_BY_NAME[key.part]
    shape = resolve(part.shape, dims)
    if layout == "split" and key.expert >= 0:
        return Stored(str(key), shape)
    rows = (_number(part.rows[0], dims), _number(part.rows[1], dims)) if part.rows else None
    if rows:
        shape = (2 * shape[0], *shape[1:])
    if layout == "legacy":
        return Stored(_legacy_name(part, key, layers), shape, rows=rows)
    prefix = f"model.layers.{key.layer}." if key.layer >= 0 else ""
    alias = _HYBRID_ALIASES.get(part.name, "")
    if key.expert >= 0:
        return Stored(prefix + part.hybrid, (dims["E"], *shape), key.expert, rows)
    return Stored(prefix + part.hybrid, shape, rows=rows, alias=alias and prefix + alias)


def _legacy_name(part: Part, key: TensorKey, layers: int) -> str:
    template = part.legacy
    if template.startswith("@"):
        template = template[1:]
        if key.layer == layers - 1:
            template = template.replace("layers.{n}.", "")
    i = key.layer
    return template.format(a=2 * i, m=2 * i + 1, n=2 * i + 2, e=key.expert)
