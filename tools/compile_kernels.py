# pyright: reportMissingImports=false
"""Compile the Triton kernels for GPUs that are not here, and hold them to their budget.

    python tools/compile_kernels.py                  # sm80, sm90, gfx942, gfx1100
    python tools/compile_kernels.py --all --json FILE

Needs triton and nothing else: its wheel holds both vendors' assemblers. Every kernel is built in
the forms that are shipped; from the machine code come registers, spills, 16-byte loads and matrix
instructions, from the compiler the shared memory, which it does not compare to any limit.
Exit code 1 when something exceeds ``budget.json``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from zaya_kernels.triton import configs, launch
from zaya_kernels.triton.layout import WORDS

BUDGET = Path(launch.__file__).with_name("budget.json")
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm80": ("cuda", 80, 32),
    "sm89": ("cuda", 89, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "sm120": ("cuda", 120, 32),
    "gfx90a": ("hip", "gfx90a", 64),
    "gfx942": ("hip", "gfx942", 64),
    "gfx950": ("hip", "gfx950", 64),
    "gfx1100": ("hip", "gfx1100", 32),
    "gfx1151": ("hip", "gfx1151", 32),
    "gfx1201": ("hip", "gfx1201", 32),
}
USUAL = ("sm80", "sm90", "gfx942", "gfx1100")
SIZE = 2048  # inputs and outputs of ZAYA1-8B's expert matrices
VARYING = ("columns", "rows", "experts", "x_stride", "out_stride", "tokens")


@dataclass(frozen=True, slots=True)
class Form:
    """One kernel in one form."""

    kernel: str  # decode, few (prefill's small tile) or many
    bits: int
    group: int
    symmetric: bool
    swiglu: bool  # gate and up; else down

    @property
    def label(self) -> str:
        """For people."""
        kind = "sym" if self.symmetric else "asym"
        part = "gate+up" if self.swiglu else "down"
        return f"{self.kernel} {part} int{self.bits} g{self.group} {kind}"


@dataclass(frozen=True, slots=True)
class Built:
    """What the compiler made of a form."""

    target: str
    form: str
    kernel: str
    registers: int
    spills: int
    shared: int
    vector_loads: int
    matrix: int
    instructions: int


def forms() -> Iterator[Form]:
    """The forms that are built: the narrowest and the widest group, with and without zeros."""
    grids = [(bits, 32, True) for bits in (4, 8)] + [(bits, 128, False) for bits in (4, 8)]
    for kernel, grid, swiglu in itertools.product(("decode", "few", "many"), grids, (True, False)):
        yield Form(kernel, *grid, swiglu)


def arguments(form: Form, tiles: configs.Tiles) -> tuple[dict[str, str], dict[str, Any], int, int]:
    """(types of what varies, constants, warps, stages)."""
    blocks = SIZE * form.bits // 32 // WORDS
    constants: dict[str, Any] = {
        "blocks": blocks, "groups": SIZE // form.group, "bits": form.bits, "group": form.group,
        "swiglu": form.swiglu, "bias": None,
    }  # fmt: skip
    types = {"x": "*bf16", "words": "*i32", "scales": "*fp16", "out": "*bf16"}
    types |= dict.fromkeys(VARYING, "i32")
    if form.symmetric:
        constants["zeros"] = None
    else:
        types["zeros"] = "*u8"
    if form.swiglu:
        constants["shares"] = None
    else:
        types["shares"] = "*bf16"
    if form.kernel == "decode":
        types |= {"ids": "*i64", "out" if form.swiglu else "x": "*fp32"}
        tile = tiles.decode
        constants |= {"block_n": tile.block_n, "block_b": tile.block_b}
        return types, constants, tile.warps, 3
    types |= dict.fromkeys(("order", "tile_expert", "tile_first", "tile_last"), "*i32")
    tile = getattr(tiles, form.kernel)
    constants |= {"block_m": tile.block_m, "block_n": tile.block_n, "block_b": tile.block_b}
    return types, constants, tile.warps, tile.stages


def build(target: str, form: Form) -> Built:
    """Compile one form for one target."""
    # every build from the start, and in this process alone
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=os.environ[_CACHES])
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, arch, wave = TARGETS[target]
    module = launch.kernels()
    types, constants, warps, stages = arguments(
        form, configs.FAMILIES[configs.family(backend, str(arch))]
    )
    decodes = form.kernel == "decode"
    if not decodes:
        constants["compute"] = module.tl.bfloat16
    function = module.decode if decodes else module.prefill
    names = function.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constants = {name: constants[name] for name, kind in signature.items() if kind == "constexpr"}
    # what the launcher finds: aligned allocations, sizes divisible by 16, on ROCm below 2 GB
    small = [["tt.pointer_range", 32]] if backend == "hip" else []
    attrs = {
        (i,): [["tt.divisibility", 16], *(small if signature[name].startswith("*") else [])]
        for i, name in enumerate(names)
        if signature[name] != "constexpr"
    }
    source = ASTSource(function, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget(backend, arch, wave), options=options)
    counts = _nvidia(made.asm["cubin"]) if backend == "cuda" else _amd(made.asm["amdgcn"])
    return Built(target, form.label, form.kernel, shared=made.metadata.shared, **counts)


def _nvidia(cubin: bytes) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__ or "").parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", "-c", file.name)
    registers, stack = (_number(rf"{name}:(\d+)", usage) for name in ("REG", "STACK"))
    return {
        "registers": registers,
        "spills": max(stack // 4, len(re.findall(r"\b(?:STL|LDL)\b", code))),
        "vector_loads": len(re.findall(r"\bLDG(?:STS)?\.E[\w.]*\.128", code)),
        "matrix": len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code)),
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/ ", code)),
    }


def _amd(code: str) -> dict[str, int]:
    spills = (_number(rf"\.{kind}_spill_count:\s*(\d+)", code) for kind in ("vgpr", "sgpr"))
    return {
        "registers": _number(r"\.vgpr_count:\s*(\d+)", code),
        "spills": sum(spills),
        "vector_loads": len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|b128)\b", code)),
        "matrix": len(re.findall(r"\bv_(?:mfma|wmma)_", code)),
        "instructions": len(re.findall(r"^\s+[vs]_\w+|^\s+(?:ds|buffer|global)_\w+", code, re.M)),
    }


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what the tool printed")
    return int(found[1])


def violations(built: Built, budget: dict[str, Any]) -> list[str]:
    """What of one kernel exceeds the budget."""
    limit = budget["shared_bytes"][built.target]["limit"]
    kernel = budget["kernels"][built.kernel]
    checks = (
        (built.spills <= budget["spills"], f"{built.spills} spills"),
        (built.shared <= limit, f"{built.shared} bytes of shared memory of {limit}"),
        (built.vector_loads >= kernel["vector_loads"], f"{built.vector_loads} 16-byte loads"),
        (built.matrix >= kernel["matrix"], f"{built.matrix} matrix instructions"),
    )
    return [what for holds, what in checks if not holds]


_CACHES = "ZAYA_COMPILE_CACHES"
_COLUMNS = ("registers", "spills", "shared", "vector_loads", "matrix", "instructions")


@click.command()
@click.option("--all", "every", is_flag=True, help="All eleven targets.")
@click.option("--target", "chosen", multiple=True, type=click.Choice(list(TARGETS)))
@click.option("--jobs", default=min(4, os.cpu_count() or 1), show_default=True)
@click.option("--json", "to", type=click.Path(path_type=Path), help="Write every figure.")
def main(every: bool, chosen: tuple[str, ...], jobs: int, to: Path | None) -> None:
    """Compile the Triton kernels ahead of time and check them against their budget."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    targets = tuple(TARGETS) if every else chosen or USUAL
    work = list(itertools.product(targets, forms()))
    with tempfile.TemporaryDirectory() as caches:
        os.environ[_CACHES] = caches
        with ProcessPoolExecutor(jobs) as pool:
            builds = list(pool.map(build, *zip(*work, strict=True)))
    table = Table("target", "form", *(name.replace("_", " ") for name in _COLUMNS), "verdict")
    failed = 0
    for built in builds:
        wrong = violations(built, budget)
        failed += bool(wrong)
        figures = (str(getattr(built, name)) for name in _COLUMNS)
        table.add_row(built.target, built.form, *figures, "; ".join(wrong) or "ok")
    Console(width=140).print(table)
    print(f"{len(builds)} kernels, {failed} over budget")
    if to is not None:
        to.write_text(json.dumps([asdict(built) for built in builds], indent=1) + "\n")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
