"""Laws of ONNX output: what is written is read back bit for bit, wherever it lies and goes next."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nano import Nano
from synthetic import nano_config, synthetic_tensor, write_checkpoint
from zaya_convert import manifest
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.export.arrays import Array, Region, piece_of
from zaya_convert.export.container import PlannedFile, PlannedFiles
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_quant.methods import method
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

onnx = pytest.importorskip("onnx")

pytestmark = pytest.mark.usefixtures("one_thread")

SPECS = [
    QuantSpec(bits, group, symmetric, scale)
    for bits in (4, 8)
    for group, symmetric, scale in (
        (32, True, "float16"),
        (32, False, "float16"),
        (64, False, "bfloat16"),  # one zero point a row: half a byte
        (16, True, "float32"),
        (-1, True, "float16"),
    )
]


def recipe(spec: QuantSpec, *roles: str) -> Recipe:
    rules = (
        Rule(role, spec.bits, spec.group_size, spec.symmetric, spec.scale_dtype)
        for role in roles or ("experts", "attention", "embedding")
    )
    return Recipe("law", "", tuple(rules))


def same(a: QuantTensor, b: QuantTensor) -> bool:
    zeros = a.zeros is b.zeros is None or (
        a.zeros is not None and b.zeros is not None and torch.equal(a.zeros, b.zeros)
    )
    return (
        a.spec == b.spec
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.scales, b.scales)
        and zeros
    )


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): manifest.digest_file(p).sha256 for p in files}


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_read_after_write_is_identity(spec: QuantSpec, nano_hybrid: Path, tmp_path: Path) -> None:
    source = open_model(str(nano_hybrid))
    plan = make_plan(source, recipe(spec), "onnx")
    execute(plan, tmp_path / "a")
    artifact = open_model(str(tmp_path / "a"))
    assert artifact.format == "onnx"
    assert list(artifact.infos) == list(source.infos)
    assert artifact.config == source.config
    assert artifact.bytes == plan.bytes
    for step in plan.steps:
        original, value = source.read_float(step.key), artifact.read(step.key)
        if step.spec is None:
            assert isinstance(value, Tensor)
            assert torch.equal(value, original.float())
        else:
            expected = method("rtn")(original, step.spec, None)
            assert isinstance(value, QuantTensor)
            assert isinstance(expected, QuantTensor)
            assert same(value, expected)


@pytest.mark.parametrize("shard_bytes", [None, 60_000])
def test_planned_bytes_are_the_files_bytes(
    shard_bytes: int | None, nano_hybrid: Path, tmp_path: Path
) -> None:
    source = open_model(str(nano_hybrid))
    plan = make_plan(source, recipe(SPECS[0]), "onnx", shard_bytes)
    execute(plan, tmp_path / "a")
    path = tmp_path / "a" / "onnx" / "model_genai.onnx"  # the other one cuts experts apart
    graph = onnx.load(str(path), load_external_data=False).graph
    held: dict[str, tuple[str, int, int]] = {}
    for tensor in graph.initializer:
        if tensor.external_data:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            place = entries["location"], int(entries["offset"]), int(entries["length"])
            held[tensor.name] = place
    own = {array.name: array.bytes for array in plan.arrays}
    rotary = {name: held[name][2] for name in held if name.startswith("rotary.")}
    assert {name: held[name][2] for name in own} == own
    assert held.keys() - own.keys() - rotary.keys() == {"lm_head.qweight"}
    assert all(offset % 4096 == 0 for _, offset, _ in held.values())
    data = sorted((tmp_path / "a" / "onnx").glob("*.onnx_data*"))
    assert {path.name for path in data} == {file for file, _, _ in held.values()}
    assert (len(data) > 1) == (shard_bytes is not None)
    for path in data:
        # side by side: nothing overlaps, and the last one ends the file
        places = sorted({(at, size) for file, at, size in held.values() if file == path.name})
        ends = [0]
        for at, size in places:
            assert 0 <= at - ends[-1] < 4096
            ends.append(at + size)
        assert path.stat().st_size == ends[-1]


def test_neither_layout_nor_threads_change_a_byte(
    nano_hybrid: Path, nano_legacy: Path, tmp_path: Path
) -> None:
    found = []
    for number, (folder, threads) in enumerate(
        [(nano_hybrid, 1), (nano_hybrid, 5), (nano_legacy, 2)]
    ):
        plan = make_plan(open_model(str(folder)), recipe(SPECS[1]), "onnx")
        execute(plan, tmp_path / str(number), threads=threads)
        found.append(digests(tmp_path / str(number)))
    assert found[0] == found[1] == found[2]


def test_codes_go_on_to_other_formats_as_they_are(nano_f32: Path, tmp_path: Path) -> None:
    source, rules = open_model(str(nano_f32)), recipe(SPECS[0], "experts", "attention")
    execute(make_plan(source, rules, "onnx"), tmp_path / "onnx")
    execute(make_plan(source, rules, "compressed-tensors"), tmp_path / "direct")
    onward = make_plan(open_model(str(tmp_path / "onnx")), None, "compressed-tensors")
    execute(onward, tmp_path / "onward")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("direct", "onward"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    made = []
    for name in ("direct", "onward"):  # and from there to Q4_0
        artifact = open_model(str(tmp_path / name))
        execute(make_plan(artifact, None, "gguf-combined40"), tmp_path / f"{name}.gguf")
        made.append(open_model(str(tmp_path / f"{name}.gguf")))
    for key, info in made[0].infos.items():
        a, b = (checkpoint.read(key) for checkpoint in made)
        assert info.spec == made[1].infos[key].spec
        if isinstance(a, QuantTensor):
            assert isinstance(b, QuantTensor)
            assert same(a, b)


def test_artifacts_come_from_other_formats_as_they_are(nano_f32: Path, tmp_path: Path) -> None:
    source, rules = open_model(str(nano_f32)), recipe(SPECS[0], "experts", "attention")
    execute(make_plan(source, rules, "onnx"), tmp_path / "direct")
    execute(make_plan(source, rules, "compressed-tensors"), tmp_path / "ct")
    execute(make_plan(open_model(str(tmp_path / "ct")), None, "onnx"), tmp_path / "onward")
    one, two = (digests(tmp_path / n) for n in ("direct", "onward"))
    assert one["onnx/model.onnx_data"] == two["onnx/model.onnx_data"]


def extreme(scale: float) -> Callable[[TensorKey, tuple[int, ...]], Tensor]:
    def make(key: TensorKey, shape: tuple[int, ...]) -> Tensor:
        return synthetic_tensor(key, shape) * (scale if key.expert == 1 else 1.0)

    return make


def test_wider_scales_are_recorded_for_each_matrix(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "src", nano_config(layers=1), tensors=extreme(1e7))
    source = open_model(str(folder))
    result = execute(make_plan(source, recipe(SPECS[0]), "onnx"), tmp_path / "a")
    assert len(result.widened) == 3
    artifact = open_model(str(tmp_path / "a"))
    for key, info in artifact.infos.items():
        if isinstance(info.spec, QuantSpec):
            wide = key.expert == 1
            assert info.spec.scale_dtype == ("bfloat16" if wide else "float16")
            value, expected = (
                artifact.read(key),
                method("rtn")(source.read_float(key), info.spec, None),
            )
            assert isinstance(value, QuantTensor)
            assert isinstance(expected, QuantTensor)
            assert same(value, expected)


@pytest.mark.parametrize("resume", [True, False])
def test_an_interrupted_run_ends_the_same(resume: bool, nano_hybrid: Path, tmp_path: Path) -> None:
    plan = make_plan(open_model(str(nano_hybrid)), recipe(SPECS[0]), "onnx")
    execute(plan, tmp_path / "whole", threads=1)

    class Stop(Exception):
        pass

    done = 0

    def stop(_: int) -> None:
        nonlocal done
        done += 1
        if done == 100:
            raise Stop

    with pytest.raises(Stop):
        execute(plan, tmp_path / "a", threads=1, progress=stop)
    result = execute(plan, tmp_path / "a", threads=2, resume=resume)
    assert (result.resumed_steps > 50) == resume
    assert digests(tmp_path / "a") == digests(tmp_path / "whole")


def test_regions_that_take_turns(tmp_path: Path) -> None:
    array = Array("a", "U8", (3, 8, 5))
    draw = random.Random(1)
    want = bytearray(draw.randbytes(array.bytes))
    files = PlannedFiles(tmp_path, [PlannedFile("sub/f", 0, [array], [0])])
    parts: list[tuple[Region, bytes]] = []
    for expert in range(3):
        for turn in range(4):
            rows = [want[(8 * expert + row) * 5 :][:5] for row in range(turn, 8, 4)]
            region = piece_of(array, expert, turn=(turn, 4))
            parts.append((region, b"".join(rows)))
    draw.shuffle(parts)
    for region, data in parts:
        assert region.bytes == len(data)
        cuts = sorted(draw.choices(range(len(data) + 1), k=3))
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            files.write(region, data[begin:end], begin)
    for region, data in parts:
        for size in (1, 4, 5, 7, 100):
            assert b"".join(files.read(region, size)) == data
    files.close()
    assert (tmp_path / "sub" / "f").read_bytes() == want


def mixed(*changes: Rule) -> Recipe:
    return Recipe("law", "", (*changes, Rule("experts", 4, 32), Rule("attention", 8, 32)))


EXPERT = "model.layers.1.mlp.experts."


@pytest.mark.parametrize(
    ("rule", "unit"),
    [
        (Rule(f"{EXPERT}3.up_proj", 8, 32), "model.layers.1.mlp.experts"),
        (Rule("*down_proj", 8, 32), "model.layers.0.mlp.experts"),
        (Rule(f"{EXPERT}0.*", 4, 64), "model.layers.1.mlp.experts"),
        (Rule(f"{EXPERT}0.*", 4, 32, symmetric=False), "model.layers.1.mlp.experts"),
        (Rule(f"{EXPERT}7.gate_proj", keep=True), "model.layers.1.mlp.experts"),
        (Rule("*k_proj", 4, 32), "model.layers.2.self_attn.qkv_proj"),
        (Rule("*v_proj_delayed", keep=True), "model.layers.2.self_attn.qkv_proj"),
    ],
    ids=str,
)
def test_what_one_node_computes_has_one_form(rule: Rule, unit: str, nano_hybrid: Path) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(open_model(str(nano_hybrid)), mixed(rule), "onnx")
    assert any(line.startswith(f"{unit} is computed as one") for line in caught.value.problems)


def test_layers_and_the_output_projection_may_differ(nano_hybrid: Path, tmp_path: Path) -> None:
    rules = mixed(Rule(f"{EXPERT}*", 8, 64), Rule("*o_proj", 4, 16, symmetric=False))
    source = open_model(str(nano_hybrid))
    execute(make_plan(source, rules, "onnx"), tmp_path / "a")
    for info in open_model(str(tmp_path / "a")).infos.values():
        rule = rules.rule_for(info.key)
        assert info.spec == (rule.spec if rule else None)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({}, Rule("experts", 3, 32)),
        ({}, Rule("experts", 5, 32)),
        ({}, Rule("experts", 4, 48)),
        ({}, Rule("experts", 4, 128)),
        ({"expert_width": 96}, Rule("experts", 4, 64)),
        ({"expert_width": 96}, Rule("experts", 8, -1)),
        ({"expert_width": 128}, Rule("experts", 8, -1)),
        ({}, Rule("experts", type="Q4_1")),
    ],
    ids=str,
)
def test_grids_that_operators_do_not_take(changes: dict[str, Any], rule: Rule, nano: Nano) -> None:
    with pytest.raises(InputError):
        make_plan(open_model(str(nano(**changes))), Recipe("law", "", (rule,)), "onnx")
