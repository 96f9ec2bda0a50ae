"""What the two per-expert packings share: names, float tensors, strict matching on reading.

Both store one set of arrays per quantized matrix under ``model.layers.L.mlp.experts.E.X_proj.`` and
everything else under its hybrid name in its stored dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_convert import layout, manifest
from zaya_convert.checkpoint import Checkpoint, Decoder, Piece, TensorInfo, match_tensors
from zaya_convert.config import ModelConfig, normalise
from zaya_convert.errors import InputError
from zaya_convert.export.arrays import Array, Region, piece_of
from zaya_convert.files import load_tensors, read_json
from zaya_convert.headers import RawTensor
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_quant.spec import BlockSpec, QuantSpec, Spec

if TYPE_CHECKING:
    from zaya_convert.plan import Plan

SCALE_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
SCALE_NAME = {dtype: name for name, dtype in SCALE_DTYPE.items()}

# Told the shapes of a matrix's arrays, name its spec; None when they make no sense.
SpecOf = Callable[[TensorKey, tuple[int, ...], Mapping[str, RawTensor]], QuantSpec | None]


def whole(name: str, dtype: str, shape: tuple[int, ...]) -> Region:
    """A region that is a whole array."""
    return piece_of(Array(name, dtype, shape))


def float_regions(info: TensorInfo, config: ModelConfig, dtype: str) -> dict[str, Region]:
    """A float tensor under its own name, experts one matrix at a time."""
    place = layout.stored("split", info.key, config.dims, config.layers)
    is_float = PART_BY_NAME[info.key.part].role == "float"
    return {"": whole(place.name, info.dtype if is_float else dtype or info.dtype, info.shape)}


def model_problems(config: ModelConfig) -> list[str]:
    """What transformers' configuration cannot say."""
    if len({window for window in config.windows if window}) > 1:
        return ["layers have windows of different sizes, which config.json cannot say"]
    return []


def notes(plan: Plan) -> list[str]:
    """Nothing that the model card does not say."""
    return []


def unit(key: TensorKey, spec: Spec | None) -> tuple[str, str]:
    """None: every matrix stands alone."""
    return "", ""


def storage_problems(info: TensorInfo, spec: Spec) -> list[str]:
    """What neither packing's readers can hold."""
    if isinstance(spec, BlockSpec):
        return [f"{spec.label} is a block type of GGUF; this packing cannot hold it"]
    out_features, in_features = info.shape
    found = []
    if not spec.symmetric:
        found.append("asymmetric experts break this packing's readers; use symmetric")
    if PART_BY_NAME[info.key.part].role == "embedding":
        found.append("a quantized embedding is not readable here; keep it float")
    if spec.group_size > 0 and in_features % spec.group_size:
        found.append(
            f"group size {spec.group_size} does not divide its {in_features} inputs; "
            "choose a divisor, or -1 for one scale per output channel"
        )
    if out_features * in_features == 0:
        found.append("is empty")
    return found


def is_quantizable(key: TensorKey) -> bool:
    """Whether a recipe may ever match ``key``."""
    return PART_BY_NAME[key.part].role != "float"


def linear_modules(config: ModelConfig) -> list[str]:
    """Names of all modules with a weight matrix that a generic quantizer would consider."""
    gates = ("down_proj", "router_mlp.fc1", "router_mlp.fc2", "router_mlp.out_proj")
    names = [f"model.layers.{i}.mlp.gate.{gate}" for i in range(config.layers) for gate in gates]
    return [*names, "lm_head"]


def open_split(
    folder: Path, name: str, suffixes: tuple[str, ...], spec_of: SpecOf, decoder: Decoder
) -> Checkpoint:
    """Open a folder whose quantized matrices are stored as ``module + suffix`` arrays.

    Raises:
        InputError: anything missing, unknown, or of the wrong shape or dtype; all at once.
    """
    raw = read_json(folder / "config.json")
    tensors = load_tensors(folder)
    config, notes = normalise(raw, "hybrid", {n: t.shape for n, t in tensors.items()})
    keys = tuple(layout.keys(config.layers, config.experts, config.flags))
    quantized: dict[TensorKey, TensorInfo] = {}
    claimed: set[TensorKey] = set()
    problems: list[str] = []
    for key in keys:
        arrays = {s: tensors[key.module + s] for s in suffixes if key.module + s in tensors}
        if not arrays or not is_quantizable(key):
            continue
        claimed.add(key)
        shape = layout.resolve(PART_BY_NAME[key.part].shape, config.dims)
        missing = [s for s in suffixes if s not in arrays]
        spec = None if missing else spec_of(key, shape, arrays)
        for array in arrays.values():
            del tensors[array.name]
        if missing:
            problems += [f"{key.module + s!r} is missing" for s in missing]
        elif spec is None:
            shapes = ", ".join(f"{s} {a.dtype} {list(a.shape)}" for s, a in arrays.items())
            problems.append(f"{key.module!r}: {shapes} do not fit a weight of {list(shape)}")
        else:
            pieces = {s: Piece(a.file, a.begin, a.end, a.dtype, a.shape) for s, a in arrays.items()}
            quantized[key] = TensorInfo(key, shape, arrays[suffixes[0]].dtype, pieces, spec)
    try:
        floats, tied_copy = match_tensors("split", config, tensors, folder.name, frozenset(claimed))
    except InputError as error:
        raise InputError(problems + error.problems, folder.name) from None
    if problems:
        raise InputError(problems, folder.name)
    infos = {key: quantized.get(key) or floats[key] for key in keys}
    return Checkpoint(
        folder, name, config, raw, infos, tuple(notes), manifest.read(folder), decoder, tied_copy
    )
