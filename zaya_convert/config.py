"""``ModelConfig``: both generations of ZAYA1 ``config.json`` normalised to one description.

Hybrid configs (transformers' ``ZayaConfig``) are trusted, and their tensors checked against them.
Legacy configs are not: published ones name 120 layers where the file has 80 and 16 heads where it
has 8, use per-layer lists, and ``rope_scaling: false``. For those the dimensions come from the
tensors themselves and only what tensors cannot tell (rope, eps, windows, token ids) from the file.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zaya_convert.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]

MAX_LAYERS = 10_000
MAX_EXPERTS = 4096
_MAX_INT = 1 << 31


@dataclass(frozen=True)
class ModelConfig:
    """A ZAYA1 model's dimensions and constants; immutable and independent of the layout on disk.

    ``windows[i]`` is the attention window of layer i in tokens (0 = full causal attention);
    ``rope_thetas[i]`` its rotary base. ``rotary_dim`` counts the rotated values of each head.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    expert_width: int
    router_width: int
    vocab_rows: int
    conv_taps: tuple[int, int] = (2, 2)
    windows: tuple[int, ...] = ()
    rope_thetas: tuple[float, ...] = ()
    rotary_dim: int = 64
    eps: float = 1e-5
    max_positions: int = 131072
    attention_bias: bool = False
    lm_head_bias: bool = False
    tied: bool = True
    pad_id: int | None = 0
    bos_id: int | None = 2
    eos_ids: tuple[int, ...] = (106,)

    @property
    def dims(self) -> dict[str, int]:
        """The symbols that ``layout`` writes shapes with."""
        q, k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "V": self.vocab_rows, "d": self.hidden, "q": q, "k": k, "v": k // 2, "c": q + k,
            "D": self.head_dim, "nkv": self.kv_heads, "R": self.router_width,
            "E": self.experts, "S": self.experts + 1, "F": self.expert_width,
            "t0": self.conv_taps[0], "t1": self.conv_taps[1],
        }  # fmt: skip

    @property
    def flags(self) -> frozenset[str]:
        """Which optional tensors exist."""
        present = {
            "attention_bias": self.attention_bias,
            "lm_head_bias": self.lm_head_bias,
            "untied": not self.tied,
        }
        return frozenset(name for name, value in present.items() if value)

    def to_transformers(self) -> dict[str, Any]:
        """``config.json`` of transformers' ``ZayaConfig`` for this model (hybrid layout)."""
        sliding = [bool(w) for w in self.windows]
        theta = dict(zip(sliding, self.rope_thetas, strict=True))
        rope = {
            name: {
                "rope_type": "default",
                "rope_theta": theta[kind],
                "partial_rotary_factor": self.rotary_dim / self.head_dim,
            }
            for name, kind in (("hybrid", False), ("hybrid_sliding", True))
            if kind in theta
        }
        return {
            "architectures": ["ZayaForCausalLM"],
            "model_type": "zaya",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "num_experts": self.experts,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": self.expert_width,
            "router_hidden_size": self.router_width,
            "vocab_size": self.vocab_rows,
            "cca_time0": self.conv_taps[0],
            "cca_time1": self.conv_taps[1],
            "layer_types": ["hybrid_sliding" if s else "hybrid" for s in sliding],
            "sliding_window": max(self.windows) or None,
            "rope_parameters": rope,
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.max_positions,
            "attention_bias": self.attention_bias,
            "lm_head_bias": self.lm_head_bias,
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "pad_token_id": self.pad_id,
            "bos_token_id": self.bos_id,
            "eos_token_id": self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids),
            "dtype": "bfloat16",
        }


class _Fields:
    """Typed access to a raw config; every complaint is collected, none is fatal by itself."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[str] = []

    def integer(
        self, *names: str, default: int | None = None, low: int = 1, high: int = _MAX_INT
    ) -> int:
        for name in names:
            value = self.raw.get(name)
            if value is None:
                continue
            if type(value) is int and low <= value <= high:
                return value
            self.problems.append(f"{name} is {value!r}, expected an integer from {low} to {high}")
            return default if default is not None else low
        if default is None:
            self.problems.append(f"{names[0]} is missing")
            return low
        return default

    def number(self, *names: str, default: float) -> float:
        for name in names:
            value = self.raw.get(name)
            if isinstance(value, int | float) and value is not True and 0 < value < 1e12:
                return float(value)
            if value is not None:
                self.problems.append(f"{name} is {value!r}, expected a positive number")
        return default

    def token(self, name: str, default: int | None) -> int | None:
        value = self.raw.get(name, default)
        if value is None or (type(value) is int and 0 <= value < _MAX_INT):
            return value
        self.problems.append(f"{name} is {value!r}, expected a token id")
        return default

    def expect(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a variant of the architecture we do not compute."""
        value = self.raw.get(name)
        if value is not None and value not in allowed:
            self.problems.append(f"{name} is {value!r}, only {allowed[0]!r} is supported")


def normalise(raw: Mapping[str, Any], layout: str, shapes: Shapes) -> tuple[ModelConfig, list[str]]:
    """Read a raw ``config.json`` of either generation.

    Args:
        raw: the JSON object.
        layout: "hybrid" or "legacy", as told from the tensor names.
        shapes: shapes of the stored tensors by their name on disk.

    Returns:
        The configuration, and notes on where a legacy config was overruled by its tensors.

    Raises:
        InputError: fields that are missing, absurd, or ask for an unsupported variant.
    """
    fields = _Fields(raw)
    fields.expect("model_type", ("zaya",))
    fields.expect("num_experts_per_tok", (1,))
    fields.expect("moe_router_topk", (1,))
    fields.expect("hidden_act", ("silu",))
    fields.expect("activation_func", ("swiglu", "silu"))
    fields.expect("clamp_temp", (False,))
    fields.expect("zaya_use_eda", (True,))
    fields.expect("use_eda", (True,))
    notes: list[str] = []
    if layout == "legacy":
        dims, notes = _legacy_dims(fields, shapes)
    else:
        dims = _hybrid_dims(fields)
    windows, thetas, partial = _attention_pattern(fields, layout, dims["layers"])
    eos = raw.get("eos_token_id", 106)
    config = ModelConfig(
        **dims,
        conv_taps=(fields.integer("cca_time0", default=2), fields.integer("cca_time1", default=2)),
        windows=windows,
        rope_thetas=thetas,
        rotary_dim=int(dims["head_dim"] * partial),
        eps=fields.number("rms_norm_eps", "norm_epsilon", default=1e-5),
        max_positions=fields.integer("max_position_embeddings", default=131072),
        attention_bias=bool(raw.get("attention_bias", False)),
        lm_head_bias=bool(raw.get("lm_head_bias", False)),
        tied=bool(raw.get("tie_word_embeddings", True)),
        pad_id=fields.token("pad_token_id", 0),
        bos_id=fields.token("bos_token_id", 2),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )
    _check(config, fields)
    if fields.problems:
        raise InputError(fields.problems, "config.json")
    return config, notes


def _check(config: ModelConfig, fields: _Fields) -> None:
    if config.layers > MAX_LAYERS:
        fields.problems.append(f"{config.layers} layers is beyond reason (limit {MAX_LAYERS})")
    if config.experts > MAX_EXPERTS:
        fields.problems.append(f"{config.experts} experts is beyond reason (limit {MAX_EXPERTS})")
    if config.heads % config.kv_heads:
        fields.problems.append(
            f"{config.heads} query heads do not divide into {config.kv_heads} key-value heads"
        )
    if config.rotary_dim % 2 or config.rotary_dim > config.head_dim:
        fields.problems.append(f"rotary part of {config.rotary_dim} of {config.head_dim} values")
    if not all(type(i) is int and 0 <= i < _MAX_INT for i in config.eos_ids):
        fields.problems.append(f"eos_token_id is {fields.raw.get('eos_token_id')!r}")


def _hybrid_dims(fields: _Fields) -> dict[str, int]:
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    return {
        "layers": fields.integer("num_hidden_layers", high=MAX_LAYERS),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": fields.integer("num_key_value_heads", default=2),
        "head_dim": fields.integer("head_dim", default=128),
        "experts": fields.integer("num_experts", default=16),
        "expert_width": fields.integer("moe_intermediate_size", default=2048),
        "router_width": fields.integer("router_hidden_size", default=256),
        "vocab_rows": fields.integer("vocab_size"),
    }


def _attention_pattern(
    fields: _Fields, layout: str, layers: int
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """Window and rope base of every layer, and the rotated share of a head."""
    raw = fields.raw
    full_theta = fields.number("rope_theta", "rotary_base", default=5e6)
    sliding_theta = fields.number("swa_rotary_base", default=1e4)
    partial = fields.number("partial_rotary_factor", "rope_pct", default=0.5)
    kinds = {"hybrid": (full_theta, partial), "hybrid_sliding": (sliding_theta, partial)}
    if raw.get("rope_scaling") not in (None, False):
        fields.problems.append(f"rope_scaling {raw['rope_scaling']!r} is not supported")
    rope = raw.get("rope_parameters")
    if isinstance(rope, dict):
        nested = [name for name in kinds if name in rope]
        for name in nested:
            # As in transformers, whole heads are rotated where a nested entry has no factor.
            kinds[name] = _rope(fields, name, rope[name], kinds[name][0], 1.0)
        if not nested:
            kinds["hybrid"] = _rope(fields, "hybrid", rope, full_theta, partial)
    windows = _windows(fields, layout, layers)
    used = [kinds["hybrid_sliding" if window else "hybrid"] for window in windows]
    if len({partial for _, partial in used}) > 1:
        fields.problems.append("rope_parameters rotate different shares of a head per layer type")
    return windows, tuple(theta for theta, _ in used), used[0][1]


def _rope(
    fields: _Fields, name: str, entry: object, theta: float, partial: float
) -> tuple[float, float]:
    """Rope base and rotated share of one layer type; the last two arguments are the defaults."""
    if not isinstance(entry, dict):
        fields.problems.append(f"rope_parameters.{name} is {entry!r}, expected an object")
        return theta, partial
    if entry.get("rope_type", "default") != "default":
        fields.problems.append(f"rope_type {entry['rope_type']!r} of {name} is not supported")
    values = _Fields(entry)
    theta = values.number("rope_theta", default=theta)
    partial = values.number("partial_rotary_factor", default=partial)
    fields.problems += [f"rope_parameters.{name}: {problem}" for problem in values.problems]
    return theta, partial


def _windows(fields: _Fields, layout: str, layers: int) -> tuple[int, ...]:
    swa = fields.raw.get("swa_layers")
    if layout == "legacy" and isinstance(swa, list):
        # Indexed by half-layer (attention at even places). The list counts the tokens before the
        # current one; windows here, as in transformers, include it: 4096 -> 4097.
        entries = [swa[2 * i] if 2 * i < len(swa) else 0 for i in range(layers)]
        if not all(type(w) is int and 0 <= w < _MAX_INT for w in entries):
            fields.problems.append("swa_layers must hold window sizes (0 = full attention)")
            entries = [0] * layers
        return tuple(w + 1 if w else 0 for w in entries)
    types = fields.raw.get("layer_types") or ["hybrid"] * layers
    if not isinstance(types, list) or len(types) < layers:
        fields.problems.append(f"layer_types must list all {layers} layers")
        return (0,) * layers
    unknown = sorted({str(t) for t in types} - {"hybrid", "hybrid_sliding"})
    if unknown and layout != "legacy":
        fields.problems.append(f"layer_types has unknown entries {unknown}")
    sliding = [t == "hybrid_sliding" for t in types[:layers]]
    window = fields.integer("sliding_window") if any(sliding) else 0
    return tuple(window if s else 0 for s in sliding)


_LEGACY_PROBES = {
    # dimension: (suffix of a legacy tensor, axis); heads and head_dim follow from these
    "hidden": (".input_norm.weight", 0),
    "kv_heads": (".self_attn.qkv.temp", 0),
    "q": (".self_attn.qkv.linear_q.weight", 0),
    "k": (".self_attn.qkv.linear_k.weight", 0),
    "router_width": (".router.down_proj.weight", 0),
    "classes": (".router.router_mlp.4.weight", 0),
    "expert_width": (".linear_fc2.weight", 1),
    "vocab_rows": ("embed_tokens.weight", 0),
}


def _legacy_dims(fields: _Fields, shapes: Shapes) -> tuple[dict[str, int], list[str]]:
    """Dimensions by majority over the tensors, so that one damaged tensor cannot shift them all."""
    votes: dict[str, Counter[int]] = {name: Counter() for name in _LEGACY_PROBES}
    halves: Counter[int] = Counter()
    for name, shape in shapes.items():
        match = re.match(r"model\.layers\.(\d{1,6})\.", name)
        if match:
            halves[int(match[1])] += 1
        for dim, (suffix, axis) in _LEGACY_PROBES.items():
            if name.endswith(suffix) and len(shape) > axis:
                votes[dim][shape[axis]] += 1
    missing = [_LEGACY_PROBES[dim][0].lstrip(".") for dim, count in votes.items() if not count]
    if missing:
        raise InputError([f"no tensor {suffix!r} in any layer" for suffix in missing], "checkpoint")
    found = {dim: count.most_common(1)[0][0] for dim, count in votes.items()}
    kv_heads = max(found.pop("kv_heads"), 1)
    head_dim = max(found.pop("k") // kv_heads, 1)
    dims = {
        # a few tensors alone are strays, to be named as such: a half-layer has at least ten
        "layers": max((i for i, count in halves.items() if count > 4), default=0) // 2 + 1,
        "hidden": found["hidden"],
        "heads": max(found.pop("q") // head_dim, 1),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "experts": max(found.pop("classes") - 1, 1),
        "expert_width": found["expert_width"],
        "router_width": found["router_width"],
        "vocab_rows": found["vocab_rows"],
    }
    notes = _contradictions(fields, dims)
    _check_depth(fields, 2 * dims["layers"], bool(notes[1:]))
    return dims, notes


def _check_depth(fields: _Fields, halves: int, lying: bool) -> None:
    """Whether whole layers are missing at the end, which no tensor name gives away.

    The per-half-layer lists of published configs have the true length even where
    ``num_hidden_layers`` does not; that one counts only in a config that is right otherwise.
    """
    lists = ("zaya_layers", "swa_layers", "cca_num_q_heads", "num_query_groups_list",
             "ffn_hidden_size_list", "zaya_mlp_expansion")  # fmt: skip
    claims = {
        name: len(fields.raw[name]) for name in lists if isinstance(fields.raw.get(name), list)
    }
    count = fields.raw.get("num_hidden_layers")
    if not lying and type(count) is int:
        claims["num_hidden_layers"] = count
    fields.problems += [
        f"{name} speaks of {claim} half-layers, the tensors hold {halves}: some are missing"
        for name, claim in claims.items()
        if claim > halves
    ]


def _contradictions(fields: _Fields, dims: Mapping[str, int]) -> list[str]:
    """What a legacy config claims against its own tensors, for the record."""
    claims = {
        "num_hidden_layers": 2 * dims["layers"],
        "hidden_size": dims["hidden"],
        "num_attention_heads": dims["heads"],
        "ffn_hidden_size": 2 * dims["expert_width"],
        "zaya_mlp_expansion": dims["router_width"],
        "num_experts": dims["experts"],
        "kv_channels": dims["head_dim"],
        "vocab_size": dims["vocab_rows"],
    }
    notes = []
    for name, truth in claims.items():
        claim = fields.raw.get(name)
        values = [v for v in claim if v] if isinstance(claim, list) else [claim]
        if claim is not None and any(value != truth for value in values):
            notes.append(f"config.json says {name} = {claim}; the tensors say {truth} and are used")
    return notes
