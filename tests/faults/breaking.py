"""Ways to break off a conversion: signals sent half way, and writes that fail."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.running import environment

# The command line with a slow quantizer that tells of every matrix, and a journal always on disk.
SLOW = r"""
import os, signal, sys, time
from zaya_convert import convert
from zaya_convert.cli.main import main
from zaya_quant.methods import rtn

signal.signal(signal.SIGINT, signal.default_int_handler)
convert._JOURNAL_SECONDS = 0
quick = rtn.quantize

def slow(*arguments):
    os.write(1, b"matrix\n")  # in one piece, whichever thread it is
    time.sleep(0.02)
    return quick(*arguments)

rtn.quantize = slow
main()
"""


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stopped_half_way(number: int, source: Path, out: Path, *options: str) -> tuple[int, str]:
    """Quantize slowly, send a signal after thirty matrices; exit code and stderr."""
    given = options or ("--bits", "4")
    arguments = ["quantize", str(source), *given, "-o", str(out), "--threads", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for _ in range(30):
            assert child.stdout.readline() == "matrix\n"
        child.send_signal(number)
        child.stdout.read()
        shown = child.stderr.read()
    return child.returncode, shown


@contextmanager
def failing_writes(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Let the fortieth write to a weight file fail."""
    count, write = 0, os.pwrite

    def failing(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal count
        count += 1
        if count == 40:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        yield
