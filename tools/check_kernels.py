"""Build libzaya_kernels with sanitizers or for another processor, and run its matrix of checks.

    python tools/check_kernels.py                   # as it is shipped
    python tools/check_kernels.py address thread    # with sanitizers, one after the other
    python tools/check_kernels.py arm               # aarch64, in an emulator

``address`` includes undefined behaviour. ``arm`` needs aarch64-linux-gnu-g++ or the package
ziglang, and qemu-aarch64 or qemu-aarch64-static to run what was built; ``--build-only`` does
without those. The checks are ``kernels/check/check.cpp``. Exit code 1 when one fails.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
CHECK = "zaya_kernels_check"
CROSS_COMPILER, EMULATORS = "aarch64-linux-gnu-g++", ("qemu-aarch64-static", "qemu-aarch64")
_SLOWLY = ("-DZK_OPTIMIZE=-O1",)  # more takes a compiler minutes with sanitizers
LIBRARIES = "/usr/aarch64-linux-gnu"  # where Debian has those of the other processor


@dataclass(frozen=True)
class Kind:
    """How to build and run.

    Attributes:
        flags: for the compiler.
        settings: for cmake.
        runner: put before the command.
        environment: of the run.
    """

    flags: str = ""
    settings: tuple[str, ...] = ()
    runner: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


def kind(name: str, folder: Path) -> Kind:
    """Of "plain", "address", "thread" or "arm".

    Raises:
        click.ClickException: a tool is not there.
    """
    if name == "address":
        return Kind("-g -fsanitize=address,undefined -fno-sanitize-recover=all", _SLOWLY)
    if name == "thread":
        return Kind(
            "-g -fsanitize=thread", _SLOWLY, environment=(("TSAN_OPTIONS", "halt_on_error=1"),)
        )
    if name == "arm":
        settings = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
        emulator = next((found for name in EMULATORS if (found := shutil.which(name))), "")
        return Kind(
            settings=(*settings, f"-DCMAKE_CXX_COMPILER={cross_compiler(folder)}"),
            runner=(emulator, "-L", LIBRARIES, "-cpu", "max"),
        )
    return Kind()


def cross_compiler(folder: Path) -> str:
    """A C++ compiler for aarch64 on Linux."""
    found = shutil.which(CROSS_COMPILER)
    if found:
        return found
    if importlib.util.find_spec("ziglang") is None:
        raise click.ClickException(f"needs {CROSS_COMPILER}, or: pip install ziglang")
    script = folder / "zig-c++"
    target = "aarch64-linux-gnu.2.36"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m ziglang c++ -target {target} "$@"\n')
    script.chmod(0o755)
    return str(script)


def build(kind: Kind, folder: Path) -> Path:
    """The program."""
    made = folder / "build"
    settings = ("-DZK_CHECK=ON", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_FLAGS={kind.flags}")
    _run(["cmake", "-S", str(ROOT), "-B", str(made), *settings, *kind.settings])
    _run(["cmake", "--build", str(made), "--target", CHECK, "-j", str(os.cpu_count() or 1)])
    return made / "kernels" / CHECK


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(
            f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.argument("kinds", nargs=-1, type=click.Choice(["plain", "address", "thread", "arm"]))
@click.option("--build-only", is_flag=True, help="Do not run what was built.")
def main(kinds: Sequence[str], build_only: bool) -> None:
    """Build and run each kind."""
    failed = False
    for name in kinds or ("plain",):
        with tempfile.TemporaryDirectory() as folder:
            chosen = kind(name, Path(folder))
            program = build(chosen, Path(folder))
            if build_only:
                print(f"{name}: built")
                continue
            if chosen.runner and not chosen.runner[0]:
                raise click.ClickException(f"needs one of {', '.join(EMULATORS)} to run")
            environment = os.environ | dict(chosen.environment)
            done = subprocess.run([*chosen.runner, str(program)], env=environment, check=False)
            print(f"{name}: {'passed' if done.returncode == 0 else 'FAILED'}", flush=True)
            failed |= done.returncode != 0
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
