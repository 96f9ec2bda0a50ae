"""Laws of every packing: what is written is read back bit for bit, at the size that was planned."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zaya_convert import manifest, work
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.export import FORMATS
from zaya_convert.headers import read_header
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_quant.methods.rtn import quantize
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

SPECS = [
    QuantSpec(4, 32),
    QuantSpec(8, 32),
    QuantSpec(4, 64),
    QuantSpec(8, -1),
    QuantSpec(4, -1),
    QuantSpec(2, 32),
    QuantSpec(3, 32),
    QuantSpec(5, 16),
    QuantSpec(6, 32),
    QuantSpec(4, 32, scale_dtype="bfloat16"),
]
PACKINGS = FORMATS["safetensors"]  # GGUF, which fuses experts, has laws of its own
QUANTIZED = [name for name in PACKINGS if name != "dense"]


def _recipe(spec: QuantSpec) -> Recipe:
    rule = Rule("experts", spec.bits, spec.group_size, spec.symmetric, spec.scale_dtype)
    return Recipe("law", "", (rule, Rule("attention", 8, 32)))


@pytest.mark.parametrize("packing", QUANTIZED)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_read_after_write_is_identity(
    packing: str, spec: QuantSpec, nano_hybrid: Path, tmp_path: Path
) -> None:
    source = open_model(str(nano_hybrid))
    try:
        plan = make_plan(source, _recipe(spec), packing)
    except InputError:
        # refused in the plan, where its reader could not hold it
        assert packing == "auto-round"
        assert spec.bits not in (2, 4, 8) or spec.scale_dtype != "float16"
        return
    out = tmp_path / "artifact"
    execute(plan, out)
    artifact = open_model(str(out))
    assert artifact.format == packing
    assert list(artifact.infos) == list(source.infos)
    for step in plan.steps:
        value = artifact.read(step.key)
        original = source.read(step.key)
        assert isinstance(original, torch.Tensor)
        if step.spec is None:
            assert isinstance(value, torch.Tensor)
            assert value.dtype == original.dtype
            assert torch.equal(value, original)
        else:
            expected = quantize(original, step.spec)
            assert isinstance(value, QuantTensor)
            assert value.spec == step.spec
            assert torch.equal(value.codes, expected.codes)
            assert torch.equal(value.scales, expected.scales)


@pytest.mark.parametrize("packing", PACKINGS)
def test_planned_bytes_are_the_files_bytes(packing: str, nano_hybrid: Path, tmp_path: Path) -> None:
    plan = make_plan(open_model(str(nano_hybrid)), _recipe(QuantSpec(4, 32)), packing, 100_000)
    execute(plan, tmp_path / "a")
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    held = {}
    for file in files:
        held |= read_header(file)[0]
    assert {name: (t.dtype, t.shape) for name, t in held.items()} == {
        a.name: (a.dtype, a.shape) for a in plan.arrays
    }
    assert sum(t.end - t.begin for t in held.values()) == plan.bytes
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.bytes


@pytest.mark.parametrize("first", QUANTIZED)
@pytest.mark.parametrize("second", QUANTIZED)
def test_export_never_requantizes(
    first: str, second: str, nano_hybrid: Path, tmp_path: Path
) -> None:
    source = open_model(str(nano_hybrid))
    execute(make_plan(source, _recipe(QuantSpec(4, 32)), first), tmp_path / "1")
    one = open_model(str(tmp_path / "1"))
    execute(make_plan(one, None, second), tmp_path / "2")
    two = open_model(str(tmp_path / "2"))
    for key in one.infos:
        a, b = one.read(key), two.read(key)
        if isinstance(a, QuantTensor):
            assert isinstance(b, QuantTensor)
            assert torch.equal(a.codes, b.codes)
            assert torch.equal(a.scales, b.scales)
        else:
            assert isinstance(b, torch.Tensor)
            assert torch.equal(a, b)
    assert two.manifest["source"] == one.manifest["source"]


def test_dense_twin_holds_the_dequantized_values(nano_hybrid: Path, tmp_path: Path) -> None:
    source = open_model(str(nano_hybrid))
    execute(make_plan(source, _recipe(QuantSpec(4, 32)), "compressed-tensors"), tmp_path / "q")
    artifact = open_model(str(tmp_path / "q"))
    execute(make_plan(artifact, None, "dense"), tmp_path / "d")
    twin = open_model(str(tmp_path / "d"))
    assert twin.format == "hybrid"
    for key in source.infos:
        assert torch.equal(twin.read_float(key), artifact.read_float(key, torch.bfloat16)) or (
            PART_BY_NAME[key.part].role == "float"
            and torch.equal(twin.read_float(key), source.read_float(key))
        )


def test_threads_and_layout_do_not_change_a_byte(
    nano_hybrid: Path, nano_legacy: Path, tmp_path: Path
) -> None:
    digests = set()
    for number, (folder, threads) in enumerate(
        [(nano_hybrid, 1), (nano_hybrid, 2), (nano_hybrid, 5), (nano_legacy, 2)]
    ):
        plan = make_plan(open_model(str(folder)), _recipe(QuantSpec(4, 32)), "compressed-tensors")
        out = tmp_path / str(number)
        execute(plan, out, threads=threads)
        found = {p.name: manifest.digest_file(p).sha256 for p in out.iterdir()}
        digests.add(json.dumps(found, sort_keys=True))
    assert len(digests) == 1


def _tiny_weights(scale: float) -> Callable[[TensorKey, tuple[int, ...]], torch.Tensor]:
    def make(key: TensorKey, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=torch.Generator().manual_seed(hash(str(key)) % 1000))
        return values * scale if "experts" in key.part else values * 0.1

    return make


@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_scales_outside_fp16_become_bf16(scale: float, tmp_path: Path) -> None:
    from synthetic import nano_config, write_checkpoint

    folder = write_checkpoint(
        tmp_path / "src", nano_config(), layout="hybrid", seed=0, tensors=_tiny_weights(scale)
    )
    source = open_model(str(folder))
    plan = make_plan(source, _recipe(QuantSpec(4, 32)), "compressed-tensors")
    result = execute(plan, tmp_path / "a")
    experts = [str(key) for key in source.infos if key.expert >= 0]
    assert list(result.widened) == experts
    artifact = open_model(str(tmp_path / "a"))
    assert artifact.manifest["bf16_scales"] == experts
    key = TensorKey(0, "mlp.experts.up_proj.weight", 0)
    value, original = artifact.read(key), source.read_float(key, torch.float32)
    assert isinstance(value, QuantTensor)
    assert value.spec.scale_dtype == "bfloat16"
    error = (value.dequantize() - original).square().mean() / original.square().mean()
    assert error < 0.02


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("packing", ["dense", "gguf", "onnx"])
def test_making_rows_at_a_time_changes_nothing(
    packing: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large matrices are made in parts, and once more where their scales turn out too small."""
    from synthetic import nano_config, write_checkpoint

    folder = write_checkpoint(
        tmp_path / "src",
        nano_config(windows=(0, 0, 0)),
        layout="hybrid",
        seed=0,
        tensors=_tiny_weights(scale),
    )
    rules = (Rule("experts", 8, 32), Rule("attention", 8, 32), Rule("embedding", 8, 32))
    plan = make_plan(open_model(str(folder)), Recipe("law", "", rules), packing)
    whole = execute(plan, tmp_path / "whole")
    monkeypatch.setattr(work, "CHUNK_BYTES", 1000)
    parts = execute(plan, tmp_path / "parts")
    assert (whole.widened, whole.narrow) == (parts.widened, parts.narrow)
    files = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*"))
    assert files
    for name in files:
        if (tmp_path / "whole" / name).is_file():
            assert (tmp_path / "whole" / name).read_bytes() == (
                tmp_path / "parts" / name
            ).read_bytes()
