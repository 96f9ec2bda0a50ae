"""The three GGUF dialects, against the names and shapes that their loaders ask for."""

import re
from dataclasses import replace
from typing import Any

import pytest

from dialects import CONFIG, NAMES
from synthetic import nano_config
from zaya_convert import layout
from zaya_convert.config import ModelConfig
from zaya_convert.export.gguf.names import DIALECTS, Place, detect
from zaya_convert.layout import TensorKey

KEYS = list(layout.keys(CONFIG.layers, CONFIG.experts, CONFIG.flags))
EXPERTS = "blk.3.ffn_gate_up_exps.weight"
PR23112, COMBINED40, YGGDRASIL = (DIALECTS[name] for name in NAMES)


def where(dialect: str, part: str, layer: int = -1, expert: int = -1) -> Place:
    return DIALECTS[dialect].place(TensorKey(layer, part, expert), CONFIG)


@pytest.mark.parametrize("dialect", NAMES)
def test_names_and_shapes_of_two_layers_to_the_letter(dialect: str) -> None:
    found = {}
    for key in KEYS:
        place = DIALECTS[dialect].place(key, CONFIG)
        stored = layout.stored("hybrid", key, CONFIG.dims, CONFIG.layers)
        assert found.setdefault(place.name, (place.shape, stored.name)) == (
            place.shape,
            stored.name,
        )
        assert (place.expert, place.rows) == (stored.expert, stored.rows)
    assert found == NAMES[dialect]


def test_every_dialect_holds_every_tensor_once() -> None:
    hybrid = {layout.stored("hybrid", key, CONFIG.dims, CONFIG.layers).name for key in KEYS}
    for names in NAMES.values():
        held = [stored for _, stored in names.values()]
        assert len(held) == len(set(held)) == len(names)
        assert set(held) == hybrid


@pytest.mark.parametrize("dialect", NAMES)
def test_an_untied_head(dialect: str) -> None:
    untied = replace(CONFIG, tied=False)
    place = DIALECTS[dialect].place(TensorKey(-1, "lm_head.weight"), untied)
    assert (place.name, place.shape) == ("output.weight", (96, 64))


def test_experts_are_fused_with_gate_rows_first() -> None:
    gate = where("pr23112", "mlp.experts.gate_proj.weight", 1, 1)
    up = where("pr23112", "mlp.experts.up_proj.weight", 1, 0)
    down = where("pr23112", "mlp.experts.down_proj.weight", 1, 1)
    assert gate == Place(EXPERTS, (2, 128, 64), 1, (0, 64))
    assert up == Place(EXPERTS, (2, 128, 64), 0, (64, 128))
    assert down == Place("blk.3.ffn_down_exps.weight", (2, 64, 64), 1)


def test_only_combined40_stores_the_grouped_convolution_tap_by_tap() -> None:
    for dialect in NAMES:
        grouped = where(dialect, "self_attn.qkv_proj.conv_qk_grouped.weight", 0)
        depthwise = where(dialect, "self_attn.qkv_proj.conv_qk_depthwise.weight", 0)
        assert grouped.taps == (dialect == "combined40")
        assert not depthwise.taps


def test_residual_scales_of_a_40_layer_model() -> None:
    """They belong to the half-layer that reads them: the easiest place to slip."""
    config = ModelConfig(40, 64, 4, 2, 32, 2, 64, 256, 96)
    after = "post_mlp_residual_scale.residual_bias"
    expected = {
        ("pr23112", 7): "blk.16.res_scale_res.bias",
        ("pr23112", 38): "blk.78.res_scale_res.bias",
        ("pr23112", 39): "res_scale_res.bias",
        ("yggdrasil", 38): "blk.78.res_scale_res_b.bias",
        ("yggdrasil", 39): "res_scale_res_b.bias",
        ("combined40", 7): "blk.7.res_scale_res_mlp.bias",
        ("combined40", 39): "blk.39.res_scale_res_mlp.bias",
    }
    for (dialect, layer), name in expected.items():
        assert DIALECTS[dialect].place(TensorKey(layer, after), config).name == name
    assert {d.name: d.blocks(config) for d in DIALECTS.values()} == {
        "pr23112": 80,
        "combined40": 40,
        "yggdrasil": 80,
    }


@pytest.mark.parametrize("dialect", NAMES)
def test_a_dialect_is_told_from_its_names(dialect: str) -> None:
    assert detect(NAMES[dialect]) is DIALECTS[dialect]
    assert detect(dict.fromkeys([*NAMES[dialect], "blk.9.of_a_newer_fork.weight"]))


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["token_embd.weight", "blk.0.attn_norm.weight", "blk.0.ffn_gate_inp.weight"],
        ["blk.10.ffn_gate_inp.weight"],
        ["model.layers.0.mlp.experts.down_proj"],
    ],
)
def test_other_models_have_no_dialect(names: list[str]) -> None:
    assert detect(dict.fromkeys(names)) is None


EMBEDDING, QUERY = TensorKey(-1, "embed_tokens.weight"), "self_attn.qkv_proj.q_proj.weight"
EXPERT = TensorKey(1, "mlp.experts.up_proj.weight", 1)
FC1, OUT = "mlp.gate.router_mlp.fc1.weight", "mlp.gate.router_mlp.out_proj.weight"
GROUPED = "self_attn.qkv_proj.conv_qk_grouped.weight"
VECTORS = (
    "input_layernorm.weight", "self_attn.qk_norm.temp", "mlp.gate.router_mlp.fc1.bias",
    "mlp.gate.balancing_biases", "post_mlp_residual_scale.residual_scale",
    "self_attn.qkv_proj.conv_qk_grouped.bias", "mlp.gate.router_states_scale",
)  # fmt: skip


@pytest.mark.parametrize("wished", ["", "F32", "F16", "BF16"])
@pytest.mark.parametrize("dialect", NAMES)
def test_types_of_floats(dialect: str, wished: str) -> None:
    def kind(key: TensorKey | str) -> str:
        key = TensorKey(1, key) if isinstance(key, str) else key
        return DIALECTS[dialect].type_of(key, "BF16", wished)

    for matrix in (EMBEDDING, TensorKey(1, QUERY), EXPERT):
        assert kind(matrix) == (wished or "BF16")
    for matrix in (FC1, "mlp.gate.router_mlp.fc2.weight", OUT):
        assert kind(matrix) == (wished or "F32")
    # what first makes the router's input, and all vectors and convolutions: always F32, but that
    # one loader runs the grouped convolution in F16 only
    assert kind("mlp.gate.down_proj.weight") == "F32"
    assert kind("self_attn.qkv_proj.conv_qk_depthwise.weight") == "F32"
    assert kind(GROUPED) == ("F16" if dialect == "yggdrasil" else "F32")
    assert {kind(vector) for vector in VECTORS} == {"F32"}
    assert kind(TensorKey(-1, "norm.weight")) == "F32"


@pytest.mark.parametrize(
    ("dialect", "changes", "says"),
    [
        ("pr23112", {"attention_bias": True}, "attention biases have no name"),
        ("combined40", {"lm_head_bias": True}, "a bias of the head has no name"),
        ("yggdrasil", {"conv_taps": (3, 2)}, r"two taps, the model has \(3, 2\)"),
        ("pr23112", {"windows": (0, 9)}, "pr23112 has no sliding windows; use .* combined40"),
        ("yggdrasil", {"windows": (9, 9)}, "yggdrasil has no sliding windows"),
        ("combined40", {"windows": (9, 17)}, "windows of different sizes"),
        ("yggdrasil", {"router_width": 32}, "must be 256 wide, the model's is 32"),
        ("yggdrasil", {"kv_heads": 1}, "reads two key-value heads, the model has 1"),
        ("combined40", {"rotary_dim": 32}, "rotates half of every head"),
    ],
)
def test_what_a_dialect_has_no_form_for(dialect: str, changes: dict[str, Any], says: str) -> None:
    config = nano_config(layers=2, **{"router_width": 256, **changes})
    (problem,) = DIALECTS[dialect].problems(config)
    assert re.search(says, problem)


@pytest.mark.parametrize(
    ("dialect", "changes"),
    [
        ("pr23112", {"router_width": 32, "kv_heads": 1, "rotary_dim": 32, "tied": False}),
        ("combined40", {"windows": (0, 9), "kv_heads": 4}),
        ("combined40", {"windows": (9, 9)}),
        ("yggdrasil", {"tied": False, "rotary_dim": 8}),
    ],
)
def test_what_it_has_a_form_for(dialect: str, changes: dict[str, Any]) -> None:
    config = nano_config(layers=2, **{"router_width": 256, **changes})
    assert DIALECTS[dialect].problems(config) == []


def test_all_problems_together() -> None:
    config = nano_config(
        layers=2, attention_bias=True, lm_head_bias=True, windows=(9, 0), conv_taps=(2, 3),
        kv_heads=4,
    )  # fmt: skip
    assert len(YGGDRASIL.problems(config)) == 6
    assert len(PR23112.problems(config)) == 4
    assert len(COMBINED40.problems(config)) == 3
