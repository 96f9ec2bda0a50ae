"""Speed of the quantizer alone, per instruction set, in memory on one thread.

    OMP_NUM_THREADS=1 python benchmarks/quantizer.py

One 4096 x 2048 bf16 matrix of normal values, symmetric, fp16 scales, the full scale search.
Printed: million weights per second, median of several calls, interleaved over instruction sets.
"""

from __future__ import annotations

import statistics
import time

import torch

from zaya_quant import native
from zaya_quant.spec import QuantSpec

CALLS = 7


def main() -> None:
    """Time every instruction set on a few specs and print one table."""
    weight = (torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    sets = native.supported_isas()
    print(f"{'':24}" + "".join(f"{name:>10}" for name in sets))
    for bits, group in ((4, 32), (4, 128), (8, 32)):
        spec = QuantSpec(bits, group)
        seconds: dict[str, list[float]] = {name: [] for name in sets}
        for _ in range(CALLS):
            for name in sets:
                started = time.perf_counter()
                native.quantize(weight, spec, None, name)
                seconds[name].append(time.perf_counter() - started)
        speeds = [weight.numel() / 1e6 / statistics.median(seconds[name]) for name in sets]
        print(f"int{bits} group {group:<14}" + "".join(f"{speed:10.0f}" for speed in speeds))


if __name__ == "__main__":
    main()
