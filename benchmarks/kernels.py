"""Kernels on quantized weights: how near to what memory and peers allow.

    python benchmarks/kernels.py --threads 2

Decode rotates through more weights than any cache holds, and each turn is followed by one that
only reads the same bytes. Prefill is the experts' FFN of 256 tokens, top-1 of 16. Printed: medians
of one run, and ratios taken in it. Peers are torch in fp32 on dequantized weights, and
onnxruntime's QMoE with int8 activations where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zaya_kernels import native
from zaya_kernels.library import library, supported_isas
from zaya_kernels.packed import PackedWeight, pack
from zaya_kernels.reference import Expert
from zaya_quant.qtensor import QuantTensor
from zaya_quant.spec import QuantSpec

HIDDEN = WIDTH = 2048
EXPERTS = 16
PREFILL_TOKENS = 256
ROTATED_BYTES = 320 << 20


def random_weight(rows: int, columns: int, spec: QuantSpec) -> QuantTensor:
    """Codes of every value; speed does not depend on them."""
    codes = torch.randint(spec.qmin, spec.qmax + 1, (rows, columns), dtype=torch.int8)
    scales = (torch.rand(rows, spec.groups(columns)) + 0.5) / (spec.qmax * columns**0.5)
    return QuantTensor(codes, scales.half(), None, spec)


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rotate(calls: Sequence[Sequence[Callable[[], object]]], rounds: int) -> list[float]:
    """The median of each column of calls; a row runs after the other, round after round."""
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for column, own in enumerate(calls):
            taken = [seconds(call) for call in own]
            if turn:  # the first is for warming up
                samples[column] += taken
    return [statistics.median(own) for own in samples]


def read(weight: PackedWeight, threads: int) -> Callable[[], object]:
    """A call that only reads the bytes of a matrix."""
    return lambda: library().zk_read(weight.matrix.data, weight.nbytes, threads)


def decode(bits: int, rows: int, fast: bool, rounds: int, threads: int) -> None:
    """One row of activations by matrices [rows, 2048], and the pure read of the same bytes."""
    first = pack(random_weight(rows, WIDTH, QuantSpec(bits, 32)), fast)
    count = max(1, -(-ROTATED_BYTES // first.nbytes))
    weights = [first]
    for _ in range(count - 1):
        weights.append(pack(random_weight(rows, WIDTH, QuantSpec(bits, 32)), fast))
    x = torch.randn(1, WIDTH)
    product, pure = rotate(
        [
            [lambda weight=weight: native.linear(x, weight) for weight in weights],
            [read(weight, threads) for weight in weights],
        ],
        rounds if count > 1 else 4 * rounds,
    )
    name = f"{rows}x{WIDTH} int{bits} {'fast' if fast else 'fp32 sums'}"
    print(
        f"decode  {name:28} {product * 1e6:9.1f} us  {first.nbytes / product / 1e9:6.1f} GB/s, "
        f"read {first.nbytes / pure / 1e9:6.1f} GB/s, ratio {pure / product:5.2f}"
    )


def bank(bits: int, group: int) -> list[tuple[QuantTensor, QuantTensor, QuantTensor]]:
    """The experts' matrices, as they are stored."""
    spec = QuantSpec(bits, group)
    return [
        (
            random_weight(HIDDEN, WIDTH, spec),
            random_weight(HIDDEN, WIDTH, spec),
            random_weight(WIDTH, HIDDEN, spec),
        )
        for _ in range(EXPERTS)
    ]


def float_ffn(x: Tensor, ids: Tensor, experts: Sequence[Sequence[Tensor]]) -> Tensor:
    """The same with fp32 weights: torch's own products."""
    out = torch.empty_like(x)
    for expert, (gate, up, down) in enumerate(experts):
        rows = (ids == expert).nonzero()[:, 0]
        inner = torch.nn.functional.silu(x[rows] @ gate.t()) * (x[rows] @ up.t())
        out[rows] = inner @ down.t()
    return out


def prefill(bits: int, group: int, tokens: int, rounds: int, threads: int) -> None:
    """The experts' FFN, ours in both precisions and its peers."""
    stored = bank(bits, group)
    x, ids = torch.randn(tokens, WIDTH), torch.randint(EXPERTS, (tokens,))
    shares = torch.ones(tokens)
    calls: dict[str, Callable[[], object]] = {}
    for name, fast in (("fast", True), ("fp32 sums", False)):
        packed = [Expert(*(pack(matrix, fast) for matrix in three)) for three in stored]
        calls[name] = lambda packed=packed: native.moe_ffn(x, ids, shares, packed.__getitem__)
    dense = [[matrix.dequantize() for matrix in three] for three in stored]
    calls["torch fp32"] = lambda: float_ffn(x, ids, dense)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        calls["onnxruntime QMoE"] = qmoe(bits, group, x, ids, threads)
    medians = rotate([[call] for call in calls.values()], rounds)
    for name, median in zip(calls, medians, strict=True):
        print(
            f"FFN     {tokens} tokens, int{bits} group {group}: {name:18} {median * 1e3:8.2f} ms"
            f"  ({median / medians[0]:5.2f} x fast)"
        )


def qmoe(bits: int, group: int, x: Tensor, ids: Tensor, threads: int) -> Callable[[], object]:
    """onnxruntime's fused op on codes of its own: the speed is meant, not the numbers."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    per_byte = 8 // bits
    generator = np.random.default_rng(0)

    def codes(rows: int, columns: int) -> np.ndarray:
        shape = (EXPERTS, rows, columns // per_byte)
        return generator.integers(0, 256, shape, dtype=np.uint8)

    def scales(rows: int, columns: int) -> np.ndarray:
        return np.full((EXPERTS, rows, columns // group), 1e-3, dtype=np.float32)

    constants = {
        "w1": codes(2 * HIDDEN, WIDTH),
        "s1": scales(2 * HIDDEN, WIDTH),
        "w2": codes(WIDTH, HIDDEN),
        "s2": scales(WIDTH, HIDDEN),
    }
    node = helper.make_node(
        "QMoE",
        ["x", "router", "w1", "s1", "", "w2", "s2"],
        ["y"],
        domain="com.microsoft",
        k=1,
        expert_weight_bits=bits,
        block_size=group,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        accuracy_level=4,  # activations in int8
    )
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "qmoe",
        [
            helper.make_tensor_value_info("x", floats, ["n", WIDTH]),
            helper.make_tensor_value_info("router", floats, ["n", EXPERTS]),
        ],
        [helper.make_tensor_value_info("y", floats, ["n", WIDTH])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads spin between calls, which would slow down whoever else is measured.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    router = torch.nn.functional.one_hot(ids, EXPERTS).float() * 10
    feed = {"x": x.numpy(), "router": router.numpy()}
    return lambda: session.run(None, feed)


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description="Speed of kernels on quantized weights.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--head", action="store_true", help="a head of 262272 rows too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} threads, {supported_isas()[-1]}; medians of {options.rounds} rounds")
    for bits in (4, 8):
        for fast in (True, False):
            decode(bits, 4096, fast, options.rounds, options.threads)
            if options.head:
                decode(bits, 262272, fast, options.rounds, options.threads)
    for bits, group in ((4, 32), (4, 128), (8, 32)):
        for tokens in (1, PREFILL_TOKENS):
            prefill(bits, group, tokens, options.rounds, options.threads)


if __name__ == "__main__":
    main()
