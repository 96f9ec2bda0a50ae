"""``Step``: one token of every sequence of a batch through a whole model, in one native call.

Written as torch operations a decode step is some sixty small calls a layer, which take far longer
than reading the weights. ``src/decode.h`` computes the same: packed matrices as ``native`` does,
matrices of floats as they lie, and everything between two of them in fp32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from zaya_kernels.library import Matrix, check, library, load, options
from zaya_kernels.packed import PackedWeight
from zaya_kernels.reference import Expert, Weight

Parts = Mapping[str, Weight]

_STATE_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as ``zk::ScaleType`` has them
_DENSE_BITS = {torch.float32: 32, torch.bfloat16: 16}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step must know of a model: see ``zaya_convert.config.ModelConfig``."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    conv_taps: tuple[int, int]
    experts: int
    expert_width: int
    router_width: int
    rope_thetas: tuple[float, ...]
    eps: float


@dataclass(frozen=True, slots=True)
class States:
    """What one layer keeps of a batch; the tensors are contiguous and of the step's dtype.

    Attributes:
        buffer: keys and values [2, B, nkv, capacity, D], with room behind ``end``.
        start: first of its columns that are in use.
        end: behind the last one.
        columns: raw query-key columns [B, c, taps].
        delayed: delayed value rows [B, v].
    """

    buffer: Tensor
    start: int
    end: int
    columns: Tensor
    delayed: Tensor


_Kind = TypeVar("_Kind")


def _fields(kind: type[_Kind], names: str) -> list[tuple[str, type[_Kind]]]:
    return [(name, kind) for name in names.split()]


_I64, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Linear(ctypes.Structure):
    _fields_ = (("matrix", Matrix), ("bias", _POINTER))


class _Residual(ctypes.Structure):
    _fields_ = _fields(_POINTER, "hidden_bias hidden_scale residual_bias residual_scale")


class _Expert(ctypes.Structure):
    _fields_ = _fields(Matrix, "gate up down")


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _POINTER),
        *_fields(_Linear, "query key current delayed output"),
        *_fields(_POINTER, "depthwise depthwise_bias"),
        ("grouped", Matrix),
        *_fields(_POINTER, "grouped_bias temperature"),
        ("rotation", _I64),
        ("after_attention", _Residual),
        ("expert_norm", _POINTER),
        ("router_down", _Linear),
        *_fields(_POINTER, "router_scale router_norm"),
        *_fields(_Linear, "router_first router_second router_last"),
        ("balancing", _POINTER),
        ("after_experts", _Residual),
        ("experts", ctypes.POINTER(_Expert)),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *_fields(_I64, "layers hidden heads kv_heads head_dim rotary_dim taps0 taps1"),
        *_fields(_I64, "experts expert_width router_width rotations"),
        ("layer", ctypes.POINTER(_Layer)),
        ("frequencies", ctypes.POINTER(_POINTER)),
        ("norm", _POINTER),
        ("head", _Linear),
        *_fields(ctypes.c_float, "eps shortest"),
        *_fields(ctypes.c_int32, "state_type reserved"),
    )


class _State(ctypes.Structure):
    _fields_ = (
        ("keys_values", _POINTER),
        *_fields(_I64, "capacity start end"),
        *_fields(_POINTER, "columns delayed"),
    )


class _Step(ctypes.Structure):
    _fields_ = (*_fields(_I64, "batch past"), ("valid", _POINTER))


_ATTENTION = "self_attn."
_QKV = _ATTENTION + "qkv_proj."
_GATE = "mlp.gate."
_LINEARS = {
    "query": _QKV + "q_proj",
    "key": _QKV + "k_proj",
    "current": _QKV + "v_proj_current",
    "delayed": _QKV + "v_proj_delayed",
    "output": _ATTENTION + "o_proj",
    "router_down": _GATE + "down_proj",
    "router_first": _GATE + "router_mlp.fc1",
    "router_second": _GATE + "router_mlp.fc2",
    "router_last": _GATE + "router_mlp.out_proj",
}
_VECTORS = {
    "input_norm": "input_layernorm.weight",
    "depthwise": _QKV + "conv_qk_depthwise.weight",
    "depthwise_bias": _QKV + "conv_qk_depthwise.bias",
    "grouped_bias": _QKV + "conv_qk_grouped.bias",
    "temperature": _ATTENTION + "qk_norm.temp",
    "expert_norm": "post_attention_layernorm.weight",
    "router_scale": _GATE + "router_states_scale",
    "router_norm": _GATE + "router_mlp.norm.weight",
    "balancing": _GATE + "balancing_biases",
}
_RESIDUALS = {
    "after_attention": "post_attention_residual_scale",
    "after_experts": "post_mlp_residual_scale",
}
_RESIDUAL_PARTS = {
    "hidden_bias": "hidden_states_bias",
    "hidden_scale": "hidden_states_scale",
    "residual_bias": "residual_bias",
    "residual_scale": "residual_scale",
}


class Step:
    """A model as the native step reads it; see the top of the module.

    Args:
        shape: its dimensions.
        dtype: of its states, fp32 or bf16.
        layers: the tensors of each layer by part name, matrices packed or float.
        experts: of each layer.
        norm: the last one.
        head, head_bias: the matrix the hidden state meets last.

    Raises:
        ValueError: what the step cannot compute, and why.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        layers: Sequence[Parts],
        experts: Sequence[Sequence[Expert]],
        norm: Tensor,
        head: Weight,
        head_bias: Tensor | None,
    ) -> None:
        found, reason = load()
        if found is None:
            raise ValueError(reason)
        if dtype not in _STATE_TYPES:
            raise ValueError("for fp32 and bf16 only")
        self._kept: list[object] = []  # what the structs point to
        self._fast: set[bool] = set()
        self._dtype, self._layers = dtype, len(layers)
        self._rows = head.shape[0]
        thetas = sorted(set(shape.rope_thetas))
        own = (_Layer * len(layers))()
        for layer, parts, bank, theta in zip(own, layers, experts, shape.rope_thetas, strict=True):
            self._fill(layer, parts, bank)
            layer.rotation = thetas.index(theta)
        dim = shape.rotary_dim
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        frequencies = (_POINTER * len(thetas))(*(self._vector(1.0 / t**exponents) for t in thetas))
        self._kept += [own, frequencies]
        self._model = _Model(
            *(shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim),
            *(shape.rotary_dim, *shape.conv_taps),
            *(shape.experts, shape.expert_width, shape.router_width, len(thetas)),
            own,
            frequencies,
            self._vector(norm),
            self._linear(head, head_bias),
            shape.eps,
            torch.finfo(dtype).eps,
            _STATE_TYPES[dtype],
        )
        if len(self._fast) > 1:
            raise ValueError("some matrices round activations, others do not")

    def __call__(
        self,
        x: Tensor,
        states: Sequence[States],
        past: int,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advance every sequence by a token.

        Args:
            x: [B, d] fp32, the residual stream at the start.
            states: of each layer; each has room for one more column, which is written behind
                ``end``. The caller moves ``end``.
            past: how many tokens came before.
            valid: [B, past + 1] booleans, False for padding; None when nothing is padded.

        Returns:
            Logits [B, V] fp32, the chosen classes [L, B] int32 (E = skip, -1 = padding) and their
            probabilities [L, B] fp32.

        Raises:
            ValueError: states of another batch or dtype.
        """
        batch = x.shape[0]
        x = x.contiguous().clone()
        mask = None if valid is None else valid.contiguous()
        native = (_State * len(states))()
        for to, state in zip(native, states, strict=True):
            buffer = state.buffer
            if buffer.shape[1] != batch or buffer.dtype != self._dtype:
                raise ValueError(
                    f"{batch} sequences of {self._dtype} continue states of "
                    f"{buffer.shape[1]} of {buffer.dtype}"
                )
            to.keys_values, to.capacity = buffer.data_ptr(), buffer.shape[3]
            to.start, to.end = state.start, state.end
            to.columns, to.delayed = state.columns.data_ptr(), state.delayed.data_ptr()
        logits = torch.empty(batch, self._rows)
        routes = torch.empty(self._layers, batch, dtype=torch.int32)
        weights = torch.empty(self._layers, batch)
        status = library().zk_decode(
            ctypes.byref(self._model),
            native,
            ctypes.byref(_Step(batch, past, None if mask is None else mask.data_ptr())),
            x.data_ptr(),
            logits.data_ptr(),
            routes.data_ptr(),
            weights.data_ptr(),
            ctypes.byref(options(True in self._fast)),
        )
        check(status)
        return logits, routes, weights

    def _fill(self, layer: _Layer, parts: Parts, experts: Sequence[Expert]) -> None:
        for field, part in _LINEARS.items():
            bias = cast("Tensor | None", parts.get(f"{part}.bias"))
            setattr(layer, field, self._linear(parts[f"{part}.weight"], bias))
        for field, part in _VECTORS.items():
            setattr(layer, field, self._vector(cast("Tensor | None", parts.get(part))))
        for field, part in _RESIDUALS.items():
            vectors = (cast("Tensor", parts[f"{part}.{p}"]) for p in _RESIDUAL_PARTS.values())
            setattr(layer, field, _Residual(*map(self._vector, vectors)))
        grouped = cast("Tensor", parts[_QKV + "conv_qk_grouped.weight"])
        layer.grouped = self._matrix(grouped.flatten(1))
        bank = (_Expert * len(experts))(
            *(_Expert(*(self._matrix(matrix) for matrix in expert)) for expert in experts)
        )
        self._kept.append(bank)
        layer.experts = bank

    def _linear(self, weight: Weight, bias: Tensor | None) -> _Linear:
        return _Linear(self._matrix(weight), self._vector(bias))

    def _vector(self, values: Tensor | None) -> int | None:
        """The address of fp32 values."""
        if values is None:
            return None
        values = values.float().contiguous()
        self._kept.append(values)
        return values.data_ptr()

    def _matrix(self, weight: Weight) -> Matrix:
        if isinstance(weight, PackedWeight):
            self._fast.add(weight.fast)
            self._kept.append(weight)
            return weight.matrix
        if not isinstance(weight, Tensor) or weight.dtype not in _DENSE_BITS:
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise ValueError(f"takes packed, fp32 and bf16 matrices, not {kind}")
        weight = weight.contiguous()
        self._kept.append(weight)
        return Matrix(weight.data_ptr(), *weight.shape, _DENSE_BITS[weight.dtype], 0, 0, 0)
