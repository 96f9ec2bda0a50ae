"""Laws of the two layouts: one model has one set of tensors, however it is stored."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nano import Nano
from relayout import hybrid_config, relayout, stored_groups
from synthetic import nano_config
from zaya_convert import layout as layouts
from zaya_convert.checkpoint import Checkpoint, open_source
from zaya_convert.config import ModelConfig

FORMS = [(layout, n, index) for layout in ("hybrid", "legacy") for n, index in (
    (1, None), (1, True), (3, None), (3, False), (40, None),
)]  # fmt: skip


def same_tensors(one: Checkpoint, two: Checkpoint) -> None:
    assert one.config == two.config
    assert list(one.infos) == list(two.infos)
    for key, info in one.infos.items():
        a, b = one.read(key), two.read(key)
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        assert tuple(a.shape) == info.shape == two.infos[key].shape
        assert a.dtype == b.dtype
        assert torch.equal(a, b), str(key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("layout", "shards", "index"), FORMS)
def test_every_form_holds_the_same_bits(
    nano: Nano, layout: str, shards: int, index: bool | None, dtype: torch.dtype
) -> None:
    reference = open_source(nano("hybrid", dtype=dtype))
    other = open_source(nano(layout, dtype=dtype, shards=shards, index=index))
    assert other.format == layout
    assert len(other.files) <= shards
    assert (len(other.files) > 1) == (shards > 1)
    assert (other.path / "model.safetensors.index.json").exists() == (
        shards > 1 if index is None else index
    )
    same_tensors(reference, other)


@pytest.mark.parametrize("lying", [False, True])
def test_a_lying_legacy_config_changes_nothing(nano: Nano, lying: bool) -> None:
    other = open_source(nano("legacy", lying=lying))
    assert bool(other.notes) == lying
    same_tensors(open_source(nano("hybrid")), other)


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 5),
    heads=st.sampled_from([(2, 1), (2, 2), (6, 2)]),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    widths=st.tuples(*[st.sampled_from([4, 6, 10])] * 4),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    window=st.sampled_from([0, 2, 9]),
    shards=st.integers(1, 4),
)
def test_any_dimensions_there_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    layers: int,
    experts: int,
    heads: tuple[int, int],
    taps: tuple[int, int],
    widths: tuple[int, int, int, int],
    flags: tuple[bool, bool, bool],
    window: int,
    shards: int,
) -> None:
    from synthetic import write_checkpoint

    config = nano_config(
        layers=layers, experts=experts, heads=heads[0], kv_heads=heads[1], conv_taps=taps,
        hidden=widths[0], expert_width=widths[1], router_width=widths[2], head_dim=4,
        vocab_rows=widths[3], rotary_dim=2, attention_bias=flags[0], lm_head_bias=flags[1],
        tied=flags[2], windows=tuple(window * (i % 2) for i in range(layers)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dims")
    write_checkpoint(folder / "hybrid", config, shards=shards)
    hybrid = open_source(folder / "hybrid")
    assert hybrid.config == config
    relayout(hybrid, folder / "legacy", "legacy", shards=shards)
    legacy = open_source(folder / "legacy")
    same_tensors(hybrid, legacy)
    relayout(legacy, folder / "back", "hybrid", shards=shards)
    same_tensors(hybrid, open_source(folder / "back"))
    for name in ("config.json", *(path.name for path in hybrid.files)):
        assert (folder / "back" / name).read_bytes() == (folder / "hybrid" / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 1},
        {"windows": (0, 9, 0)},
        {"attention_bias": True},
        {"lm_head_bias": True},
        {"tied": False},
        {"conv_taps": (3, 4), "experts": 5, "heads": 6, "kv_heads": 2},
    ],
    ids=str,
)
def test_hybrid_names_and_shapes_are_those_of_transformers(changes: dict) -> None:
    transformers = pytest.importorskip("transformers")
    config = nano_config(**changes)
    with torch.device("meta"):
        model = transformers.ZayaForCausalLM(transformers.ZayaConfig(**hybrid_config(config)))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied:
        assert theirs.pop("lm_head.weight") == theirs["model.embed_tokens.weight"]
    ours = {name: shape for name, (shape, _) in stored_groups("hybrid", config).items()}
    assert ours == theirs


def test_transformers_loads_our_files_with_the_very_values(nano_f32: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, report = transformers.ZayaForCausalLM.from_pretrained(
        nano_f32, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs, ours = model.state_dict(), open_source(nano_f32)
    width = ours.config.expert_width
    for key in ours.infos:
        value = ours.read_float(key)
        place = layouts.stored("hybrid", key, ours.config.dims, ours.config.layers)
        stored = theirs[place.name]
        if key.part == "mlp.gate.balancing_biases":
            # transformers sets the skip expert's bias to -1 whatever the file holds
            value, stored = value[:-1], stored[:-1]
        if key.expert >= 0:
            stored = stored[key.expert]
        if key.part == "mlp.experts.gate_proj.weight":
            stored = stored[:width]
        if key.part == "mlp.experts.up_proj.weight":
            stored = stored[width:]
        assert torch.equal(value, stored), str(key)


TWO_LAYERS_LEGACY = """
model.embed_tokens.weight 96 64
model.final_norm.weight 64
model.layers.0.res_scale.hidden_states_scale 64
model.layers.0.res_scale.hidden_states_bias 64
model.layers.0.input_norm.weight 64
model.layers.0.self_attn.qkv.linear_q.weight 128 64
model.layers.0.self_attn.qkv.linear_k.weight 64 64
model.layers.0.self_attn.qkv.val_proj1.weight 32 64
model.layers.0.self_attn.qkv.val_proj2.weight 32 64
model.layers.0.self_attn.qkv.conv_qk.0.weight 192 1 2
model.layers.0.self_attn.qkv.conv_qk.0.bias 192
model.layers.0.self_attn.qkv.conv_qk.1.weight 192 32 2
model.layers.0.self_attn.qkv.conv_qk.1.bias 192
model.layers.0.self_attn.qkv.temp 2
model.layers.0.self_attn.o_proj.weight 64 128
model.layers.1.res_scale.hidden_states_scale 64
model.layers.1.res_scale.hidden_states_bias 64
model.layers.1.res_scale.residual_scale 64
model.layers.1.res_scale.residual_bias 64
model.layers.1.input_norm.weight 64
model.layers.1.zaya_block.router.down_proj.weight 32 64
model.layers.1.zaya_block.router.down_proj.bias 32
model.layers.1.zaya_block.router.rmsnorm_eda.weight 32
model.layers.1.zaya_block.router.router_mlp.0.weight 32 32
model.layers.1.zaya_block.router.router_mlp.0.bias 32
model.layers.1.zaya_block.router.router_mlp.2.weight 32 32
model.layers.1.zaya_block.router.router_mlp.2.bias 32
model.layers.1.zaya_block.router.router_mlp.4.weight 3 32
model.layers.1.zaya_block.router.balancing_biases 3
model.layers.1.zaya_block.experts.local_experts.0.linear_fc1.weight 128 64
model.layers.1.zaya_block.experts.local_experts.0.linear_fc2.weight 64 64
model.layers.1.zaya_block.experts.local_experts.1.linear_fc1.weight 128 64
model.layers.1.zaya_block.experts.local_experts.1.linear_fc2.weight 64 64
model.layers.2.res_scale.hidden_states_scale 64
model.layers.2.res_scale.hidden_states_bias 64
model.layers.2.res_scale.residual_scale 64
model.layers.2.res_scale.residual_bias 64
model.layers.2.input_norm.weight 64
model.layers.2.self_attn.qkv.linear_q.weight 128 64
model.layers.2.self_attn.qkv.linear_k.weight 64 64
model.layers.2.self_attn.qkv.val_proj1.weight 32 64
model.layers.2.self_attn.qkv.val_proj2.weight 32 64
model.layers.2.self_attn.qkv.conv_qk.0.weight 192 1 2
model.layers.2.self_attn.qkv.conv_qk.0.bias 192
model.layers.2.self_attn.qkv.conv_qk.1.weight 192 32 2
model.layers.2.self_attn.qkv.conv_qk.1.bias 192
model.layers.2.self_attn.qkv.temp 2
model.layers.2.self_attn.o_proj.weight 64 128
model.layers.3.res_scale.hidden_states_scale 64
model.layers.3.res_scale.hidden_states_bias 64
model.layers.3.res_scale.residual_scale 64
model.layers.3.res_scale.residual_bias 64
model.layers.3.input_norm.weight 64
model.layers.3.zaya_block.router.down_proj.weight 32 64
model.layers.3.zaya_block.router.down_proj.bias 32
model.layers.3.zaya_block.router.router_states_scale 32
model.layers.3.zaya_block.router.rmsnorm_eda.weight 32
model.layers.3.zaya_block.router.router_mlp.0.weight 32 32
model.layers.3.zaya_block.router.router_mlp.0.bias 32
model.layers.3.zaya_block.router.router_mlp.2.weight 32 32
model.layers.3.zaya_block.router.router_mlp.2.bias 32
model.layers.3.zaya_block.router.router_mlp.4.weight 3 32
model.layers.3.zaya_block.router.balancing_biases 3
model.layers.3.zaya_block.experts.local_experts.0.linear_fc1.weight 128 64
model.layers.3.zaya_block.experts.local_experts.0.linear_fc2.weight 64 64
model.layers.3.zaya_block.experts.local_experts.1.linear_fc1.weight 128 64
model.layers.3.zaya_block.experts.local_experts.1.linear_fc2.weight 64 64
model.res_scale.hidden_states_scale 64
model.res_scale.hidden_states_bias 64
model.res_scale.residual_scale 64
model.res_scale.residual_bias 64
"""


def test_legacy_names_of_two_layers_to_the_letter() -> None:
    expected = {}
    for line in TWO_LAYERS_LEGACY.split("\n")[1:-1]:
        name, *shape = line.split()
        expected[name] = tuple(map(int, shape))
    ours = {n: s for n, (s, _) in stored_groups("legacy", nano_config(layers=2, experts=2)).items()}
    assert ours == expected


def test_a_few_pairs_of_names_in_a_40_layer_model() -> None:
    """The residual scales belong to the half-layer that reads them: the easiest place to slip."""
    config = ModelConfig(40, 64, 4, 2, 32, 2, 64, 32, 96)
    pairs = {
        "input_hidden_states_scale": (-1, "model.layers.0.res_scale.hidden_states_scale"),
        "post_attention_residual_scale.residual_scale": (
            7,
            "model.layers.15.res_scale.residual_scale",
        ),
        "post_mlp_residual_scale.residual_bias": (7, "model.layers.16.res_scale.residual_bias"),
        "post_mlp_residual_scale.residual_scale": (39, "model.res_scale.residual_scale"),
        "self_attn.qkv_proj.v_proj_delayed.weight": (
            39,
            "model.layers.78.self_attn.qkv.val_proj2.weight",
        ),
        "mlp.gate.router_mlp.fc2.weight": (
            0,
            "model.layers.1.zaya_block.router.router_mlp.2.weight",
        ),
    }
    for part, (layer, name) in pairs.items():
        key = layouts.TensorKey(layer, part)
        assert layouts.stored("legacy", key, config.dims, config.layers).name == name


def test_older_hybrid_files_with_the_legacy_router_norm_name(
    nano_hybrid: Path, tmp_path: Path, operate
) -> None:
    (tmp_path / "config.json").write_bytes((nano_hybrid / "config.json").read_bytes())
    file = tmp_path / "model.safetensors"
    file.write_bytes((nano_hybrid / file.name).read_bytes())

    def rename(tensors: dict) -> None:
        for name in [n for n in tensors if n.endswith("router_mlp.norm.weight")]:
            older = name.replace("router_mlp.norm", "rmsnorm_eda")
            tensors[older] = tensors.pop(name)

    operate(file, rename)
    same_tensors(open_source(nano_hybrid), open_source(tmp_path))


def test_relayout_carries_side_files_and_keeps_a_config_it_need_not_change(
    nano_legacy: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in nano_legacy.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    raw = json.loads((source / "config.json").read_text()) | {"an_odd_field": [1, 2]}
    (source / "config.json").write_text(json.dumps(raw))
    (source / "tokenizer.json").write_bytes(b'{"model": "\xc3\xa9"}\r\n')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    relayout(open_source(source), tmp_path / "same", "legacy", shards=2)
    relayout(open_source(source), tmp_path / "other", "hybrid")
    assert json.loads((tmp_path / "same" / "config.json").read_text()) == raw
    for name in ("same", "other"):
        for side in ("tokenizer.json", "chat_template.jinja"):
            assert (tmp_path / name / side).read_bytes() == (source / side).read_bytes()
        same_tensors(open_source(source), open_source(tmp_path / name))
