"""Other people's kernels, on codes of their own: their speed is meant, not their numbers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zaya_convert.bench.measure import Call

_FEW = 1024  # rows of random codes, which larger matrices repeat


def has_onnxruntime() -> bool:
    """Whether its peers can be measured."""
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def qmoe(
    bits: int, group: int, experts: int, width: int, x: Tensor, threads: int
) -> Callable[[Tensor], Call]:
    """onnxruntime's fused experts with int8 activations, top-1.

    Args:
        width: of hidden states and of experts.
        x: [n, width].

    Returns:
        From the experts [n] of the rows to a call.
    """
    import numpy as np
    from onnx import TensorProto, helper

    generator = np.random.default_rng(0)

    def codes(rows: int) -> Any:
        shape = (experts, rows, width * bits // 8)
        return generator.integers(0, 256, shape, dtype=np.uint8)

    def scales(rows: int) -> Any:
        return np.full((experts, rows, width // group), 1e-3, dtype=np.float32)

    constants = {"w1": codes(2 * width), "s1": scales(2 * width), "w2": codes(width),
                 "s2": scales(width)}  # fmt: skip
    node = helper.make_node(
        "QMoE", ["x", "router", "w1", "s1", "", "w2", "s2"], ["y"], domain="com.microsoft",
        k=1, expert_weight_bits=bits, block_size=group, activation_type="swiglu",
        swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, accuracy_level=4,
    )  # fmt: skip
    floats = TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("x", floats, ["n", width]),
        helper.make_tensor_value_info("router", floats, ["n", experts]),
    ]
    session = _session(node, inputs, ["n", width], constants, threads)
    values = x.float().numpy()

    def call_of(ids: Tensor) -> Call:
        router = torch.nn.functional.one_hot(ids, experts).float() * 10
        feed = {"x": values, "router": router.numpy()}
        return lambda: session.run(None, feed)

    return call_of


def matmul_nbits(bits: int, group: int, rows: int, x: Tensor, threads: int) -> Call:
    """onnxruntime's product with int8 activations."""
    import numpy as np
    from onnx import TensorProto, helper

    columns = x.shape[1]
    generator = np.random.default_rng(0)
    shape = (rows, columns // group, group * bits // 8)
    constants = {
        "w": generator.integers(0, 256, shape, dtype=np.uint8),
        "s": np.full(rows * columns // group, 1e-3, dtype=np.float32),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=group, accuracy_level=4,
    )  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns])]
    session = _session(node, inputs, ["n", rows], constants, threads)
    feed = {"x": x.float().numpy()}
    return lambda: session.run(None, feed)


def torch_packed(bits: int, group: int, rows: int, count: int, x: Tensor) -> tuple[str, list[Call]]:
    """torch's own products on packed weights, in bf16; with 8 bits, a scale for each row.

    Args:
        count: matrices, each with a call of its own.

    Raises:
        RuntimeError: this build of torch has no such kernel.
    """
    columns, narrow = x.shape[1], x.bfloat16()
    aten = torch.ops.aten
    times = -(-rows // _FEW)
    if bits == 8:
        codes = torch.randint(-128, 128, (_FEW, columns), dtype=torch.int8)
        scales = torch.full((rows,), 1e-3, dtype=torch.bfloat16)
        bank = [codes.repeat(times, 1)[:rows] for _ in range(count)]
        return "torch int8pack", [
            partial(aten._weight_int8pack_mm, narrow, own, scales) for own in bank
        ]
    codes = torch.randint(0, 16, (_FEW, columns), dtype=torch.int32).repeat(times, 1)[:rows]
    packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.full((columns // group, rows, 2), 1e-3, dtype=torch.bfloat16)
    return "torch int4pack", [
        partial(aten._weight_int4pack_mm_for_cpu, narrow, packed.clone(), group, scales)
        for _ in range(count)
    ]


def _session(
    node: Any, inputs: list[Any], output: list[Any], constants: dict[str, Any], threads: int
) -> Any:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [node], "peer", inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads spin between calls, which would slow down whoever else is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
