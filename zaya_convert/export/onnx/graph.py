"""The graph of a ZAYA1 model: ``build(config, specs, locate) -> onnx.ModelProto``.

Rows of tokens are flat, [n, d] with n = batch · sequence, as in ``zaya_convert.runtime``; only
attention sees blocks [B, T]. The forward pass is that of the runtime; what the operators compute:
https://onnx.ai/onnx/operators (opset 23) and
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (com.microsoft).

Inputs: ``input_ids`` int64 [B, T]; ``attention_mask`` int64 [B, past + T], 0 for left padding; for
each layer i ``past_key_values.i.`` + ``key``, ``value`` [B, nkv, past, D], ``conv_state``
[B, c, t0+t1-2] and ``shift_state`` [B, nkv·D/2], all float32 and zeros (or empty) at the start.
Outputs: ``logits`` [B, k, V] and the states under ``present.i.``.

Two things are not as one would expect. Left padding and sliding windows go through
``GroupQueryAttention``'s bias, because its own window and lengths mean padding on the right. And a
delayed value row is carried without its bias, so that zeros are right before the first token.

A batch can start together with any number of tokens and go on by one token each; going on by
several at once is for one sequence alone, which is ``GroupQueryAttention``'s limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from zaya_convert.config import ModelConfig
from zaya_convert.export.arrays import Array
from zaya_convert.export.onnx import places
from zaya_convert.export.onnx.builder import CONTRIB, END, Builder, Locate
from zaya_convert.export.onnx.places import QWEIGHT, SCALES, ZEROS, Specs
from zaya_convert.layout import EXPERT_PARTS, QKV_PARTS, TensorKey
from zaya_quant.spec import QuantSpec

STATES = ("key", "value", "conv_state", "shift_state")

_MASKED = -1e9  # far below any score; infinity would make rows of padding NaN
_INT8 = 4  # accuracy_level: activations may be rounded to 8 bits, block by block
# Heads are scaled to length sqrt(D) by x / sqrt(mean(x²) + tiny), which only a head of zeros needs.
_TINY = 1e-20

_GATE = "mlp.gate."
_MLP = _GATE + "router_mlp."


@dataclass(frozen=True)
class Options:
    """What a graph is for.

    Attributes:
        flavour: "optimum" has the input ``num_logits_to_keep`` (int64 scalar, 0 = all), as
            transformers.js feeds it, and sorts rows by expert; "genai" gives the last token's
            logits, and has one ``QMoE`` for all quantized experts, which takes less memory but is
            slow in onnxruntime up to 1.30.
        exact: compute with the very weights that are stored and fp32 activations, for proofs; never
            with ``QMoE``, which rounds them for 8 bits. Otherwise 8-bit matrices, and 4-bit ones
            outside the experts, may round activations to 8 bits.
        routes: also give ``routes`` int64 [n, L], the class each token chose (E = skip), and
            ``route_weights`` float32 [n, L], its probability.
    """

    flavour: str = "optimum"
    exact: bool = False
    routes: bool = False


def build(
    config: ModelConfig,
    specs: Specs,
    locate: Locate,
    options: Options | None = None,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """Build the graph of a model whose weights lie in external data.

    Args:
        specs: of every tensor of the model, None for floats.
        locate: where the bytes of an array (named in ``places``) begin.
        metadata: for ``metadata_props``.
    """
    return _Graph(config, specs, locate, options or Options()).build(dict(metadata or {}))


def state_shapes(config: ModelConfig, past: int | str) -> dict[str, tuple[int | str, ...]]:
    """Shapes of a layer's states without the batch dimension, in the order of inputs."""
    dims = config.dims
    columns: tuple[int | str, ...] = (config.kv_heads, past, config.head_dim)
    return {
        "key": columns,
        "value": columns,
        "conv_state": (dims["c"], dims["t0"] + dims["t1"] - 2),
        "shift_state": (dims["v"],),
    }


@dataclass(frozen=True)
class _Shared:
    """Values that every layer uses.

    Attributes:
        batch, new: int64 [1]: B and T.
        block: the shape [B, T, -1].
        mask: float32 [n, 1], 0 for padding.
        total, lengths: ``GroupQueryAttention``'s counts of columns.
        bias: added to scores, by window.
        rotary: cosines and sines by rotary base.
    """

    batch: str
    new: str
    block: str
    mask: str
    total: str
    lengths: str
    bias: Mapping[int, str]
    rotary: Mapping[float, tuple[str, str]]


class _Graph:
    """One graph under construction."""

    def __init__(self, config: ModelConfig, specs: Specs, locate: Locate, options: Options) -> None:
        self.config, self.specs, self.options = config, specs, options
        self.g = Builder(locate)
        self._routes: list[tuple[str, str]] = []

    def build(self, metadata: dict[str, str]) -> onnx.ModelProto:
        """All of it."""
        self._inputs()
        shared = self._shared()
        x, state = self._embed(), ""
        for layer in range(self.config.layers):
            self.g.scope = f"layers.{layer}."
            x = self._attention(x, layer, shared)
            x, state = self._experts(x, layer, state)
        self.g.scope = ""
        self._head(self._norm(x, TensorKey(-1, "norm.weight")), shared)
        self._outputs()
        return self.g.model("zaya", metadata)

    # --- inputs and outputs ---------------------------------------------------------------------

    def _inputs(self) -> None:
        self.g.input("input_ids", TensorProto.INT64, ("batch_size", "sequence_length"))
        mask = ("batch_size", "total_sequence_length")
        self.g.input("attention_mask", TensorProto.INT64, mask)
        if self.options.flavour == "optimum":
            self.g.input("num_logits_to_keep", TensorProto.INT64, ())
        shapes = state_shapes(self.config, "past_sequence_length")
        for layer in range(self.config.layers):
            for name, shape in shapes.items():
                full = f"past_key_values.{layer}.{name}"
                self.g.input(full, TensorProto.FLOAT, ("batch_size", *shape))

    def _outputs(self) -> None:
        # genai allocates what is declared
        kept = "num_logits" if self.options.flavour == "optimum" else 1
        logits = ("batch_size", kept, self.config.vocab_rows)
        self.g.output("logits", TensorProto.FLOAT, logits)
        shapes = state_shapes(self.config, "total_sequence_length")
        for layer in range(self.config.layers):
            for name, shape in shapes.items():
                full = f"present.{layer}.{name}"
                self.g.output(full, TensorProto.FLOAT, ("batch_size", *shape))
        if self.options.routes:
            choices, weights = zip(*self._routes, strict=True)
            shape = ("tokens", self.config.layers)
            self.g.op("Concat", *choices, out="routes", axis=1)
            self.g.op("Concat", *weights, out="route_weights", axis=1)
            self.g.output("routes", TensorProto.INT64, shape)
            self.g.output("route_weights", TensorProto.FLOAT, shape)

    def _shared(self) -> _Shared:
        g = self.g
        batch = g.op("Shape", "input_ids", start=0, end=1)
        new = g.op("Shape", "input_ids", start=1, end=2)
        total = g.op("Shape", "attention_mask", start=1, end=2)
        last = g.op("Slice", "attention_mask", g.op("Neg", new), g.ints(END), g.ints(1))
        mask = g.op("Cast", last, to=TensorProto.FLOAT)
        narrow = g.op("Cast", total, to=TensorProto.INT32)
        before = g.op("Sub", narrow, g.scalar(1, np.int32))
        windows = dict.fromkeys(self.config.windows)
        return _Shared(
            batch=batch,
            new=new,
            block=g.op("Concat", batch, new, g.ints(-1), axis=0),
            mask=g.op("Reshape", mask, g.ints(-1, 1)),
            total=g.op("Squeeze", narrow),
            # of every row, as if nothing were padded: rotations only need distances
            lengths=g.op("Expand", before, batch),
            bias={window: self._bias(window, batch, new, total) for window in windows},
            rotary={
                base: (g.weight(cos), g.weight(sin))
                for base, (cos, sin) in places.rotary_arrays(self.config).items()
            },
        )

    def _bias(self, window: int, batch: str, new: str, total: str) -> str:
        """What is added to scores [B, 1, T, past + T]: nothing sees padding, nor out of a window.

        A window counts the query's own token. Causality is the operator's.
        """
        g = self.g
        seen = g.op("Cast", "attention_mask", to=TensorProto.BOOL)
        seen = g.op("Unsqueeze", seen, g.ints(1, 2))
        if window:
            zero, one = g.scalar(0, np.int64), g.scalar(1, np.int64)
            keys = g.op("Range", zero, g.op("Squeeze", total), one)
            queries = g.op("Slice", keys, g.op("Neg", new), g.ints(END), g.ints(0))
            oldest = g.op("Sub", queries, g.scalar(window - 1, np.int64))
            near = g.op("GreaterOrEqual", keys, g.op("Unsqueeze", oldest, g.ints(1)))
            seen = g.op("And", seen, near)
        bias = g.op("Where", seen, g.scalar(0.0, np.float32), g.scalar(_MASKED, np.float32))
        return g.op("Expand", bias, g.op("Concat", batch, g.ints(1), new, total, axis=0))

    # --- embedding and head ---------------------------------------------------------------------

    def _embed(self) -> str:
        """The residual stream at the start [n, d]."""
        g, key = self.g, TensorKey(-1, "embed_tokens.weight")
        ids = g.op("Reshape", "input_ids", g.ints(-1))
        spec, arrays = self._arrays(key)
        if spec is None:
            x = g.op("Gather", g.weight(arrays[""]), ids, axis=0)
        else:
            x = g.op(
                "GatherBlockQuantized", g.weight(arrays[QWEIGHT]), ids, g.weight(arrays[SCALES]),
                *((g.weight(arrays[ZEROS]),) if ZEROS in arrays else ()), domain=CONTRIB,
                gather_axis=0, quantize_axis=1, bits=spec.bits,
                block_size=spec.group_length(self.config.hidden),
            )  # fmt: skip
        x = g.op("Add", x, self._vector(TensorKey(-1, "input_hidden_states_bias")))
        return g.op("Mul", x, self._vector(TensorKey(-1, "input_hidden_states_scale")))

    def _head(self, x: str, shared: _Shared) -> None:
        """``logits`` of the last rows of every sequence; the head may share the embedding."""
        g, config = self.g, self.config
        if self.options.flavour == "optimum":
            # minus zero is the first row: all of them
            start = g.op("Reshape", g.op("Neg", "num_logits_to_keep"), g.ints(1))
        else:
            start = g.ints(-1)
        blocks = g.op("Reshape", x, shared.block)
        kept = g.op("Slice", blocks, start, g.ints(END), g.ints(1))
        rows = g.op("Reshape", kept, g.ints(-1, config.hidden))
        key = TensorKey(-1, "embed_tokens.weight" if config.tied else "lm_head.weight")
        bias = self._vector(TensorKey(-1, "lm_head.bias")) if config.lm_head_bias else ""
        logits = self._linear(rows, key, bias, "lm_head" + QWEIGHT if config.tied else "")
        shape = g.op("Concat", shared.batch, g.ints(-1, config.vocab_rows), axis=0)
        g.op("Reshape", logits, shape, out="logits")

    # --- attention ------------------------------------------------------------------------------

    def _attention(self, x: str, layer: int, shared: _Shared) -> str:
        """Attention and its residual, [n, d] to [n, d]."""
        g, config, dims = self.g, self.config, self.config.dims
        h = self._norm(x, TensorKey(layer, "input_layernorm.weight"))
        h = g.op("Mul", h, shared.mask)
        rows = self._linear(h, TensorKey(layer, QKV_PARTS[0]))
        blocks = g.op("Reshape", rows, shared.block)
        qk, current, delayed = g.ops(
            "Split", blocks, g.ints(dims["c"], dims["v"], dims["v"]), out=("", "", ""), axis=2
        )
        query, key = self._query_key(qk, layer, shared)
        value = self._value(current, delayed, layer)
        cos, sin = shared.rotary[config.rope_thetas[layer]]
        past, present = f"past_key_values.{layer}.", f"present.{layer}."
        mixed, _, _ = g.ops(
            "GroupQueryAttention", query, key, value, past + "key", past + "value",
            shared.lengths, shared.total, cos, sin, "", shared.bias[config.windows[layer]],
            out=("", present + "key", present + "value"), domain=CONTRIB, num_heads=config.heads,
            kv_num_heads=config.kv_heads, do_rotary=1, scale=config.head_dim**-0.5,
        )  # fmt: skip
        mixed = g.op("Reshape", mixed, g.ints(-1, dims["q"]))
        part = "self_attn.o_proj.weight"
        out = self._linear(mixed, TensorKey(layer, part), self._bias_of(layer, part))
        return self._residual(x, out, layer, "post_attention_residual_scale")

    def _query_key(self, qk: str, layer: int, shared: _Shared) -> tuple[str, str]:
        """Queries [B, T, nh·D] and keys [B, T, nkv·D], normalised, from raw columns [B, T, c].

        Means: q' = (q + k of its group) / 2, k' = mean of q' over the group; convolved path: both
        causal convolutions over time.
        """
        g, config = self.g, self.config
        heads, groups, dim = config.heads, config.kv_heads, config.head_dim
        if config.attention_bias:
            both = g.op("Concat", *(self._bias_of(layer, part) for part in QKV_PARTS[:2]), axis=0)
            # a padded column must be zero, as before the start
            mask = g.op("Reshape", shared.mask, shared.block)
            qk = g.op("Mul", g.op("Add", qk, both), mask)
        split = g.ints(heads * dim, groups * dim)
        query, key = g.ops("Split", qk, split, out=("", ""), axis=2)
        query = g.op("Reshape", query, g.ints(0, 0, groups, heads // groups, dim))
        key = g.op("Reshape", key, g.ints(0, 0, groups, 1, dim))
        query = g.op("Mul", g.op("Add", query, key), g.scalar(0.5, np.float32))
        key = g.op("ReduceMean", query, g.ints(3), keepdims=0)
        convolved = g.op("Transpose", self._convolve(qk, layer), perm=(0, 2, 1))
        own_query, own_key = g.ops("Split", convolved, split, out=("", ""), axis=2)
        query = g.op("Reshape", query, g.ints(0, 0, heads, dim))
        query = g.op("Add", query, g.op("Reshape", own_query, g.ints(0, 0, heads, dim)))
        key = g.op("Add", key, g.op("Reshape", own_key, g.ints(0, 0, groups, dim)))
        key = g.op("Mul", self._unit(key), self._vector(TensorKey(layer, "self_attn.qk_norm.temp")))
        flat = g.ints(0, 0, -1)
        return g.op("Reshape", self._unit(query), flat), g.op("Reshape", key, flat)

    def _convolve(self, qk: str, layer: int) -> str:
        """Both convolutions [B, c, T] of raw columns [B, T, c], continuing from what is carried."""
        g, config = self.g, self.config
        state = f"past_key_values.{layer}.conv_state"
        columns = g.op("Concat", state, g.op("Transpose", qk, perm=(0, 2, 1)), axis=2)
        taps = sum(config.conv_taps) - 2
        present = f"present.{layer}.conv_state"
        g.op("Slice", columns, g.ints(-taps), g.ints(END), g.ints(2), out=present)
        for name, groups in (
            ("conv_qk_depthwise", config.dims["c"]),
            ("conv_qk_grouped", config.heads + config.kv_heads),
        ):
            weight, bias = (
                self._vector(TensorKey(layer, f"self_attn.qkv_proj.{name}.{kind}"))
                for kind in ("weight", "bias")
            )
            columns = g.op("Conv", columns, weight, bias, group=groups)
        return columns

    def _value(self, current: str, delayed: str, layer: int) -> str:
        """Values [B, T, nkv·D]: this token's half rows, then those of the token before."""
        g = self.g
        carried = g.op("Unsqueeze", f"past_key_values.{layer}.shift_state", g.ints(1))
        rows = g.op("Concat", carried, delayed, axis=1)
        last = g.op("Slice", rows, g.ints(-1), g.ints(END), g.ints(1))
        g.op("Squeeze", last, g.ints(1), out=f"present.{layer}.shift_state")
        shifted = g.op("Slice", rows, g.ints(0), g.ints(-1), g.ints(1))
        if self.config.attention_bias:
            of_current, of_delayed = (self._bias_of(layer, part) for part in QKV_PARTS[2:])
            current, shifted = g.op("Add", current, of_current), g.op("Add", shifted, of_delayed)
        return g.op("Concat", current, shifted, axis=2)

    def _unit(self, x: str) -> str:
        """Scale each head, the last dimension, to length sqrt(D)."""
        ones = self.g.floats(np.ones(self.config.head_dim, np.float32), "ones")
        return self.g.op("RMSNormalization", x, ones, axis=-1, epsilon=_TINY)

    # --- router and experts ---------------------------------------------------------------------

    def _experts(self, x: str, layer: int, before: str) -> tuple[str, str]:
        """Router, experts and their residual; also the router's state for the next layer."""
        h = self._norm(x, TensorKey(layer, "post_attention_layernorm.weight"))
        state, probabilities = self._router(h, layer, before)
        biases = self._vector(TensorKey(layer, _GATE + "balancing_biases"))
        scores = self.g.op("Add", probabilities, biases)
        choice = self.g.op("ArgMax", scores, axis=-1, keepdims=1)
        weight = self.g.op("GatherElements", probabilities, choice, axis=1)
        spec = self._expert_spec(layer)
        if self.options.flavour == "genai" and spec is not None and not self.options.exact:
            out = self._fused_experts(h, probabilities, scores, choice, layer, spec)
        else:
            out = self.g.op("Mul", self._sorted_experts(h, choice, layer), weight)
        if self.options.routes:
            self._routes.append((choice, weight))
        return self._residual(x, out, layer, "post_mlp_residual_scale"), state

    def _router(self, h: str, layer: int, before: str) -> tuple[str, str]:
        """The state [n, R] and the probabilities of all E + 1 classes [n, E + 1]."""
        g = self.g
        state = self._router_linear(h, layer, _GATE + "down_proj")
        if before:
            scale = self._vector(TensorKey(layer, _GATE + "router_states_scale"))
            state = g.op("Add", state, g.op("Mul", before, scale))
        x = self._norm(state, TensorKey(layer, _MLP + "norm.weight"))
        for name in ("fc1", "fc2"):
            x = g.op("Gelu", self._router_linear(x, layer, _MLP + name), approximate="none")
        x = self._linear(x, TensorKey(layer, _MLP + "out_proj.weight"))
        return state, g.op("Softmax", x, axis=-1)

    def _router_linear(self, x: str, layer: int, name: str) -> str:
        bias = self._vector(TensorKey(layer, f"{name}.bias"))
        return self._linear(x, TensorKey(layer, f"{name}.weight"), bias)

    def _fused_experts(
        self, h: str, probabilities: str, scores: str, choice: str, layer: int, spec: QuantSpec
    ) -> str:
        """All experts as one ``QMoE``, whose own choice is among the experts alone.

        Where the skip expert was chosen all weights are 0, and so is the output, exactly.
        """
        g, count = self.g, self.config.experts
        experts = (g.ints(0), g.ints(count), g.ints(1))
        skipped = g.op("Equal", choice, g.scalar(count, np.int64))
        weights = g.op("Slice", probabilities, *experts)
        weights = g.op("Where", skipped, g.scalar(0.0, np.float32), weights)
        first, second = self._expert_arrays(layer)
        zeros = [g.weight(a[ZEROS]) if ZEROS in a else "" for a in (first, second)]
        return g.op(
            "QMoE", h, g.op("Slice", scores, *experts), g.weight(first[QWEIGHT]),
            g.weight(first[SCALES]), "", g.weight(second[QWEIGHT]), g.weight(second[SCALES]), "",
            "", "", "", *zeros, "", weights, domain=CONTRIB, k=1, activation_type="swiglu",
            swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=0,
            expert_weight_bits=spec.bits, block_size=spec.group_length(self.config.hidden),
        )  # fmt: skip

    def _sorted_experts(self, h: str, choice: str, layer: int) -> str:
        """Every expert on the rows that chose it, brought together; other rows are 0.

        The skip expert is the last class, so the smallest choices are those of experts.
        """
        g, count = self.g, self.config.experts
        mine = g.op("Cast", g.op("Equal", choice, g.ints(*range(count))), to=TensorProto.INT64)
        counts = g.op("ReduceSum", mine, g.ints(0), keepdims=0)
        _, order = g.ops(
            "TopK", g.op("Reshape", choice, g.ints(-1)), g.op("ReduceSum", counts, keepdims=1),
            out=("", ""), axis=0, largest=0, sorted=1,
        )  # fmt: skip
        rows = self._by_expert(g.op("Gather", h, order, axis=0), counts)
        gate, up = self._gate_up(rows, layer)
        product = self._silu_product(gate, up)
        product = g.op("Reshape", product, g.ints(-1, self.config.expert_width))
        out = self._per_expert(self._by_expert(product, counts), layer, EXPERT_PARTS[2])
        nothing = g.op("ConstantOfShape", g.op("Shape", h))
        return g.op("ScatterND", nothing, g.op("Unsqueeze", order, g.ints(1)), out)

    def _by_expert(self, rows: str, counts: str) -> list[str]:
        """Sorted rows, cut into those of each expert."""
        return self.g.ops("Split", rows, counts, out=("",) * self.config.experts, axis=0)

    def _gate_up(self, rows: list[str], layer: int) -> list[str]:
        """Gate and up of sorted rows; quantized ones [m, W, 1], as their rows take turns."""
        gate, up, _ = EXPERT_PARTS
        if self._expert_spec(layer) is None:
            return [self._per_expert(rows, layer, part) for part in (gate, up)]
        g = self.g
        both = g.op(
            "Reshape", self._per_expert(rows, layer, gate), g.ints(-1, self.config.expert_width, 2)
        )
        return g.ops("Split", both, out=("", ""), axis=2, num_outputs=2)

    def _per_expert(self, rows: list[str], layer: int, part: str) -> str:
        """The products of each expert's rows with its matrix, one below the other.

        Args:
            part: its name; a quantized gate stands for the matrix of gate and up.
        """
        products = []
        for expert, own in enumerate(rows):
            key = TensorKey(layer, part, expert)
            spec, arrays = self._arrays(key)
            if spec is None:
                products.append(self._linear(own, key))
            else:
                products.append(self._blockwise(own, arrays, spec, expert=expert))
        return self.g.op("Concat", *products, axis=0)

    def _silu_product(self, gate: str, up: str) -> str:
        g = self.g
        return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)

    # --- pieces ---------------------------------------------------------------------------------

    def _linear(self, x: str, key: TensorKey, bias: str = "", alias: str = "") -> str:
        """The product of rows [n, in] with the matrix that holds ``key``: [n, out].

        Args:
            bias: a value [out], or "".
            alias: name of the matrix's initializer, when the array already is one in another form.
        """
        spec, arrays = self._arrays(key)
        if isinstance(spec, QuantSpec):
            return self._blockwise(x, arrays, spec, bias, alias)
        weight = self.g.weight(arrays[""])
        return self.g.op("Gemm", x, weight, *((bias,) if bias else ()), transB=1)

    def _blockwise(
        self,
        x: str,
        arrays: Mapping[str, Array],
        spec: QuantSpec,
        bias: str = "",
        alias: str = "",
        expert: int | None = None,
    ) -> str:
        """``MatMulNBits`` of a quantized matrix, or of one expert's."""
        g, packed = self.g, arrays[QWEIGHT]
        outputs, inputs = packed.shape[-2], packed.shape[-1] * 8 // spec.bits
        block = spec.group_length(inputs)
        dims = (outputs, inputs // block, block * spec.bits // 8)
        weight = g.weight(packed, name=alias, dims=dims, expert=expert)
        rest = [g.weight(arrays[SCALES], expert=expert)]
        rest.append(g.weight(arrays[ZEROS], expert=expert) if ZEROS in arrays else "")
        if bias:
            rest += ["", bias]
        while not rest[-1]:
            rest.pop()
        exact = self.options.exact or (expert is not None and spec.bits == 4)
        return g.op(
            "MatMulNBits", x, weight, *rest, domain=CONTRIB, N=outputs, K=inputs, bits=spec.bits,
            block_size=block, accuracy_level=0 if exact else _INT8,
        )  # fmt: skip

    def _norm(self, x: str, key: TensorKey) -> str:
        weight = self._vector(key)
        return self.g.op("RMSNormalization", x, weight, axis=-1, epsilon=self.config.eps)

    def _residual(self, x: str, update: str, layer: int, name: str) -> str:
        """``(x + b_r) * s_r + (update + b_h) * s_h``: each branch is shifted, then scaled."""
        shifted = []
        for value, kind in ((update, "hidden_states"), (x, "residual")):
            bias = self._vector(TensorKey(layer, f"{name}.{kind}_bias"))
            scale = self._vector(TensorKey(layer, f"{name}.{kind}_scale"))
            shifted.append(self.g.op("Mul", self.g.op("Add", value, bias), scale))
        return self.g.op("Add", *shifted)

    def _vector(self, key: TensorKey) -> str:
        """A float tensor that is no matrix."""
        return self.g.weight(places.regions(key, None, self.config)[""].array)

    def _bias_of(self, layer: int, part: str) -> str:
        """The bias of an attention matrix, or "" in models without them."""
        key = TensorKey(layer, part.removesuffix("weight") + "bias")
        return self._vector(key) if self.config.attention_bias else ""

    def _arrays(self, key: TensorKey) -> tuple[QuantSpec | None, dict[str, Array]]:
        """How a matrix is quantized, and the arrays that hold it."""
        spec = self.specs[key]
        assert spec is None or isinstance(spec, QuantSpec)
        found = places.regions(key, spec, self.config)
        return spec, {suffix: region.array for suffix, region in found.items()}

    def _expert_spec(self, layer: int) -> QuantSpec | None:
        """How a layer's experts are quantized, which all share."""
        return self._arrays(TensorKey(layer, EXPERT_PARTS[0], 0))[0]

    def _expert_arrays(self, layer: int) -> tuple[dict[str, Array], dict[str, Array]]:
        """The arrays of a layer's quantized experts: gate and up, down."""
        gate, _, down = (TensorKey(layer, part, 0) for part in EXPERT_PARTS)
        return self._arrays(gate)[1], self._arrays(down)[1]
