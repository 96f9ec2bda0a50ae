"""Conversion speed and memory, side by side with what the machine can read and hash.

    python tools/synthetic.py --preset 8b --layout hybrid --out DIR
    python benchmarks/convert.py DIR --runs 3 -- --threads 2

``zaya-convert bench --convert DIR``, with further flags of ``quantize`` after ``--``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from zaya_convert.bench.convert import measure_convert
from zaya_convert.bench.report import convert_text
from zaya_convert.models import open_model


def main() -> None:
    """Parse the command line, run, print one table."""
    parser = argparse.ArgumentParser(description="Conversion speed and memory.")
    parser.add_argument("model")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the output (default: a temporary one)")
    parser.add_argument("extra", nargs="*", help="further flags of quantize, after --")
    options = parser.parse_args()
    found = measure_convert(open_model(options.model), options.runs, options.extra, options.out)
    print(convert_text(found))


if __name__ == "__main__":
    main()
