"""Fixtures that run the command line; test modules ask for them with ``pytest_plugins``.

Not a ``conftest.py``: two modules of that name cannot both be imported from.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.running import Run, Zaya, environment
from rounding import NEAREST
from zaya_convert.cli.main import run


@pytest.fixture
def zaya(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Zaya]:
    """Run in this process; rounds to nearest, unless ``--method`` says otherwise."""
    for name in list(os.environ):
        if name.startswith("ZAYA_CONVERT") or name == "NO_COLOR":
            monkeypatch.delenv(name)
    for name, value in NEAREST.items():
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Run:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Run(code, *capsys.readouterr())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are small, and the other cores may be busy
    yield call
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def process() -> Callable[..., Run]:
    """Run as ``python -m zaya_convert``; keyword arguments go to ``subprocess.run``."""

    def call(*arguments: object, env: dict[str, str] | None = None, **options: Any) -> Run:
        done = subprocess.run(
            [sys.executable, "-m", "zaya_convert", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(**(env or {})),
            **options,
        )
        return Run(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture(scope="session")
def artifact(nano_hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano checkpoint in int4, rounded to nearest, shared and so not to be changed."""
    out = tmp_path_factory.mktemp("artifact") / "nano-int4"
    arguments = ["--bits", "4", "--method", "rtn", "-o", str(out), "-q"]
    assert run(["quantize", str(nano_hybrid), *arguments]) == 0
    return out


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """A copy of the artifact, to damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copied"))
