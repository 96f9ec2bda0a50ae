"""The ONNX folder: names, shapes, flavours, configuration files, and damage that is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nano import Nano
from zaya_convert import layout, manifest
from zaya_convert.convert import execute
from zaya_convert.errors import InputError, UsageError
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule, for_type, load
from zaya_quant.spec import QuantSpec

onnx = pytest.importorskip("onnx")

from zaya_convert.export.onnx import graph, metadata  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(
    "unit", "", (Rule("experts", 4, 32), Rule("attention", 8, 32), Rule("embedding", 8, 32))
)
MODEL = Path("onnx") / "model.onnx"
GENAI = Path("onnx") / "model_genai.onnx"
DATA = Path("onnx") / "model.onnx_data"


@pytest.fixture(scope="module")
def written(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One artifact for all tests of this file, not to be changed."""
    out = tmp_path_factory.mktemp("onnx") / "a"
    execute(make_plan(open_model(str(nano())), RECIPE, "onnx", origin="org/name"), out)
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def loaded(path: Path) -> Any:
    return onnx.load(str(path), load_external_data=False)


def signature(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


def nodes(model: Any, kind: str) -> list[dict[str, Any]]:
    """The attributes of all nodes of a kind."""
    return [
        {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for node in model.graph.node
        if node.op_type == kind
    ]


@pytest.mark.parametrize("name", [MODEL, GENAI], ids=str)
def test_the_checker_agrees(written: Path, name: Path) -> None:
    onnx.checker.check_model(str(written / name), full_check=False)
    model = loaded(written / name)
    assert model.ir_version == 11
    assert {entry.domain: entry.version for entry in model.opset_import} == {
        "": 23, "com.microsoft": 1,
    }  # fmt: skip
    assert (written / name).stat().st_size < 100_000
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_inputs_and_outputs(written: Path) -> None:
    states = [
        ("key", ["batch_size", 2, "past_sequence_length", 32]),
        ("value", ["batch_size", 2, "past_sequence_length", 32]),
        ("conv_state", ["batch_size", 192, 2]),
        ("shift_state", ["batch_size", 32]),
    ]
    expected = {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        "num_logits_to_keep": [],
    } | {f"past_key_values.{i}.{name}": shape for i in range(3) for name, shape in states}
    model, genai = loaded(written / MODEL), loaded(written / GENAI)
    # transformers.js takes the length from the first input of a layer, so the order counts
    assert [*signature(model.graph.input).items()] == [*expected.items()]
    del expected["num_logits_to_keep"]
    assert [*signature(genai.graph.input).items()] == [*expected.items()]
    outputs = signature(model.graph.output)
    assert outputs.pop("logits") == ["batch_size", "num_logits", 96]
    present = {
        f"present.{i}.{name}": [
            "total_sequence_length" if d == "past_sequence_length" else d for d in shape
        ]
        for i in range(3)
        for name, shape in states
    }
    assert [*outputs.items()] == [*present.items()]
    assert signature(genai.graph.output)["logits"] == ["batch_size", 1, 96]


def test_operators(written: Path) -> None:
    model, genai = loaded(written / MODEL), loaded(written / GENAI)
    moe = nodes(genai, "QMoE")
    assert len(moe) == 3
    for node in moe:
        # onnxruntime 1.30 and older refuse a model whose QMoE has an accuracy level
        assert "accuracy_level" not in node
        assert (node["expert_weight_bits"], node["block_size"], node["k"]) == (4, 32, 1)
        assert (node["swiglu_fusion"], node["normalize_routing_weights"]) == (1, 0)
    # one for all projections of attention, one behind it, and the head
    assert len(nodes(genai, "MatMulNBits")) == 2 * 3 + 1
    assert all(node["accuracy_level"] == 4 for node in nodes(genai, "MatMulNBits"))
    # the other graph has two for each expert instead
    assert not nodes(model, "QMoE")
    levels = [(n["bits"], n["accuracy_level"]) for n in nodes(model, "MatMulNBits")]
    assert sorted(levels) == [(4, 0)] * (2 * 8 * 3) + [(8, 4)] * (2 * 3 + 1)
    for each in (model, genai):
        assert len(nodes(each, "GatherBlockQuantized")) == 1
        assert all(node["approximate"] == b"none" for node in nodes(each, "Gelu"))


def test_graphs_share_the_bytes_of_experts(written: Path) -> None:
    model, genai = loaded(written / MODEL), loaded(written / GENAI)
    whole = initializer(genai, SCALES)
    begin, size = (int(entry.value) for entry in whole.external_data[1:])
    assert list(whole.dims) == [8, 64, 2]
    for expert in range(8):
        part = initializer(model, f"{SCALES}.{expert}")
        own = [("location", "model.onnx_data"), ("offset", str(begin + expert * size // 8))]
        assert [(e.key, e.value) for e in part.external_data] == [*own, ("length", str(size // 8))]


def test_scalars_have_no_dimensions(written: Path) -> None:
    scalars = [t for t in loaded(written / MODEL).graph.initializer if t.name.endswith("float32")]
    assert len(scalars) == 3
    assert all(not tensor.dims for tensor in scalars)


def test_the_head_is_the_embedding(written: Path, nano: Nano, tmp_path: Path) -> None:
    tensors = {t.name: t for t in loaded(written / MODEL).graph.initializer}
    one, two = tensors["model.embed_tokens.qweight"], tensors["lm_head.qweight"]
    assert list(one.external_data) == list(two.external_data)
    assert (list(one.dims), list(two.dims)) == ([96, 64], [96, 2, 32])
    execute(make_plan(open_model(str(nano())), None, "onnx"), tmp_path / "f")
    plain = loaded(tmp_path / "f" / MODEL)
    users = [node.op_type for node in plain.graph.node if "model.embed_tokens.weight" in node.input]
    assert users == ["Gather", "Gemm"]
    assert not nodes(loaded(tmp_path / "f" / GENAI), "QMoE")


def test_an_exact_graph_rounds_no_activation(nano: Nano, tmp_path: Path) -> None:
    from zaya_convert.export.onnx.read import exact_graph

    for bits in (4, 8):
        out = tmp_path / str(bits)
        recipe = Recipe("unit", "", (Rule("experts", bits, 32), *RECIPE.rules[1:]))
        execute(make_plan(open_model(str(nano())), recipe, "onnx"), out)
        model = onnx.ModelProto.FromString(exact_graph(open_model(str(out)), routes=True))
        assert all(node["accuracy_level"] == 0 for node in nodes(model, "MatMulNBits"))
        assert [value.name for value in model.graph.output][-2:] == ["routes", "route_weights"]
        assert not nodes(model, "QMoE")


def test_configuration_files(written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    assert "cca_time1" not in config
    assert config["model_type"] == "zaya"
    assert config["transformers.js_config"] == {
        "dtype": "fp32",
        "use_external_data_format": {"model.onnx": 1},
    }
    genai = json.loads((written / "genai_config.json").read_text())
    decoder = genai["model"]["decoder"]
    assert (written / decoder["filename"]).is_file()
    model = loaded(written / decoder["filename"])
    inputs, outputs = signature(model.graph.input), signature(model.graph.output)
    held = {name.replace("%d", "2") for name in decoder["inputs"].values()}
    assert held <= inputs.keys()
    assert len(held) == 6
    assert {name.replace("%d", "2") for name in decoder["outputs"].values()} <= outputs.keys()
    assert genai["search"]["max_length"] <= genai["model"]["context_length"]


def test_data_files_are_counted(nano: Nano, tmp_path: Path) -> None:
    plan = make_plan(open_model(str(nano())), RECIPE, "onnx", shard_bytes=100_000)
    execute(plan, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    count = config["transformers.js_config"]["use_external_data_format"]["model.onnx"]
    names = ["model.onnx_data", *(f"model.onnx_data_{i}" for i in range(1, count))]
    assert count > 2
    assert sorted(p.name for p in (tmp_path / "a" / "onnx").glob("*_data*")) == sorted(names)


def test_metadata_say_where_it_came_from(written: Path) -> None:
    for name in (MODEL, GENAI):
        found = {e.key: e.value for e in loaded(written / name).metadata_props}
        assert found["zaya_convert.source.model"] == "org/name"
        assert found["zaya_convert.source.digest"] == manifest.read(written)["source"]["digest"]
        assert json.loads(found["zaya_convert.recipe"])["name"] == "unit"
        assert found["zaya_convert.skip_mode"] == "zero"
        assert len(found[metadata.SPECS]) < 2000


def test_specs_survive_as_runs() -> None:
    keys = list(layout.keys(2, 3, frozenset()))
    half, whole = QuantSpec(4, 32), QuantSpec(4, 32, scale_dtype="bfloat16")
    specs = [half if key.expert == 1 else whole if key.expert == 2 else None for key in keys]
    text = metadata.write_specs(specs)
    assert metadata.read_specs(text, keys) == dict(zip(keys, specs, strict=True))
    for wrong in (
        text[:-1],
        "{}",
        "[[null,1]]",
        '[[{"bits":4,"group_size":32},1000000000000]]',
        '[[{"bits":7,"group_size":32},1]]',
        '[[3,"x"]]',
        "[[null,true,1]]",
    ):
        with pytest.raises(InputError, match="damaged"):
            metadata.read_specs(wrong, keys)


def test_state_shapes_name_what_graphs_take(nano_model: Any) -> None:
    assert [*graph.state_shapes(nano_model, 7)] == list(graph.STATES)
    assert graph.state_shapes(nano_model, 7)["key"] == (2, 7, 32)


def test_floats_are_f32(nano_hybrid: Path) -> None:
    source = open_model(str(nano_hybrid))
    assert {a.dtype for a in make_plan(source, for_type("F32"), "onnx").arrays} == {"F32"}
    with pytest.raises(UsageError, match="hold floats so, not in BF16"):
        make_plan(source, for_type("BF16"), "onnx")


def test_the_default_recipe_fits(nano_hybrid: Path) -> None:
    plan = make_plan(open_model(str(nano_hybrid)), load("onnx-int4"), "onnx")
    labels = {step.spec.label for step in plan.steps if step.spec}
    assert labels == {"int4 group 32 symmetric float16", "int8 group 32 symmetric float16"}


def test_without_the_package(nano_hybrid: Path, written: Path, hidden: None) -> None:
    with pytest.raises(InputError, match=r"pip install 'zaya-convert\[onnx\]'"):
        make_plan(open_model(str(nano_hybrid)), RECIPE, "onnx")
    with pytest.raises(UsageError, match=r"pip install 'zaya-convert\[onnx\]'"):
        open_model(str(written))


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the package onnx were not installed."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name)
    )


# --- damage -------------------------------------------------------------------------------------


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    model = loaded(folder / MODEL)
    edit(model)
    (folder / MODEL).write_bytes(model.SerializeToString())


def initializer(model: Any, name: str) -> Any:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


QKV_SCALES = "model.layers.1.self_attn.qkv_proj.scales"
SCALES = "model.layers.1.mlp.experts.down_proj.scales"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "x", "'x' is unknown"),
        ("name", "x", f"'{QKV_SCALES}' is missing"),
        ("data_type", 7, "data type 7"),
        ("data_type", 2, "bytes of U8, expected F32"),
        ("length", "64", "is 64 bytes of F32, expected"),
        ("offset", "-1", "lies at bytes -1 to 2047"),
        ("offset", "1e3", "does not say where"),
        ("location", "../x", "leaves the folder"),
        ("location", "none", "cannot be read"),
    ],
)
def test_a_damaged_initializer(field: str, value: Any, message: str, copied: Path) -> None:
    def edit(model: Any) -> None:
        tensor = initializer(model, QKV_SCALES)
        if hasattr(tensor, field):
            setattr(tensor, field, value)
        else:
            next(e for e in tensor.external_data if e.key == field).value = value

    change(copied, edit)
    with pytest.raises(InputError, match=message):
        open_model(str(copied))


@pytest.mark.parametrize(
    ("expert", "field", "value"),
    [(0, "offset", "4096"), (1, "offset", "4096"), (2, "length", "4"), (0, "name", "x")],
)
def test_experts_that_do_not_make_up_an_array(
    expert: int, field: str, value: str, copied: Path
) -> None:
    def edit(model: Any) -> None:
        tensor = initializer(model, f"{SCALES}.{expert}")
        if field == "name":
            tensor.name = value
        else:
            next(e for e in tensor.external_data if e.key == field).value = value

    change(copied, edit)
    with pytest.raises(InputError, match=f"'{SCALES}': its experts do not lie one behind"):
        open_model(str(copied))


def test_an_expert_that_is_missing(copied: Path) -> None:
    change(
        copied,
        lambda model: model.graph.initializer.remove(initializer(model, f"{SCALES}.7")),
    )
    with pytest.raises(InputError, match=f"'{SCALES}' is 3584 bytes of F32, expected"):
        open_model(str(copied))


def test_missing_parts_of_a_graph(copied: Path) -> None:
    name = "rotary.1.sin"
    change(copied, lambda model: model.graph.initializer.remove(initializer(model, name)))
    with pytest.raises(InputError, match=f"'{name}' is missing"):
        open_model(str(copied))
    change(copied, lambda model: model.ClearField("metadata_props"))
    with pytest.raises(InputError, match="only what zaya-convert wrote"):
        open_model(str(copied))


def test_a_truncated_data_file(copied: Path) -> None:
    with (copied / DATA).open("r+b") as file:
        file.truncate((copied / DATA).stat().st_size - 1)
    with pytest.raises(InputError, match="fetch it again"):
        open_model(str(copied))


def test_no_graph_at_all(copied: Path) -> None:
    (copied / MODEL).write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="is no ONNX model"):
        open_model(str(copied))
    (copied / MODEL).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        open_model(str(copied))


def test_values_that_no_writer_of_ours_makes(copied: Path) -> None:
    artifact = open_model(str(copied))
    key, info = next((k, i) for k, i in artifact.infos.items() if i.spec)
    piece = info.pieces[".scales"]
    with piece.file.open("r+b") as file:
        file.seek(piece.begin)
        file.write(b"\x01\x00\x80\x3f")  # 1.0000001
    with pytest.raises(InputError, match="no float16 numbers"):
        artifact.read(key)


def test_verify_sees_a_flipped_bit_and_a_stray_file(copied: Path) -> None:
    assert manifest.verify(copied)["packing"] == "onnx"
    with (copied / DATA).open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    (copied / "onnx" / "stray").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        manifest.verify(copied)
    lines = caught.value.problems
    assert any("onnx/stray is not in the manifest" in line for line in lines)
    assert any("onnx/model.onnx_data: has changed" in line for line in lines)


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "./x", "a//b", "."])
def test_a_manifest_that_leaves_its_folder(name: str, copied: Path) -> None:
    facts = json.loads((copied / manifest.NAME).read_text())
    facts["files"][name] = facts["files"]["config.json"]
    (copied / manifest.NAME).write_text(json.dumps(facts))
    with pytest.raises(InputError, match="is damaged"):
        manifest.verify(copied)
