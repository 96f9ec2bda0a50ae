"""Generation on the CPU: how near to what memory allows, and llama.cpp beside it.

    python benchmarks/decode.py MODEL --threads 2 [--llama FOLDER] [--json]

The same as ``zaya-convert bench --decode MODEL``; see ``zaya_convert/bench/decode.py``.
"""

import sys

from zaya_convert.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["bench", "--decode", *sys.argv[1:]]))
