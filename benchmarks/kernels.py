"""Kernels on quantized weights: how near to what memory and peers allow.

    python benchmarks/kernels.py --threads 2

The same as ``zaya-convert bench --kernels``; see ``zaya_convert/bench/kernels.py``.
"""

import sys

from zaya_convert.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["bench", "--kernels", *sys.argv[1:]]))
