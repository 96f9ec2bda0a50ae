"""Which arrays of a graph's external data a logical tensor becomes, and which bytes of them.

Everything that one node multiplies is one array: the four projections of attention lie below each
other, the experts of a layer too, and in their first matrix gate and up rows take turns, as
``QMoE`` on the CPU wants it. Float experts, which no node takes together, stay one matrix each.

A quantized matrix ``[out, in]`` with b bits and groups of G inputs is

* ``.qweight`` uint8 [out, in·b/8]: code + 2^(b-1) when symmetric, along the inputs, low bits first;
* ``.scales`` float32 [out, in/G], exact whatever dtype the scales have;
* ``.zeros`` uint8 [out, ceil(in/G·b/8)], packed like the codes, when asymmetric.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (QMoE,
MatMulNBits, GatherBlockQuantized). This module imports neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from zaya_convert.config import ModelConfig
from zaya_convert.export.arrays import Array, Region, piece_of
from zaya_convert.layout import EXPERT_PARTS, PART_BY_NAME, QKV_PARTS, TensorKey, resolve
from zaya_quant.spec import QuantSpec, Spec

Specs = Mapping[TensorKey, Spec | None]

BITS = (4, 8)
QWEIGHT, SCALES, ZEROS = ".qweight", ".scales", ".zeros"

_GATE, _UP, _DOWN = EXPERT_PARTS


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix lies in an array.

    Attributes:
        module: the array's name without suffix.
        rows: all dimensions of the array but the last.
        expert, part, turn: which piece of the array, as in ``arrays.piece_of``.
    """

    module: str
    rows: tuple[int, ...]
    expert: int | None = None
    part: tuple[int, int] | None = None
    turn: tuple[int, int] = (0, 1)


def place(key: TensorKey, config: ModelConfig, quantized: bool) -> Place:
    """Where the rows of a matrix are kept."""
    shape = resolve(PART_BY_NAME[key.part].shape, config.dims)
    prefix = f"model.layers.{key.layer}."
    if key.part in QKV_PARTS:
        widths = qkv_widths(config)
        index = QKV_PARTS.index(key.part)
        start = sum(widths[:index])
        module = prefix + "self_attn.qkv_proj"
        return Place(module, (sum(widths),), part=(start, start + widths[index]))
    if key.expert < 0 or not quantized:
        return Place(key.module, shape[:-1])
    if key.part == _DOWN:
        return Place(prefix + "mlp.experts.down_proj", (config.experts, shape[0]), key.expert)
    rows = (config.experts, 2 * shape[0])
    return Place(prefix + "mlp.experts.gate_up_proj", rows, key.expert, turn=turn(key.part))


def turn(part: str) -> tuple[int, int]:
    """Which rows of an array are a quantized matrix's own: (i, n) is every n-th from i on."""
    return {_GATE: (0, 2), _UP: (1, 2)}.get(part, (0, 1))


def regions(key: TensorKey, spec: Spec | None, config: ModelConfig) -> dict[str, Region]:
    """The components of a tensor: ``{"": region}`` for floats, else by suffix."""
    shape = resolve(PART_BY_NAME[key.part].shape, config.dims)
    if spec is None and len(shape) != 2:
        return {"": piece_of(Array(str(key), "F32", vector_shape(key.part, shape)))}
    found = place(key, config, spec is not None)
    if spec is None:
        arrays = {"": Array(found.module + ".weight", "F32", (*found.rows, shape[1]))}
    else:
        assert isinstance(spec, QuantSpec)
        arrays = quantized_arrays(found.module, found.rows, shape[1], spec)
    return {
        suffix: piece_of(array, found.expert, found.part, found.turn)
        for suffix, array in arrays.items()
    }


def quantized_arrays(
    module: str, rows: tuple[int, ...], inputs: int, spec: QuantSpec
) -> dict[str, Array]:
    """The arrays of one or several quantized matrices, by suffix."""
    groups = spec.groups(inputs)
    arrays = {
        QWEIGHT: Array(module + QWEIGHT, "U8", (*rows, inputs * spec.bits // 8)),
        SCALES: Array(module + SCALES, "F32", (*rows, groups)),
    }
    if not spec.symmetric:
        arrays[ZEROS] = Array(module + ZEROS, "U8", (*rows, -(-groups * spec.bits // 8)))
    return arrays


def unit(key: TensorKey, spec: Spec | None) -> tuple[str, str]:
    """What a node multiplies as one, and the form that all matrices of it must share."""
    if key.part in QKV_PARTS:
        name = f"model.layers.{key.layer}.self_attn.qkv_proj"
    elif key.expert >= 0:
        name = f"model.layers.{key.layer}.mlp.experts"
    else:
        return "", ""
    if not isinstance(spec, QuantSpec):
        return name, "float"
    return name, spec.label.removesuffix(" " + spec.scale_dtype)


def problems(key: TensorKey, shape: tuple[int, ...], spec: Spec) -> list[str]:
    """Reasons why the operators cannot take a matrix ``[out, in]`` on this grid."""
    if not isinstance(spec, QuantSpec):
        return [f"{spec.label} is a block type of GGUF; ONNX operators do not know it"]
    found = []
    if spec.bits not in BITS:
        found.append(f"{spec.bits} bits: the ONNX operators take 4 or 8")
    size = spec.group_length(shape[1])
    if size & (size - 1) or size < 16 or shape[1] % size:
        found.append(
            f"groups of {size} inputs: ONNX operators take powers of two from 16 on, which divide "
            f"its {shape[1]} inputs"
        )
    elif key.expert >= 0 and spec.group_size < 0 and shape[0] != shape[1]:
        found.append("one group for each row: QMoE has one group size for matrices of both widths")
    return found


def qkv_widths(config: ModelConfig) -> tuple[int, int, int, int]:
    """Rows of each projection in ``QKV_PARTS``."""
    dims = config.dims
    return dims["q"], dims["k"], dims["v"], dims["v"]


def vector_shape(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As the graph wants it: key temperatures stand before the head's values."""
    return (*shape, 1) if part.endswith("qk_norm.temp") else shape


def rotary_arrays(config: ModelConfig) -> dict[float, tuple[Array, Array]]:
    """Cosines and sines [positions, rotary_dim/2] by rotary base, which no checkpoint holds."""
    shape = (config.max_positions, config.rotary_dim // 2)
    bases = dict.fromkeys(config.rope_thetas)
    return {
        base: (Array(f"rotary.{i}.cos", "F32", shape), Array(f"rotary.{i}.sin", "F32", shape))
        for i, base in enumerate(bases)
    }
