"""Open an ONNX folder that we wrote as a ``Checkpoint``, or as a graph that computes exactly.

Everything is checked before a weight is read: the graph's list of external data against what the
model's dimensions and the recorded specs ask for, and that against the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError

from zaya_convert import layout, manifest
from zaya_convert.checkpoint import Checkpoint, Piece, TensorInfo
from zaya_convert.config import ModelConfig, normalise
from zaya_convert.errors import InputError
from zaya_convert.export.arrays import Array, Region
from zaya_convert.export.onnx import codes, configs, graph, metadata, places
from zaya_convert.export.onnx.builder import Located
from zaya_convert.export.onnx.places import QWEIGHT
from zaya_convert.files import contained, read_json, read_small
from zaya_convert.layout import PART_BY_NAME, TensorKey
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

NAME = "onnx"
# onnxruntime's key for the folder of external data, where a model comes as bytes
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_DTYPES: dict[int, str] = {onnx.TensorProto.FLOAT: "F32", onnx.TensorProto.UINT8: "U8"}


@dataclass(frozen=True, slots=True)
class _External:
    """An initializer's bytes."""

    file: Path
    offset: int
    bytes: int
    dtype: str


class _Held:
    """The external initializers of a graph by name; it is remembered which were asked for."""

    def __init__(self, externals: Mapping[str, _External]) -> None:
        self._externals = externals
        # the same bytes as the embedding's, in another form
        self._used = {"lm_head" + QWEIGHT} if "model.embed_tokens" + QWEIGHT in externals else set()

    def __getitem__(self, name: str) -> _External:
        return self._externals[name]

    def mismatch(self, array: Array) -> list[str]:
        """What is wrong with an array, if anything."""
        self._used.add(array.name)
        held = self._externals.get(array.name)
        if held is None:
            return [f"{array.name!r} is missing"]
        if (held.dtype, held.bytes) == (array.dtype, array.bytes):
            return []
        expected = f"{array.dtype} {list(array.shape)}"
        return [f"{array.name!r} is {held.bytes} bytes of {held.dtype}, expected {expected}"]

    def unused(self) -> list[str]:
        """Names that ``mismatch`` was never asked for."""
        return sorted(set(self._externals) - self._used)

    def locate(self, name: str) -> Located:
        """As ``graph.build`` wants it."""
        return Located(self._externals[name].file.name, self._externals[name].offset)


def open_onnx(folder: Path) -> Checkpoint:
    """Open a folder.

    Raises:
        InputError: it is not one of ours, or does not hold what it says; every problem found.
    """
    raw = read_json(folder / "config.json")
    config, notes = normalise(raw, "hybrid", {})
    specs, held = _load(folder, config)
    problems: dict[str, None] = {}  # in order, and once for all experts in an array
    for pair in places.rotary_arrays(config).values():
        problems |= {line: None for array in pair for line in held.mismatch(array)}
    infos = {}
    for key, spec in specs.items():
        shape = layout.resolve(PART_BY_NAME[key.part].shape, config.dims)
        found = [f"{key}: {line}" for line in places.problems(key, shape, spec)] if spec else []
        regions = {} if found else places.regions(key, spec, config)
        for region in regions.values():
            found += held.mismatch(region.array)
        problems |= dict.fromkeys(found)
        if not found:
            pieces = {s: _piece(key, shape, spec, r, held) for s, r in regions.items()}
            infos[key] = TensorInfo(key, shape, "U8" if spec else "F32", pieces, spec)
    problems |= {f"{name!r} is unknown": None for name in held.unused()}
    if problems:
        raise InputError(list(problems), folder.name)
    return Checkpoint(
        folder, NAME, config, raw, infos, tuple(notes), manifest.read(folder), _decode
    )


def exact_graph(checkpoint: Checkpoint, routes: bool = False) -> bytes:
    """A serialised graph that computes with an opened folder's weights and fp32 activations.

    It refers to the folder's own data files, so nothing is written or copied::

        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(EXTERNAL_FOLDER, str(checkpoint.path / configs.FOLDER))
        session = onnxruntime.InferenceSession(exact_graph(checkpoint), options)

    Several sequences can go on by one token at a time, but by more only alone: that is what
    ``GroupQueryAttention`` allows. A session's memory is about twice the data's size, because
    matrices are packed anew; ``session.disable_prepacking`` = "1" keeps the file mapped instead,
    and is slower.

    Args:
        routes: see ``graph.Options``.
    """
    specs = {key: info.spec for key, info in checkpoint.infos.items()}
    _, held = _load(checkpoint.path, checkpoint.config)
    options = graph.Options(exact=True, routes=routes)
    return graph.build(checkpoint.config, specs, held.locate, options).SerializeToString()


def _load(folder: Path, config: ModelConfig) -> tuple[dict[TensorKey, QuantSpec | None], _Held]:
    """The specs and the external initializers of a folder's graph.

    Raises:
        InputError: the graph cannot be read, or says nothing about its tensors.
    """
    path = folder / configs.FOLDER / configs.NAMES["optimum"]
    try:
        model = onnx.ModelProto.FromString(read_small(path))
    except DecodeError:
        raise InputError("is no ONNX model", path.name) from None
    found = {entry.key: entry.value for entry in model.metadata_props}
    if metadata.SPECS not in found:
        raise InputError(
            "does not say how its tensors are quantized; only what zaya-convert wrote can be read",
            path.name,
        )
    keys = layout.keys(config.layers, config.experts, config.flags)
    specs = metadata.read_specs(found[metadata.SPECS], keys)
    problems: list[str] = []
    externals: dict[str, _External] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        external = _external(path.parent, tensor)
        if isinstance(external, str):
            problems.append(f"{tensor.name!r}: {external}")
        else:
            externals[tensor.name] = external
    externals = _joined(externals, problems)
    if problems:
        raise InputError(problems, path.name)
    return specs, _Held(externals)


def _joined(externals: Mapping[str, _External], problems: list[str]) -> dict[str, _External]:
    """Whole arrays, also where nodes refer to the experts in one by their numbers.

    Args:
        problems: gets those of parts that do not make up an array.
    """
    whole: dict[str, _External] = {}
    parts: dict[str, dict[str, _External]] = {}
    for name, external in externals.items():
        array, _, number = name.rpartition(".")
        if number.isdecimal():
            parts.setdefault(array, {})[number] = external
        else:
            whole[name] = external
    for name, experts in parts.items():
        first = experts.get("0")
        if first is not None and all(
            experts.get(str(i)) == replace(first, offset=first.offset + i * first.bytes)
            for i in range(len(experts))
        ):
            # whether there are enough shows in its size
            whole[name] = replace(first, bytes=len(experts) * first.bytes)
        else:
            problems.append(f"{name!r}: its experts do not lie one behind the other")
    return whole


def _external(folder: Path, tensor: onnx.TensorProto) -> _External | str:
    """Where an initializer's bytes are, or what is wrong with what it says."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        return f"has data type {tensor.data_type}, expected float or uint8"
    try:
        offset, size = int(entries.get("offset", "0")), int(entries["length"])
        file = contained(folder, entries["location"])
        held = file.stat().st_size
    except (KeyError, ValueError):
        return "does not say where its data are"
    except OSError as error:
        return f"{entries['location']} cannot be read: {error.strerror}"
    if offset < 0 or size < 0 or offset + size > held:
        return (
            f"lies at bytes {offset} to {offset + size} of {file.name}, which has {held}; "
            "fetch it again"
        )
    return _External(file, offset, size, dtype)


def _piece(
    key: TensorKey, shape: tuple[int, ...], spec: QuantSpec | None, region: Region, held: _Held
) -> Piece:
    """The bytes of one component, with those of the rows that it takes turns with."""
    own = held[region.array.name]
    if spec is None:
        first, turns = 0, 1
    else:
        (first, turns), shape = places.turn(key.part), (shape[0], region.array.shape[-1])
        shape = (turns * shape[0], shape[1])
    begin = own.offset + region.offset - first * region.row
    return Piece(own.file, begin, begin + turns * region.bytes, own.dtype, shape, turns)


def _decode(info: TensorInfo, pieces: dict[str, torch.Tensor]) -> QuantTensor:
    assert isinstance(info.spec, QuantSpec)
    first, turns = places.turn(info.key.part)
    own = {suffix: piece[first::turns].contiguous() for suffix, piece in pieces.items()}
    return codes.decode(own, info.spec, info.shape[1])
