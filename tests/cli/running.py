"""What tests of the command line share: the outcome of a run, and a child's environment."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rounding import NEAREST

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """What one run of the command line left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """stdout, which must be one JSON object and nothing else."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


class Zaya(Protocol):
    """Run with these arguments."""

    def __call__(self, *arguments: object) -> Run: ...


def environment(**extra: str) -> dict[str, str]:
    """An environment that finds the package in a plain checkout and in an editable install.

    Rounds to nearest, whatever the recipe says.
    """
    kept = {name: value for name, value in os.environ.items() if "ZAYA_CONVERT" not in name}
    kept.pop("NO_COLOR", None)
    roots = [str(ROOT / folder) for folder in (".", "quant", "kernels")]
    # One thread: many small products, and other tests may be using the other cores.
    fixed = {"PYTHONPATH": os.pathsep.join(roots), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    return {**kept, **fixed, **NEAREST, **extra}


def imported_by(*arguments: str) -> set[str]:
    """Top-level modules in ``sys.modules`` after running a command line."""
    script = (
        "import sys; from zaya_convert.cli.main import run; run(sys.argv[1:]);"
        "print('\\nMODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    return set(done.stdout.rpartition("MODULES ")[2].split())
