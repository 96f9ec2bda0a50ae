"""Both generations of ``config.json`` become one description; what makes no sense is refused."""

import copy
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayout import hybrid_config, legacy_config, stored_groups
from synthetic import make_config, nano_config, preset_config
from zaya_convert.config import ModelConfig, normalise
from zaya_convert.errors import InputError

EIGHT_B: dict[str, Any] = {
    # as published with Zyphra/ZAYA1-8B; the rope_type beside the nested entries is really there
    "architectures": ["ZayaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "cca_time0": 2,
    "cca_time1": 2,
    "dtype": "bfloat16",
    "eos_token_id": 106,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "layer_types": ["hybrid"] * 40,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "model_type": "zaya",
    "moe_intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {
        "hybrid": {"partial_rotary_factor": 0.5, "rope_theta": 5000000.0, "rope_type": "default"},
        "hybrid_sliding": {
            "partial_rotary_factor": 0.5,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "rope_type": "default",
    },
    "router_hidden_size": 256,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "vocab_size": 262272,
}
EIGHT_B_LEGACY: dict[str, Any] = {
    "architectures": ["ZayaForCausalLM"],
    "model_type": "zaya",
    "activation_func": "swiglu",
    "bos_token_id": 2,
    "eos_token_id": 106,
    "pad_token_id": 0,
    "cca": True,
    "ffn_hidden_size": 4096,
    "hidden_size": 2048,
    "mamba_cache_dtype": "float32",
    "max_position_embeddings": 131072,
    "norm_epsilon": 1e-05,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_hidden_layers": 80,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rope_scaling": False,
    "rope_theta": 5000000,
    "scale_residual_merge": True,
    "tie_word_embeddings": True,
    "use_eda": True,
    "use_mod": True,
    "vocab_size": 262272,
    "zaya_mlp_expansion": 256,
}
MODEL_8B = ModelConfig(
    layers=40, hidden=2048, heads=8, kv_heads=2, head_dim=128, experts=16, expert_width=2048,
    router_width=256, vocab_rows=262272, conv_taps=(2, 2), windows=(0,) * 40,
    rope_thetas=(5e6,) * 40, rotary_dim=64, eps=1e-5, max_positions=131072, tied=True, pad_id=0,
    bos_id=2, eos_ids=(106,),
)  # fmt: skip


def shapes_of(layout: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (shape, _) in stored_groups(layout, config).items()}


def test_hybrid_8b_as_published() -> None:
    config, notes = normalise(EIGHT_B, "hybrid", {})
    assert (config, notes) == (MODEL_8B, [])


def test_legacy_8b_as_published() -> None:
    config, notes = normalise(EIGHT_B_LEGACY, "legacy", shapes_of("legacy", MODEL_8B))
    assert (config, notes) == (MODEL_8B, [])


def test_legacy_router_width_as_a_list() -> None:
    raw = EIGHT_B_LEGACY | {"zaya_mlp_expansion": [0, 256] * 40}
    config, notes = normalise(raw, "legacy", shapes_of("legacy", MODEL_8B))
    assert (config, notes) == (MODEL_8B, [])


def test_legacy_base_config_lies_and_the_tensors_are_believed() -> None:
    raw = EIGHT_B_LEGACY | {
        "num_hidden_layers": 120,
        "num_attention_heads": 16,
        "kv_channels": 128,
        "num_experts": [0, 16] * 60,
        "ffn_hidden_size": [0, 4096] * 60,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "eos_token_id": 1,
    }
    config, notes = normalise(raw, "legacy", shapes_of("legacy", MODEL_8B))
    assert (config.layers, config.heads, config.head_dim, config.experts) == (40, 8, 128, 16)
    assert (config.rope_thetas, config.max_positions) == ((1e6,) * 40, 32768)
    assert config.eos_ids == (1,)
    assert len(notes) == 2
    assert "num_hidden_layers" in notes[0]
    assert "120" in notes[0]
    assert "80" in notes[0]
    assert "num_attention_heads" in notes[1]


def seventy_four_b() -> ModelConfig:
    return make_config(
        layers=60, hidden=4096, heads=16, kv_heads=2, head_dim=128, experts=24, expert_width=4096,
        router_width=512, vocab_rows=262272, windows=(0, 4097) * 30,
    )  # fmt: skip


def test_74b_hybrid_windows_and_thetas_per_layer() -> None:
    raw = EIGHT_B | {
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_attention_heads": 16,
        "num_experts": 24,
        "moe_intermediate_size": 4096,
        "router_hidden_size": 512,
        "layer_types": ["hybrid", "hybrid_sliding"] * 30,
        "sliding_window": 4097,
    }
    config, _ = normalise(raw, "hybrid", {})
    assert config == seventy_four_b()
    assert config.windows[:4] == (0, 4097, 0, 4097)
    assert config.rope_thetas[:4] == (5e6, 1e4, 5e6, 1e4)


def test_74b_legacy_window_list_counts_the_tokens_before() -> None:
    raw = EIGHT_B_LEGACY | {
        "num_hidden_layers": 120,
        "hidden_size": 4096,
        "num_attention_heads": 16,
        "num_experts": 24,
        "ffn_hidden_size": 8192,
        "zaya_mlp_expansion": 512,
        "swa_layers": [0, 0, 4096, 0] * 30,
        "swa_rotary_base": 10000,
    }
    config, notes = normalise(raw, "legacy", shapes_of("legacy", seventy_four_b()))
    assert (config, notes) == (seventy_four_b(), [])


@pytest.mark.parametrize(
    "config",
    [
        nano_config(),
        nano_config(windows=(0, 9, 0), rope_thetas=(123.0, 45.0, 123.0)),
        nano_config(windows=(7, 7, 7)),
        nano_config(layers=1, experts=2, rotary_dim=32, eps=1e-6, eos_ids=(1, 5), pad_id=None),
        nano_config(attention_bias=True, lm_head_bias=True, tied=False, conv_taps=(3, 4)),
        preset_config("8b"),
        preset_config("74b-narrow"),
        seventy_four_b(),
    ],
)
def test_written_configs_of_both_generations_read_back_as_the_same_model(
    config: ModelConfig,
) -> None:
    hybrid = json.loads(json.dumps(hybrid_config(config)))
    assert normalise(hybrid, "hybrid", shapes_of("hybrid", config)) == (config, [])
    legacy = json.loads(json.dumps(legacy_config(config)))
    assert normalise(legacy, "legacy", shapes_of("legacy", config)) == (config, [])
    lying = json.loads(json.dumps(legacy_config(config, lying=True)))
    believed, notes = normalise(lying, "legacy", shapes_of("legacy", config))
    assert believed == config
    assert notes


def test_transformers_reads_our_hybrid_config_as_the_same_numbers() -> None:
    transformers = pytest.importorskip("transformers")
    config = seventy_four_b()
    theirs = transformers.ZayaConfig(**hybrid_config(config))
    assert theirs.num_hidden_layers == config.layers
    assert theirs.sliding_window == 4097
    assert theirs.layer_types == ["hybrid", "hybrid_sliding"] * 30
    assert theirs.rope_parameters["hybrid_sliding"]["rope_theta"] == 1e4
    assert theirs.rope_parameters["hybrid"]["rope_theta"] == 5e6


def test_nested_rope_without_a_factor_rotates_whole_heads_as_transformers_does() -> None:
    raw = copy.deepcopy(EIGHT_B)
    del raw["rope_parameters"]["hybrid"]["partial_rotary_factor"]
    config, _ = normalise(raw, "hybrid", {})
    assert config.rotary_dim == 128


def test_rope_left_out_takes_the_published_defaults() -> None:
    raw = {name: value for name, value in EIGHT_B.items() if name != "rope_parameters"}
    assert normalise(raw, "hybrid", {}) == (MODEL_8B, [])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown layer type": ({"layer_types": ["hybrid"] * 39 + ["mamba"]}, "mamba"),
    "too few layer types": ({"layer_types": ["hybrid"] * 39}, "layer_types"),
    "layer types no list": ({"layer_types": "hybrid"}, "layer_types"),
    "sliding without a window": ({"layer_types": ["hybrid_sliding"] * 40}, "sliding_window"),
    "negative window": (
        {"layer_types": ["hybrid_sliding"] * 40, "sliding_window": -1},
        "sliding_window",
    ),
    "another model": ({"model_type": "llama"}, "model_type"),
    "two experts per token": ({"num_experts_per_tok": 2}, "num_experts_per_tok"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "negative hidden size": ({"hidden_size": -2048}, "hidden_size"),
    "hidden size as text": ({"hidden_size": "2048"}, "hidden_size"),
    "hidden size as float": ({"hidden_size": 2048.0}, "hidden_size"),
    "hidden size as boolean": ({"hidden_size": True}, "hidden_size"),
    "a billion layers": ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers"),
    "layers of 10^400": ({"num_hidden_layers": 10**400, "layer_types": None}, "num_hidden_layers"),
    "a billion experts": ({"num_experts": 10**9}, "experts"),
    "missing hidden size": ({"hidden_size": None}, "hidden_size is missing"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "3 key-value heads"),
    "no epsilon": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "epsilon as text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
    "epsilon not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "eos as text": ({"eos_token_id": "</s>"}, "eos_token_id"),
    "negative eos in a list": ({"eos_token_id": [1, -1]}, "eos_token_id"),
    "negative bos": ({"bos_token_id": -1}, "bos_token_id"),
    "scaled rope": ({"rope_scaling": {"type": "yarn", "factor": 4}}, "yarn"),
    "rope of another type": (
        {"rope_parameters": {"hybrid": {"rope_type": "llama3", "rope_theta": 1e6}}},
        "llama3",
    ),
    "flat rope of another type": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        "yarn",
    ),
    "negative theta": ({"rope_parameters": {"hybrid": {"rope_theta": -1}}}, "rope_theta"),
    "rope no object": ({"rope_parameters": {"hybrid": 5e6}}, "rope_parameters.hybrid"),
    "rotary part beyond the head": (
        {"rope_parameters": {"hybrid": {"partial_rotary_factor": 2.0}}},
        "rotary",
    ),
    "two rotary parts": (
        {
            "layer_types": ["hybrid", "hybrid_sliding"] * 20,
            "sliding_window": 9,
            "rope_parameters": {
                "hybrid": {"partial_rotary_factor": 0.5},
                "hybrid_sliding": {"partial_rotary_factor": 0.25},
            },
        },
        "different shares",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused_by_name_and_at_once(name: str) -> None:
    changes, expected = REFUSED[name]
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        normalise(EIGHT_B | changes, "hybrid", {})
    assert time.monotonic() - began < 1
    assert "config.json" in str(caught.value)
    assert expected in str(caught.value)


def test_all_problems_come_in_one_message() -> None:
    raw = EIGHT_B | {
        "hidden_size": -1,
        "num_hidden_layers": None,
        "model_type": "llama",
        "rms_norm_eps": -1.0,
        "eos_token_id": "x",
    }
    with pytest.raises(InputError) as caught:
        normalise(raw, "hybrid", {})
    for name in ("hidden_size", "num_hidden_layers", "model_type", "rms_norm_eps", "eos_token_id"):
        assert any(name in problem for problem in caught.value.problems), name


def test_empty_config() -> None:
    with pytest.raises(InputError, match="hidden_size is missing"):
        normalise({}, "hybrid", {})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"swa_layers": ["x"] * 80}, "swa_layers"),
        ({"swa_layers": [-1] * 80}, "swa_layers"),
        ({"swa_layers": [10**12] * 80}, "swa_layers"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"norm_epsilon": -1}, "norm_epsilon"),
        ({"activation_func": "gelu"}, "activation_func"),
        ({"zaya_use_eda": False}, "zaya_use_eda"),
        ({"use_eda": False}, "use_eda"),
    ],
)
def test_legacy_nonsense_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        normalise(EIGHT_B_LEGACY | changes, "legacy", shapes_of("legacy", MODEL_8B))


def test_legacy_dimensions_survive_one_damaged_tensor() -> None:
    shapes = shapes_of("legacy", MODEL_8B)
    shapes["model.layers.6.input_norm.weight"] = (77,)
    shapes["model.layers.7.zaya_block.router.router_mlp.4.weight"] = (3, 256)
    assert normalise(EIGHT_B_LEGACY, "legacy", shapes)[0] == MODEL_8B


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["hybrid", 10**9, -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@settings(max_examples=300, deadline=5000)
@given(st.dictionaries(st.sampled_from(sorted(EIGHT_B)), json_values, max_size=4))
def test_any_json_gives_a_model_or_an_input_error_hybrid(changes: dict[str, Any]) -> None:
    try:
        config, _ = normalise(EIGHT_B | changes, "hybrid", {})
    except InputError:
        pass
    else:
        assert len(config.windows) == len(config.rope_thetas) == config.layers


@settings(max_examples=100, deadline=5000)
@given(
    st.dictionaries(
        st.sampled_from([*sorted(EIGHT_B_LEGACY), "swa_layers", "swa_rotary_base"]),
        json_values,
        max_size=4,
    )
)
def test_any_json_gives_a_model_or_an_input_error_legacy(changes: dict[str, Any]) -> None:
    raw = EIGHT_B_LEGACY | changes
    try:
        config, _ = normalise(raw, "legacy", shapes_of("legacy", nano_config()))
    except InputError:
        pass
    else:
        assert len(config.windows) == len(config.rope_thetas) == config.layers == 3
