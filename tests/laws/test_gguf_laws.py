"""Laws of GGUF output: the gguf package reads what we wrote, we read it back, nothing is lost.

The gguf package, the literal names in ``dialects`` and plain numpy are the witnesses.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file

from dialects import NAMES, PACKINGS
from gguf_files import foreign, rewrite, written_elsewhere
from nano import Nano
from rounding import nearest
from synthetic import nano_config, write_checkpoint
from zaya_convert import layout
from zaya_convert.checkpoint import Checkpoint, torch_dtype
from zaya_convert.config import ModelConfig
from zaya_convert.convert import execute
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import Plan, make_plan
from zaya_convert.recipe import Recipe, Rule, adjusted, for_type
from zaya_convert.runtime.model import Model
from zaya_quant.methods import method
from zaya_quant.qtensor import BlockTensor, QuantTensor
from zaya_quant.spec import BLOCK_TYPES, QuantSpec, spec_of_type

gguf = pytest.importorskip("gguf")
quants = pytest.importorskip("gguf.quants")

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = ("F32", "F16", "BF16")
TYPES = (*FLOATS, *BLOCK_TYPES)
# Those that the gguf package can quantize, and so can say what the bytes must be.
PLAIN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# As small as a model can be whose rows are whole super-blocks, with what every dialect supports.
WIDE: dict[str, Any] = {
    "layers": 2, "experts": 2, "hidden": 256, "heads": 4, "head_dim": 64, "expert_width": 256,
    "router_width": 256, "vocab_rows": 64,
}  # fmt: skip
EMBEDDING = TensorKey(-1, "embed_tokens.weight")

Arrays = dict[str, tuple[str, NDArray[Any]]]  # name: type, data as the gguf package has it


def recipe(kind: str) -> Recipe:
    """What ``export --type`` uses."""
    return adjusted(for_type(kind), method="absmax")


def planned(folder: Path, dialect: str, kind: str, shard: int | None = None) -> Plan:
    return make_plan(open_model(str(folder)), recipe(kind), PACKINGS[dialect], shard)


def arrays(*paths: Path) -> Arrays:
    """The tensors of a file, or of the parts of one, read by the gguf package."""
    found = {}
    for path in paths:
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.name not in found
            found[tensor.name] = (tensor.tensor_type.name, np.array(tensor.data))
    return found


def values(kind: str, data: NDArray[Any]) -> NDArray[np.float32]:
    """A tensor's values according to the gguf package."""
    return quants.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float32)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal to the sign of zero."""
    return one.shape == two.shape and torch.equal(
        one.float().contiguous().view(torch.int32), two.float().contiguous().view(torch.int32)
    )


def logical(checkpoint: Checkpoint, key: TensorKey, dialect: str, held: Arrays) -> torch.Tensor:
    """A logical tensor, found in a file by the names of ``dialects``."""
    config = checkpoint.config
    stored = layout.stored("hybrid", key, config.dims, config.layers)
    (name,) = (name for name, (_, hybrid) in NAMES[dialect].items() if hybrid == stored.name)
    value = torch.from_numpy(values(*held[name]))
    if key.part.endswith("conv_qk_grouped.weight") and dialect == "combined40":
        value = value.permute(1, 2, 0)
    if stored.expert is not None:
        value = value[stored.expert]
    if stored.rows:
        value = value[slice(*stored.rows)]
    return value.reshape(checkpoint.infos[key].shape)


@pytest.fixture(scope="module")
def wide(nano: Nano) -> Path:
    return nano("hybrid", **WIDE)


@pytest.fixture(scope="module")
def wide_f32(nano: Nano) -> Path:
    return nano("hybrid", dtype=torch.float32, **WIDE)


@pytest.fixture(scope="module")
def written(
    wide: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Plan, Path, Arrays]]:
    """The plan, the file and its tensors for a dialect and a type; shared, made when asked for."""
    folder = tmp_path_factory.mktemp("gguf")

    @cache
    def make(dialect: str, kind: str) -> tuple[Plan, Path, Arrays]:
        plan, out = planned(wide, dialect, kind), folder / f"{dialect}-{kind}.gguf"
        result = execute(plan, out)
        assert (result.output, result.bytes) == (out, out.stat().st_size)
        return plan, out, arrays(out)

    return make


Written = Callable[[str, str], tuple[Plan, Path, Arrays]]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dialect", NAMES)
def test_the_gguf_package_reads_what_we_read(written: Written, dialect: str, kind: str) -> None:
    plan, path, held = written(dialect, kind)
    shapes = {
        tensor.name: tuple(reversed(tensor.shape.tolist()))
        for tensor in gguf.GGUFReader(path).tensors
    }
    assert [*held] == [array.name for array in plan.arrays]
    assert held.keys() == NAMES[dialect].keys()
    assert {a.name: (a.dtype, a.shape) for a in plan.arrays} == {
        name: (kind, shapes[name]) for name, (kind, _) in held.items()
    }
    artifact = open_model(str(path))
    assert artifact.format == f"gguf {dialect}"
    assert list(artifact.infos) == list(plan.source.infos)
    for key in artifact.infos:
        ours = artifact.read_float(key, torch.float32)
        assert same_bits(ours, logical(artifact, key, dialect, held)), str(key)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dialect", NAMES)
def test_read_after_write_is_identity(written: Written, dialect: str, kind: str) -> None:
    plan, path, _ = written(dialect, kind)
    artifact = open_model(str(path))
    for step in plan.steps:
        value, original = artifact.read(step.key), plan.source.read_float(step.key)
        if step.spec is None:
            dtype = next(iter(step.regions.values())).array.dtype
            assert isinstance(value, torch.Tensor)
            assert value.dtype == torch_dtype(dtype)
            assert same_bits(value, original.to(torch_dtype(dtype))), str(step.key)
            continue
        expected = method(step.method)(original, step.spec, None)
        assert not isinstance(value, torch.Tensor)
        assert type(value) is type(expected)
        assert value.spec == expected.spec == step.spec
        names = ("codes", "scales", "zeros")
        if isinstance(value, BlockTensor):
            names = ("codes", "scales", "offsets", "sub_scales", "sub_mins")
        for name in names:
            one, two = getattr(value, name), getattr(expected, name)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two), f"{step.key} {name}"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dialect", NAMES)
def test_sizes_and_parameters(written: Written, dialect: str, kind: str) -> None:
    plan, path, _ = written(dialect, kind)
    tensors = gguf.GGUFReader(path).tensors
    assert sum(math.prod(tensor.shape.tolist()) for tensor in tensors) == plan.source.weights
    assert sum(int(tensor.n_bytes) for tensor in tensors) == plan.bytes
    artifact = open_model(str(path))
    assert (artifact.weights, artifact.bytes) == (plan.weights, plan.bytes)
    # data begins where the header ends, and only alignment lies between tensors
    assert path.stat().st_size - int(tensors[0].data_offset) == sum(
        -(-int(tensor.n_bytes) // 32) * 32 for tensor in tensors
    )


MATRICES = ("token_embd.", "output.", "attn_q.", "attn_k.", "attn_output.", "cca_val_proj", "exps.")
ROUTER_MLP = (
    "ffn_gate.weight", "zaya_router_mlp0.weight", "zaya_router_mlp2.weight",
    "zaya_router_mlp4.weight",
)  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dialect", NAMES)
def test_router_convolutions_and_vectors_stay_floats(
    written: Written, dialect: str, kind: str
) -> None:
    embedding = kind if kind in (*FLOATS, "Q8_0") else "Q6_K"
    for name, (found, _) in written(dialect, kind)[2].items():
        shape, _ = NAMES[dialect][name]
        if "token_embd." in name:
            assert found == embedding
        elif any(part in name for part in MATRICES) and len(shape) > 1:
            assert found == kind, name
        elif name.endswith(ROUTER_MLP):
            assert found == (kind if kind in FLOATS else "F16"), name
        elif dialect == "yggdrasil" and name.endswith("cca_conv_grp.weight"):
            assert found == "F16"  # its loader takes nothing else
        else:
            assert found == "F32", name


@pytest.mark.parametrize("kind", PLAIN)
def test_blocks_are_those_of_the_gguf_package(written: Written, wide: Path, kind: str) -> None:
    tensors = load_file(wide / "model.safetensors")
    checked = 0
    for name, (found, data) in written("pr23112", kind)[2].items():
        if found != kind:
            continue
        original = tensors[NAMES["pr23112"][name][1]].float().numpy()
        theirs = quants.quantize(original, gguf.GGMLQuantizationType[kind])
        assert np.array_equal(data, theirs), name
        checked += 1
    assert checked >= 2 * (5 + 2)  # in each layer, attention and fused experts


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q5_K"])
@pytest.mark.parametrize("dialect", NAMES)
def test_layout_and_threads_do_not_change_a_byte(
    written: Written, nano: Nano, tmp_path: Path, dialect: str, kind: str
) -> None:
    made = {hashlib.sha256(written(dialect, kind)[1].read_bytes()).hexdigest()}
    for number, (form, threads) in enumerate([("hybrid", 1), ("hybrid", 2), ("legacy", 2)]):
        out = tmp_path / f"{number}.gguf"
        execute(planned(nano(form, **WIDE), dialect, kind), out, threads=threads)
        made.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(made) == 1


@pytest.mark.parametrize("dialect", NAMES)
def test_parts_hold_what_one_file_holds(
    written: Written, wide: Path, tmp_path: Path, dialect: str
) -> None:
    _, whole, held = written(dialect, "Q4_0")
    result = execute(planned(wide, dialect, "Q4_0", 100_000), tmp_path / "parts")
    files = sorted((tmp_path / "parts").glob("*.gguf"))
    total = len(files)
    assert total > 3
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{total:05d}.gguf" for i in range(1, total + 1)
    ]
    assert sum(file.stat().st_size for file in files) == result.bytes
    again = arrays(*files)
    assert [*again] == [*held]
    for name, (kind, data) in held.items():
        assert again[name][0] == kind
        assert np.array_equal(again[name][1], data)
    for number, file in enumerate(files):
        fields = gguf.GGUFReader(file).fields
        assert fields["split.no"].contents() == number
        assert fields["split.count"].contents() == total
        assert fields["split.tensors.count"].contents() == len(held)
        assert ("zaya.block_count" in fields) == (number == 0)
    one = open_model(str(whole))
    for path in (tmp_path / "parts", files[0], files[-1]):
        other = open_model(str(path))
        assert other.config == one.config
        assert other.files == tuple(files)
        assert all(same_bits(other.read_float(k), one.read_float(k)) for k in one.infos)


def test_the_grouped_convolution_comes_back_from_taps(written: Written, wide: Path) -> None:
    key = TensorKey(1, "self_attn.qkv_proj.conv_qk_grouped.weight")
    original = load_file(wide / "model.safetensors")[f"model.layers.1.{key.part}"]
    _, path, held = written("combined40", "F32")
    kind, data = held["blk.1.cca_conv_grp.weight"]
    assert (kind, data.shape) == ("F32", (2, 384, 64))
    assert np.array_equal(data, original.float().permute(2, 0, 1).numpy())
    assert same_bits(open_model(str(path)).read_float(key), original)


@pytest.mark.parametrize("split_experts", [False, True])
@pytest.mark.parametrize("dialect", NAMES)
def test_another_tools_file_is_the_same_model(
    written: Written, wide: Path, tmp_path: Path, dialect: str, split_experts: bool
) -> None:
    plan, path, held = written(dialect, "F32")
    other = written_elsewhere(
        tmp_path / "other.gguf", wide, plan.source.config, dialect, split_experts=split_experts
    )
    opened, ours = open_model(str(other)), open_model(str(path))
    assert opened.manifest == {}
    assert ours.config == plan.source.config
    no_ids = replace(ours.config, pad_id=None, bos_id=None, eos_ids=())  # it writes none
    assert opened.config == no_ids
    for key in ours.infos:
        same = same_bits(opened.read_float(key), ours.read_float(key))
        # this loader's grouped convolution is stored in F16
        assert same or (dialect == "yggdrasil" and key.part.endswith("grouped.weight")), str(key)
    if split_experts:
        return
    theirs = arrays(other)
    assert theirs.keys() == held.keys()
    for name, (kind, data) in held.items():
        assert np.array_equal(theirs[name][1].astype(data.dtype), data), f"{name} {kind}"


def unpacked(type: str, data: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Codes and scales of Q4_0 or Q8_0 rows, from the format's description."""
    size = 18 if type == "Q4_0" else 34
    blocks = data.reshape(*data.shape[:-1], -1, size)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    stored = blocks[..., 2:]
    if type == "Q4_0":  # element j in the low nibble of byte j, element j + 16 in its high one
        codes = np.concatenate([stored & 15, stored >> 4], axis=-1).astype(np.int8) - 8
    else:
        codes = np.ascontiguousarray(stored).view(np.int8)
    return codes.reshape(*data.shape[:-1], -1), scales


@pytest.mark.parametrize(("bits", "type"), [(4, "Q4_0"), (8, "Q8_0")])
def test_the_canonical_grid_crosses_formats_bit_for_bit(
    wide_f32: Path, tmp_path: Path, bits: int, type: str
) -> None:
    source = open_model(str(wide_f32))
    rules = (Rule("experts", bits, 32), Rule("attention", bits, 32))
    first, second, third = (tmp_path / name for name in ("1", "2.gguf", "3"))
    execute(make_plan(source, Recipe("canonical", "", rules), "compressed-tensors"), first)
    packed = open_model(str(first))
    execute(make_plan(packed, None, "gguf"), second)
    name, held = "blk.3.ffn_gate_up_exps.weight", arrays(second)
    kind, data = held[name]
    assert kind == type
    codes, scales = unpacked(type, data)
    for expert in range(2):
        for part, rows in (("gate_proj", slice(0, 256)), ("up_proj", slice(256, 512))):
            value = packed.read(TensorKey(1, f"mlp.experts.{part}.weight", expert))
            assert isinstance(value, QuantTensor)
            assert np.array_equal(codes[expert, rows], value.codes.numpy())
            assert np.array_equal(scales[expert, rows], value.scales.numpy())
    crossed = open_model(str(second))
    assert crossed.manifest["source"] == packed.manifest["source"]
    ids = torch.arange(40)[None] % 64
    one, two = (Model(model).forward(ids).logits for model in (packed, crossed))
    assert torch.equal(one, two)
    execute(make_plan(crossed, None, "compressed-tensors"), third)
    file = "model.safetensors"
    assert (third / file).read_bytes() == (first / file).read_bytes()


def test_a_bf16_model_comes_back_with_the_same_codes_and_values(wide: Path, tmp_path: Path) -> None:
    execute(make_plan(open_model(str(wide)), nearest(4), "compressed-tensors"), tmp_path / "1")
    one = open_model(str(tmp_path / "1"))
    execute(make_plan(one, None, "gguf"), tmp_path / "2.gguf")
    crossed = open_model(str(tmp_path / "2.gguf"))
    execute(make_plan(crossed, None, "compressed-tensors"), tmp_path / "3")
    before = load_file(tmp_path / "1" / "model.safetensors")
    after = load_file(tmp_path / "3" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "packed" in name or "scale" in name.rpartition(".")[2] or value.ndim == 2:
            assert torch.equal(after[name].to(value.dtype), value), name
        else:  # GGUF keeps vectors in F32
            assert same_bits(after[name], value), name


@pytest.mark.parametrize(
    ("spec", "type"),
    [
        (QuantSpec(4, 64), "Q4_0"),
        (QuantSpec(8, -1), "Q8_0"),
        (QuantSpec(5, 128), "Q5_0"),
        (QuantSpec(3, 32), "Q4_0"),
        (QuantSpec(6, 32), "Q8_0"),
    ],
    ids=str,
)
def test_coarser_grids_keep_their_values(
    wide: Path, tmp_path: Path, spec: QuantSpec, type: str
) -> None:
    rule = Rule("experts", spec.bits, spec.group_size)
    source = open_model(str(wide))
    execute(make_plan(source, Recipe("coarse", "", (rule,)), "gguf"), tmp_path / "q.gguf")
    opened = open_model(str(tmp_path / "q.gguf"))
    for key, info in opened.infos.items():
        if key.expert >= 0:
            value, expected = opened.read(key), method("rtn")(source.read_float(key), spec, None)
            assert info.spec == spec_of_type(type)
            assert isinstance(value, QuantTensor)
            assert torch.equal(value.codes, expected.codes)
            assert same_bits(value.dequantize(), expected.dequantize())


@pytest.mark.parametrize("dialect", NAMES)
def test_a_dialect_can_be_exchanged_for_another(
    written: Written, tmp_path: Path, dialect: str
) -> None:
    """By way of a file: what is in it is all there is."""
    original = open_model(str(written("combined40", "Q4_K")[1]))
    execute(make_plan(original, None, PACKINGS[dialect]), tmp_path / "out.gguf")
    held, expected = arrays(tmp_path / "out.gguf"), written(dialect, "Q4_K")[2]
    assert [*held] == [*expected]
    for name, (kind, data) in expected.items():
        if kind in BLOCK_TYPES:
            assert held[name][0] == kind
            assert np.array_equal(held[name][1], data), name
        else:
            assert np.array_equal(values(*held[name]), values(kind, data)), name


def test_a_float_file_runs_like_its_source(written: Written, wide: Path) -> None:
    ids = torch.arange(50)[None] % 64
    expected = Model(open_model(str(wide))).forward(ids).logits
    for dialect in ("pr23112", "combined40"):
        model = Model(open_model(str(written(dialect, "BF16")[1])))
        assert torch.equal(model.forward(ids).logits, expected)


def test_windows_survive_in_combined40(
    nano_hybrid: Path, nano_model: ModelConfig, tmp_path: Path
) -> None:
    assert any(nano_model.windows)
    plan = make_plan(open_model(str(nano_hybrid)), None, "gguf-combined40")
    out = tmp_path / "windows.gguf"
    execute(plan, out)
    opened = open_model(str(out))
    assert opened.config.windows == nano_model.windows
    assert opened.config.rope_thetas == nano_model.rope_thetas
    ids = torch.arange(60)[None] % 96
    one, two = (Model(model).forward(ids).logits for model in (plan.source, opened))
    assert torch.equal(one, two)


def test_the_dense_twin_of_a_file(written: Written, wide: Path, tmp_path: Path) -> None:
    original = open_model(str(wide))
    for kind in ("BF16", "Q5_K"):
        opened = open_model(str(written("pr23112", kind)[1]))
        execute(make_plan(opened, None, "dense"), tmp_path / kind)
        twin = open_model(str(tmp_path / kind))
        assert twin.format == "hybrid"
        for key in original.infos:
            expected = opened.read_float(key, torch.float32)
            if PART_BY_NAME[key.part].role != "float":
                expected = expected.bfloat16()
            assert same_bits(twin.read_float(key), expected)
            assert kind != "BF16" or same_bits(twin.read_float(key), original.read_float(key))


def test_another_tools_quantized_router_keeps_its_values(written: Written, tmp_path: Path) -> None:
    """llama-quantize rounds the router too; such a file is read, what is left goes on in F32."""

    def quantize(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(("ffn_gate_inp.weight", "zaya_router_mlp2.weight")):
                dtype = np.float32 if tensor.dtype == "F32" else np.float16
                plain = np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
                kind = gguf.GGMLQuantizationType.Q8_0
                tensor.data = quants.quantize(plain.astype(np.float32), kind).tobytes()
                tensor.dtype = "Q8_0"

    path = rewrite(
        written("pr23112", "Q8_0")[1], tmp_path / "theirs.gguf", keys=foreign, tensors=quantize
    )
    opened, key = open_model(str(path)), TensorKey(1, "mlp.gate.router_mlp.fc2.weight")
    assert opened.infos[key].spec == QuantSpec(8, 32)
    expected = torch.from_numpy(values(*arrays(path)["blk.3.zaya_router_mlp2.weight"]))
    assert same_bits(opened.read_float(key), expected)
    Model(opened).forward(torch.arange(4)[None])
    for packing in ("gguf-combined40", "dense"):
        out = tmp_path / ("out.gguf" if "gguf" in packing else "out")
        execute(make_plan(opened, None, packing), out)
        again = open_model(str(out))
        assert again.infos[key].dtype == "F32"
        assert same_bits(again.read_float(key), expected)


def test_a_model_of_unknown_origin_crosses_formats(written: Written, tmp_path: Path) -> None:
    """Quantized by another tool, so that no digest says of what."""
    theirs = rewrite(written("pr23112", "Q4_0")[1], tmp_path / "0.gguf", keys=foreign)
    one = open_model(str(theirs))
    execute(make_plan(one, None, "dense"), tmp_path / "1")
    two = open_model(str(tmp_path / "1"))
    execute(make_plan(two, None, "gguf"), tmp_path / "2.gguf")
    three = open_model(str(tmp_path / "2.gguf"))
    assert three.manifest["source"]["model"] == ""
    for key in two.infos:
        assert same_bits(two.read_float(key), three.read_float(key))


@settings(max_examples=10, deadline=None)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 5),
    heads=st.sampled_from([(2, 1), (2, 2), (6, 2)]),
    widths=st.tuples(*[st.sampled_from([32, 64, 96])] * 3),
    tied=st.booleans(),
    dialect=st.sampled_from(["pr23112", "combined40"]),
    window=st.sampled_from([0, 2, 9]),
    kind=st.sampled_from(["F32", "BF16", "Q4_0", "Q8_0", "Q4_K"]),
    shard=st.sampled_from([None, 20_000]),
)
def test_any_dimensions_there_and_back(
    tmp_path_factory: pytest.TempPathFactory,
    layers: int,
    experts: int,
    heads: tuple[int, int],
    widths: tuple[int, int, int],
    tied: bool,
    dialect: str,
    window: int,
    kind: str,
    shard: int | None,
) -> None:
    windows = tuple(window * (i % 2) * (dialect == "combined40") for i in range(layers))
    config = nano_config(
        layers=layers, experts=experts, heads=heads[0], kv_heads=heads[1], head_dim=32,
        hidden=widths[0], expert_width=widths[1], router_width=widths[2], vocab_rows=40,
        tied=tied, windows=windows,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dims")
    source = open_model(str(write_checkpoint(folder / "source", config)))
    plan = make_plan(source, recipe(kind), PACKINGS[dialect], shard)
    execute(plan, folder / "out")
    opened = open_model(str(folder / "out"))
    # without a tokenizer, no special tokens are told
    assert replace(opened.config, bos_id=2, pad_id=0, eos_ids=(1,)) == config
    assert list(opened.infos) == list(source.infos)
    for step in plan.steps:
        value, original = opened.read_float(step.key), source.read_float(step.key)
        if step.spec is not None:
            original = method(step.method)(original, step.spec, None).dequantize()
        assert same_bits(value, original.to(value.dtype)), str(step.key)
