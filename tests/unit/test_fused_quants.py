"""Fused FP8 and MXFP4 experts read as what their numbers say, and nothing else is read as them."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.running import Zaya
from nano import Nano, Stored, Surgery
from rounding import nearest
from zaya_convert import data
from zaya_convert.calibrate import Settings, calibrate
from zaya_convert.checkpoint import Checkpoint, SourceDigest, open_source
from zaya_convert.convert import execute
from zaya_convert.errors import InputError
from zaya_convert.fused_quants import open_fused, recognises
from zaya_convert.inspect import describe
from zaya_convert.layout import TensorKey
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_convert.stats import identity
from zaya_convert.validate import validate

pytestmark = pytest.mark.usefixtures("one_thread")
pytest_plugins = ("cli.fixtures",)

Tensors = dict[str, Stored]
Make = Callable[..., Path]

CONFIGS: dict[str, dict[str, Any]] = {
    "FP8": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "MXFP4": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
}
LAYERS, EXPERTS, WIDTH = 3, 4, 64
SMALL: dict[str, Any] = {"layers": LAYERS, "windows": (0, 9, 0), "experts": EXPERTS}
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
SCALE = ".weight_scale"
UP = TensorKey(1, "mlp.experts.up_proj.weight", 2)


# --- numbers, from the standards and not from torch ---------------------------------------------


def e4m3(code: int) -> float:
    """OCP FP8 E4M3: four bits of exponent, bias 7; no infinities, NaN with all bits set."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(code: int) -> float:
    """OCP FP4 E2M1: two bits of exponent, bias 1."""
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    if exponent == 0:
        return sign * mantissa / 2
    return sign * (1 + mantissa / 2) * 2.0 ** (exponent - 1)


E4M3 = np.array([e4m3(code) for code in range(256)], np.float32)
E2M1 = np.array([e2m1(code) for code in range(16)], np.float32)


def array(tensor: Stored) -> np.ndarray:
    """Scales or bytes of a stored tensor; bf16 is the upper half of float32."""
    raw = np.frombuffer(tensor.data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(
        tensor.dtype, "u1"))  # fmt: skip
    if tensor.dtype == "BF16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    return raw.reshape(tensor.shape)


def decoded(codes: Stored, scales: Stored) -> np.ndarray:
    """The fused weights in float32."""
    if codes.dtype == "F8_E4M3":
        return E4M3[array(codes)] * array(scales).astype(np.float32)
    packed = array(codes)
    values = E2M1[np.stack((packed & 15, packed >> 4), axis=-1).reshape(*packed.shape[:-1], -1)]
    factors = np.ldexp(1.0, array(scales).astype(int) - 127).astype(np.float32)
    return values * np.repeat(factors, 32, axis=-1)


# --- checkpoints --------------------------------------------------------------------------------


def to_fp8(tensors: Tensors, name: str, scale_dtype: torch.dtype = torch.float32) -> None:
    weights = torch.from_numpy(array(tensors[name]).copy())
    scales = (weights.abs().amax(dim=-1, keepdim=True) / 448).to(scale_dtype)
    codes = (weights / scales.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[scale_dtype]
    raw = scales.view(torch.uint8).numpy().tobytes()
    shape = tensors[name].shape
    tensors[name] = Stored("F8_E4M3", shape, codes.view(torch.uint8).numpy().tobytes())
    tensors[name + SCALE] = Stored(dtype, [*shape[:-1], 1], raw)


def to_mxfp4(tensors: Tensors, name: str) -> None:
    *rows, columns = shape = tensors[name].shape
    weights = array(tensors[name]).reshape(*rows, columns // 32, 32)
    exponents = np.floor(np.log2(np.abs(weights).max(axis=-1))).astype(int) - 2
    scaled = weights / np.ldexp(1.0, exponents)[..., None]
    codes = np.abs(scaled[..., None] - E2M1).argmin(axis=-1).astype(np.uint8).reshape(shape)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    tensors[name] = Stored("U8", [*rows, columns // 2], packed.tobytes())
    biased = (exponents + 127).astype(np.uint8)
    tensors[name + SCALE] = Stored("U8", [*rows, columns // 32], biased.tobytes())


def experts_of(tensors: Tensors) -> list[str]:
    return [
        name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    ]


def stored(folder: Path, operate: Surgery) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        operate(file, found.update)
    return found


def set_quantization(folder: Path, quantization: object) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.fixture(scope="module")
def make(nano: Nano, operate: Surgery, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Folder of a checkpoint with experts in a form, shared and so not to be changed."""
    made: dict[object, Path] = {}

    def build(form: str = "FP8", **options: Any) -> Path:
        known = repr((form, options))
        if known not in made:
            folder = tmp_path_factory.mktemp("fused") / "model"
            shutil.copytree(nano("hybrid", **SMALL), folder)
            encode = to_fp8 if form == "FP8" else to_mxfp4

            def change(tensors: Tensors) -> None:
                for name in experts_of(tensors):
                    encode(tensors, name, **options)

            operate(folder / "model.safetensors", change)
            set_quantization(folder, CONFIGS[form])
            made[known] = folder
        return made[known]

    return build


@pytest.fixture
def own(make: Make, tmp_path: Path) -> Make:
    """The same, to damage."""
    return lambda *form: Path(shutil.copytree(make(*form), tmp_path / "own"))


@pytest.fixture(scope="module")
def fp8(make: Make) -> Checkpoint:
    return open_fused(make())


@pytest.fixture(scope="module", params=["FP8", "MXFP4"])
def coded(request: pytest.FixtureRequest, make: Make) -> Checkpoint:
    return open_fused(make(request.param))


def matrix(model: Checkpoint, key: TensorKey) -> torch.Tensor:
    value = model.read(key)
    assert isinstance(value, torch.Tensor)
    return value


def raw(value: torch.Tensor) -> bytes:
    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


# --- reading ------------------------------------------------------------------------------------


def test_torch_reads_every_fp8_code_as_the_standard_does() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert np.array_equal(codes.float().numpy(), E4M3, equal_nan=True)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("FP8", {}),
        ("FP8", {"scale_dtype": torch.bfloat16}),
        ("FP8", {"scale_dtype": torch.float16}),
        ("MXFP4", {}),
    ],
)
def test_every_expert_is_its_codes_times_its_scales(
    form: str, options: dict[str, Any], make: Make, operate: Surgery
) -> None:
    folder = make(form, **options)
    tensors, model = stored(folder, operate), open_fused(folder)
    for layer in range(LAYERS):
        fused = [f"model.layers.{layer}.mlp.experts.{name}_proj" for name in ("gate_up", "down")]
        gate_up, down = (decoded(tensors[name], tensors[name + SCALE]) for name in fused)
        for expert in range(EXPERTS):
            expected = (gate_up[expert, :WIDTH], gate_up[expert, WIDTH:], down[expert])
            for name, values in zip(("gate", "up", "down"), expected, strict=True):
                key = TensorKey(layer, f"mlp.experts.{name}_proj.weight", expert)
                value = matrix(model, key)
                assert str(value.dtype) == {"FP8": "torch.float32", "MXFP4": "torch.bfloat16"}[form]
                assert np.array_equal(value.float().numpy(), values), str(key)


def test_all_codes_and_all_mxfp4_scales(own: Make, operate: Surgery) -> None:
    folder = own("MXFP4")

    def change(tensors: Tensors) -> None:
        # Every scale but NaN on small codes, then every byte of codes on a usual scale.
        small = np.full(tensors[GATE_UP].shape, 0x91, np.uint8)
        scales = np.resize(np.arange(255, dtype=np.uint8), tensors[GATE_UP + SCALE].shape)
        tensors[GATE_UP].data = small.tobytes()
        tensors[GATE_UP + SCALE].data = scales.tobytes()
        tensors[DOWN].data = np.resize(
            np.arange(256, dtype=np.uint8), tensors[DOWN].shape
        ).tobytes()

    operate(folder / "model.safetensors", change)
    tensors, model = stored(folder, operate), open_fused(folder)
    gate_up, down = (decoded(tensors[name], tensors[name + SCALE]) for name in (GATE_UP, DOWN))
    for expert in range(EXPERTS):
        for name, values in (("up", gate_up[expert, WIDTH:]), ("down", down[expert])):
            value = matrix(model, TensorKey(1, f"mlp.experts.{name}_proj.weight", expert))
            assert np.array_equal(value.float().numpy(), values)


def test_mxfp4_is_what_compressed_tensors_packs() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    packed = np.arange(256, dtype=np.uint8)[None]
    expected = helpers.unpack_fp4_from_uint8(torch.from_numpy(packed), 1, 512, torch.float32)
    scale = Stored("U8", [1, 16], bytes([127] * 16))
    found = decoded(Stored("U8", [1, 256], packed.tobytes()), scale)
    assert np.array_equal(found, expected.numpy())


def test_opening_reads_headers_only_and_reading_one_matrix(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    true_preadv = os.preadv

    def counting(*arguments: Any) -> int:
        read.append(true_preadv(*arguments))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counting)
    model = open_fused(make())
    assert read == []
    model.read(UP)
    assert sum(read) == model.infos[UP].bytes == WIDTH * WIDTH + 4 * WIDTH


def test_the_rest_is_what_it_was(coded: Checkpoint, nano: Nano) -> None:
    original = open_source(nano("hybrid", **SMALL))
    assert coded.format == "hybrid"
    assert coded.config == original.config
    assert list(coded.infos) == list(original.infos)
    for key in (key for key in original.infos if key.expert < 0):
        assert torch.equal(matrix(coded, key), matrix(original, key))
    close = matrix(coded, UP).float() - matrix(original, UP).float()
    assert 0 < float(close.norm() / matrix(original, UP).float().norm()) < 0.2


def test_notes_say_that_quantizing_rounds_twice(coded: Checkpoint) -> None:
    (note,) = coded.notes
    form = "FP8" if coded.infos[UP].stored_dtype == "F8_E4M3" else "MXFP4"
    assert form in note
    assert "rounds twice" in note


# --- as any other checkpoint --------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 4096, 1 << 20])
def test_chunks_join_to_the_values(coded: Checkpoint, size: int) -> None:
    chunks = list(coded.chunks(UP, size))
    assert max(map(len, chunks)) <= size
    assert b"".join(chunks) == raw(matrix(coded, UP))


def test_it_is_the_same_model_as_its_values_stored_plainly(
    fp8: Checkpoint, make: Make, operate: Surgery, tmp_path: Path
) -> None:
    def digest(model: Checkpoint) -> str:
        total = SourceDigest()
        for key, info in model.infos.items():
            total.add(info, hashlib.sha256(b"".join(model.chunks(key))).hexdigest())
        return total.hexdigest(model.infos)

    folder = Path(shutil.copytree(make(), tmp_path / "plain"))

    def change(tensors: Tensors) -> None:
        for name in experts_of(tensors):
            values = decoded(tensors[name], tensors.pop(name + SCALE))
            tensors[name] = Stored("F32", list(values.shape), values.tobytes())

    operate(folder / "model.safetensors", change)
    plain = open_source(folder)
    assert digest(plain) == digest(fp8)
    sequences = data.load_sequences(fp8, None, tokens=60, length=30)
    assert validate(plain, fp8, sequences).kl_max == 0


def test_sizes_stamps_and_first_bytes(coded: Checkpoint, make: Make, operate: Surgery) -> None:
    tensors = stored(coded.path, operate)
    assert coded.bytes == sum(len(tensor.data) for tensor in tensors.values())
    assert [path.name for path in coded.files] == ["model.safetensors"]
    assert list(coded.stamp()) == ["model.safetensors"]
    codes, scales = coded.first_bytes(UP, 8)
    assert bytes(codes) == array(tensors[GATE_UP])[2, WIDTH].tobytes()[:8]
    start = len(tensors[GATE_UP + SCALE].data) // EXPERTS * 5 // 2
    assert bytes(scales) == tensors[GATE_UP + SCALE].data[start : start + 8]
    coded.forget(UP)


def test_models_are_told_apart(coded: Checkpoint, nano: Nano, make: Make) -> None:
    other = make(scale_dtype=torch.float16)
    known = {identity(model) for model in (coded, open_fused(other), open_model(str(nano())))}
    assert len(known) == 3


def test_inspect_shows_what_is_stored(fp8: Checkpoint) -> None:
    facts = describe(fp8)
    kinds = {row["kind"]: row for row in facts["storage"]}
    experts = 3 * LAYERS * EXPERTS
    assert kinds["F8_E4M3"]["tensors"] == experts
    assert kinds["F8_E4M3"]["weights"] == experts * WIDTH * WIDTH
    assert kinds["F8_E4M3"]["bytes"] == experts * (WIDTH * WIDTH + 4 * WIDTH)
    assert "F8_E4M3" in facts["dtypes"]
    assert not facts["quantized"]


def test_a_dense_export_holds_the_values_in_bf16(coded: Checkpoint, tmp_path: Path) -> None:
    execute(make_plan(coded, None, "dense"), tmp_path / "dense")
    dense = open_model(str(tmp_path / "dense"))
    assert "quantization_config" not in dense.raw_config
    for key in coded.infos:
        assert torch.equal(matrix(dense, key).float(), matrix(coded, key).to(
            torch.bfloat16 if key.expert >= 0 else matrix(coded, key).dtype).float())  # fmt: skip


def test_experts_left_float_keep_their_values(coded: Checkpoint, tmp_path: Path) -> None:
    attention = Recipe("attention", "", (Rule("attention", 8, 32, method="rtn"),))
    execute(make_plan(coded, attention, "compressed-tensors"), tmp_path / "out")
    out = open_model(str(tmp_path / "out"))
    assert out.infos[UP].dtype == coded.infos[UP].dtype
    for key in (key for key in coded.infos if key.expert >= 0):
        assert torch.equal(matrix(out, key), matrix(coded, key))


def test_quantized_and_proven(coded: Checkpoint, tmp_path: Path) -> None:
    execute(make_plan(coded, nearest(8), "compressed-tensors"), tmp_path / "int8")
    candidate = open_model(str(tmp_path / "int8"))
    sequences = data.load_sequences(coded, None, tokens=60, length=30)
    found = validate(coded, candidate, sequences)
    assert found.reference_digest_matches is True
    assert all(row.sqnr_db > 30 for row in found.tensors)
    own = validate(coded, coded, sequences)
    assert (own.kl_max, own.top1_agreement) == (0, 1)


def test_quantized_with_calibration(fp8: Checkpoint, tmp_path: Path) -> None:
    documents = data.load_sequences(fp8, None, tokens=64, length=32)
    settings = Settings(tokens=64, max_tokens=64, min_tokens=1)
    stats = calibrate(fp8, documents, settings, tmp_path / "stats", threads=1)
    recipe = Recipe("gptq", "", (Rule("experts", 4, 32, method="gptq"),))
    plan = replace(make_plan(fp8, recipe, "compressed-tensors"), stats=stats)
    execute(plan, tmp_path / "out")
    out = open_model(str(tmp_path / "out"))
    error = out.read_float(UP) - fp8.read_float(UP)
    assert 0 < float(error.norm() / fp8.read_float(UP).norm()) < 0.3


# --- what is recognised, and what is refused ----------------------------------------------------


@pytest.mark.parametrize(
    "quantization",
    [
        *CONFIGS.values(),
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "anything"},
        {},
    ],
)
def test_tensors_decide_whatever_the_config_says(own: Make, quantization: dict[str, Any]) -> None:
    folder = own()
    assert recognises(folder, set_quantization(folder, quantization))
    assert open_fused(folder).infos[UP].stored_dtype == "F8_E4M3"


def test_floats_and_artifacts_are_left_to_others(
    nano: Nano, fp8: Checkpoint, tmp_path: Path
) -> None:
    plain = nano("hybrid", **SMALL)
    for quantization in ({}, {"quantization_config": {"quant_method": "fp8"}}):
        assert not recognises(plain, quantization)
    for packing in ("compressed-tensors", "auto-round"):
        out = tmp_path / packing
        execute(make_plan(fp8, nearest(4), packing), out)
        assert not recognises(out, json.loads((out / "config.json").read_text()))


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        open_fused(folder)
    return caught.value.problems


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def reshape(name: str, dtype: str, *shape: int) -> Callable[[Tensors], object]:
    """Same values, or zeros where the size changes."""
    width = {"F32": 4, "BF16": 2}.get(dtype, 1)
    size = int(np.prod(shape)) * width

    def change(tensors: Tensors) -> None:
        data = tensors[name].data
        tensors[name] = Stored(dtype, list(shape), data if len(data) == size else bytes(size))

    return change


ROWS = 2 * WIDTH
FAULTS: dict[str, tuple[str, Callable[[Tensors], object], tuple[str, ...]]] = {
    "no scales": ("FP8", drop(GATE_UP + SCALE), (GATE_UP + SCALE, "missing")),
    "no codes": ("FP8", drop(DOWN), (DOWN, "missing")),
    "one scale per expert": (
        "FP8", reshape(GATE_UP + SCALE, "F32", EXPERTS, 1, 1),
        (GATE_UP + SCALE, "model.safetensors", "[4, 1, 1]", f"[4, {ROWS}, 1]"),
    ),
    "flat scales": (
        "FP8", reshape(DOWN + SCALE, "F32", EXPERTS, WIDTH), (DOWN + SCALE, f"[4, {WIDTH}, 1]"),
    ),
    "scale without dimensions": ("FP8", reshape(DOWN + SCALE, "F32"), (DOWN + SCALE, "[]")),
    "codes without dimensions": ("FP8", reshape(DOWN, "F8_E4M3"), (DOWN, "[]")),
    "transposed codes": (
        "FP8", reshape(GATE_UP, "F8_E4M3", EXPERTS, WIDTH, ROWS),
        (GATE_UP, f"is F8_E4M3 [4, {WIDTH}, {ROWS}]"),
    ),
    "integer scales": (
        "FP8", reshape(DOWN + SCALE, "U8", EXPERTS, WIDTH, 1),
        (DOWN + SCALE, "is U8", "F32 or F16 or BF16"),
    ),
    "no group scales": (
        "MXFP4", reshape(DOWN + SCALE, "U8", EXPERTS, WIDTH, 1), (DOWN + SCALE, "MXFP4"),
    ),
    "codes not packed": (
        "MXFP4", reshape(DOWN, "U8", EXPERTS, WIDTH, WIDTH), (DOWN, f"[4, {WIDTH}, 32]"),
    ),
    "scale of a float": (
        "FP8", reshape(GATE_UP, "BF16", EXPERTS, ROWS, WIDTH), (GATE_UP + SCALE, "unknown"),
    ),
    "attention too": (
        "FP8", lambda t: to_fp8(t, "model.layers.0.self_attn.o_proj.weight"),
        ("self_attn.o_proj.weight", "F8_E4M3", "expected one of"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(fault: str, own: Make, operate: Surgery) -> None:
    form, change, words = FAULTS[fault]
    folder = own(form)
    operate(folder / "model.safetensors", change)
    problems = problems_of(folder)
    assert any(all(word in problem for word in words) for problem in problems), problems
    assert len(problems) <= 2


def test_all_problems_at_once_and_each_once(own: Make, operate: Surgery) -> None:
    folder = own()

    def change(tensors: Tensors) -> None:
        for name in (GATE_UP + SCALE, DOWN + SCALE, "model.norm.weight"):
            del tensors[name]

    operate(folder / "model.safetensors", change)
    assert len(problems_of(folder)) == 3


def test_inputs_that_groups_do_not_divide(nano: Nano, operate: Surgery, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nano("hybrid", **SMALL, expert_width=48), tmp_path / "odd"))

    def change(tensors: Tensors) -> None:
        for name in experts_of(tensors):
            *rows, columns = tensors[name].shape
            for part, width in ((name, columns // 2), (name + SCALE, columns // 32)):
                tensors[part] = Stored("U8", [*rows, width], bytes(int(np.prod(rows)) * width))

    operate(folder / "model.safetensors", change)
    problems = problems_of(folder)
    assert len(problems) == LAYERS
    assert all("32 does not divide 48 inputs" in problem for problem in problems)


def poke(name: str, value: bytes, at: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        data = bytearray(tensors[name].data)
        start = at * len(value)
        data[start : start + len(value)] = value
        tensors[name].data = bytes(data)

    return change


def float32(value: float) -> bytes:
    return np.float32(value).tobytes()


ROW = 2 * ROWS + WIDTH + 3  # of all gate_up rows: expert 2, row 3 of its up_proj
BAD = {
    "NaN": ("FP8", poke(GATE_UP, b"\x7f", ROW * WIDTH + 5), "code nan"),
    "minus NaN": ("FP8", poke(GATE_UP, b"\xff", ROW * WIDTH + 5), "code nan"),
    "NaN scale": ("FP8", poke(GATE_UP + SCALE, float32(np.nan), ROW), "is nan"),
    "infinite scale": ("FP8", poke(GATE_UP + SCALE, float32(np.inf), ROW), "is inf"),
    "negative scale": ("FP8", poke(GATE_UP + SCALE, float32(-2), ROW), "is -2.0"),
    "overflow": ("FP8", poke(GATE_UP + SCALE, float32(3e38), ROW), "times scale"),
    "NaN exponent": ("MXFP4", poke(GATE_UP + SCALE, b"\xff", ROW * 2 + 1), "a scale of row 3"),
    "MXFP4 overflow": ("MXFP4", poke(GATE_UP + SCALE, b"\xfe", ROW * 2 + 1), "times scale"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_number_is_refused_when_read(fault: str, own: Make, operate: Surgery) -> None:
    form, change, words = BAD[fault]
    folder = own(form)
    operate(folder / "model.safetensors", change)
    model = open_fused(folder)
    model.read(replace(UP, expert=1))
    with pytest.raises(InputError, match="row 3") as caught:
        model.read(UP)
    assert words in str(caught.value)
    assert f"model.safetensors: {str(UP)!r}" in str(caught.value)


def test_zero_scales_are_zero_weights(own: Make, operate: Surgery) -> None:
    folder = own()
    operate(folder / "model.safetensors", poke(GATE_UP + SCALE, float32(0), ROW))
    value = matrix(open_fused(folder), UP)
    assert not value[3].any()
    assert value[4].any()


OTHER_FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, str, list[int]]], str]] = {
    "blocks and scales": (
        {"quant_method": "mxfp4"},
        [("_blocks", "U8", [EXPERTS, ROWS, 2, 16]), ("_scales", "U8", [EXPERTS, ROWS, 2])],
        "holds MXFP4 experts",
    ),
    "packed": (
        {"quant_method": "compressed-tensors"},
        [(".weight_packed", "U8", [EXPERTS, ROWS, 32]), (SCALE, "U8", [EXPERTS, ROWS, 2])],
        "holds MXFP4 experts",
    ),
    "packed, with scales of their own dtype": (
        {"quant_method": "quark"},
        [("", "F4", [EXPERTS, ROWS, WIDTH]), (SCALE, "F8_E8M0", [EXPERTS, ROWS, 2])],
        "holds MXFP4 experts",
    ),
    "by the config": (
        {"quant_method": "x", "format": "MXFP4-experts"},
        [("_q", "I32", [EXPERTS, ROWS, 8])],
        "holds MXFP4 experts",
    ),
    "FP8 in blocks": (
        {"quant_method": "fp8"},
        [("", "F8_E4M3", [EXPERTS, ROWS, WIDTH]), (".weight_scale_inv", "F32", [EXPERTS, 1, 1])],
        "holds quantized experts",
    ),
    "int8": (
        {"quant_method": "x"},
        [("", "I8", [EXPERTS, ROWS, WIDTH]), (SCALE, "F32", [EXPERTS, ROWS, 1])],
        "holds quantized experts",
    ),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_are_refused_by_name(
    form: str, nano: Nano, operate: Surgery, tmp_path: Path
) -> None:
    quantization, arrays, words = OTHER_FORMS[form]
    folder = Path(shutil.copytree(nano("hybrid", **SMALL), tmp_path / "other"))

    def change(tensors: Tensors) -> None:
        for name in [name for name in experts_of(tensors) if "gate_up" in name]:
            del tensors[name]
            for suffix, dtype, shape in arrays:
                size = int(np.prod(shape)) * {"F32": 4, "I32": 4, "F4": 0.5}.get(dtype, 1)
                tensors[name + suffix] = Stored(dtype, shape, bytes(int(size)))

    operate(folder / "model.safetensors", change)
    assert recognises(folder, set_quantization(folder, quantization))
    (problem,) = problems_of(folder)
    assert words in problem
    assert "experts.gate_up_proj" in problem
    assert "in model.safetensors is" in problem
    assert "use Zyphra/ZAYA1-8B" in problem


def test_cli_tools_take_fused_experts(zaya: Zaya, make: Make, tmp_path: Path) -> None:
    folder, out = make(), tmp_path / "out"
    facts = zaya("inspect", folder, "--json").json()
    assert facts["layout"] == "hybrid"
    assert any("FP8" in note for note in facts["notes"])
    done = zaya("quantize", folder, "--bits", 4, "-o", out)
    assert done.code == 0
    assert "rounds twice" in done.err
    done = zaya("validate", out, "--reference", folder, "--tokens", 64, "--max-kl", 100)
    assert done.code == 0, done.err
    assert zaya("export", folder, "--packing", "dense", "-o", tmp_path / "dense").code == 0
