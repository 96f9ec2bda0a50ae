"""The kernels' sources are C++ for ARM too; ``tools/check_kernels.py arm`` also runs them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "kernels" / "src"
COMPILER = shutil.which("aarch64-linux-gnu-g++") or ""


@pytest.mark.skipif(not COMPILER, reason="aarch64-linux-gnu-g++ is not here")
@pytest.mark.parametrize("isa", ["base", "dotprod"])
def test_sources_compile_for_arm(isa: str) -> None:
    target = ["-march=armv8.2-a+dotprod"] if isa == "dotprod" else []
    defines = ["-DZK_ARM_KERNELS=1", f"-DZK_ISA_NAMESPACE={isa}"]
    own = ("tile_kernel.cpp", "decode_kernel.cpp")
    others = [] if isa == "dotprod" else ["api.cpp", "decode.cpp", "ops.cpp", "pool.cpp"]
    for name in (*own, *others):
        command = [COMPILER, "-std=gnu++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
        done = subprocess.run(
            [*command, *target, *defines, str(SOURCES / name)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
