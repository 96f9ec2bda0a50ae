"""Who may import whom: the architecture as a table, kept by reading every module's imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = (ROOT, ROOT / "quant", ROOT / "kernels")
OURS = ("zaya_convert", "zaya_quant", "zaya_kernels")

_INDEX = ("zaya_convert.errors", "zaya_convert.headers", "zaya_convert.files",
          "zaya_convert.layout", "zaya_convert.config", "zaya_convert.checkpoint",
          "zaya_convert.gguf_format", "zaya_convert.gguf_header", "zaya_convert.gguf_parts",
          "zaya_convert.gguf_writing", "zaya_convert.tokenizer_files")  # fmt: skip
_NUMERICS = ("torch", "numpy")

# Module or package → everything it may import besides itself, the standard library and, under
# TYPE_CHECKING, types. The longest matching row counts. "x (lazy)": only inside functions.
ALLOWED: dict[str, tuple[str, ...]] = {
    "zaya_quant": _NUMERICS,
    "zaya_quant.spec": (),
    "zaya_kernels": ("zaya_quant.spec", "zaya_quant.qtensor", "zaya_quant.shared_library", "torch"),
    "zaya_kernels.triton.device": ("triton",),  # imported by its first launch
    # the index: headers only, no torch until a weight is read
    "zaya_convert.errors": (),
    "zaya_convert.headers": ("zaya_convert.errors",),
    "zaya_convert.layout": (),
    "zaya_convert.config": ("zaya_convert.errors",),
    "zaya_convert.files": ("zaya_convert.errors", "zaya_convert.headers"),
    "zaya_convert.gguf_format": ("zaya_quant.spec",),
    "zaya_convert.gguf_header": ("zaya_convert.errors", "zaya_convert.headers",
                                 "zaya_convert.gguf_format"),
    "zaya_convert.gguf_parts": ("zaya_convert.errors", "zaya_convert.headers",
                                "zaya_convert.files", "zaya_convert.gguf_format",
                                "zaya_convert.gguf_header"),
    "zaya_convert.gguf_writing": ("zaya_convert.gguf_format",),
    "zaya_convert.checkpoint": (*_INDEX, "torch (lazy)", "numpy (lazy)"),
    "zaya_convert.hub": ("zaya_convert.errors", "huggingface_hub (lazy)"),
    "zaya_convert.fused_quants": (*_INDEX, "torch (lazy)"),
    "zaya_convert.models": (*_INDEX, "zaya_convert.export", "zaya_convert.fused_quants",
                            "zaya_convert.hub"),
    "zaya_convert.inspect": (),
    "zaya_convert.threads": ("torch",),
    "zaya_convert.tokenizer_files": ("zaya_convert.errors", "zaya_convert.headers"),
    "zaya_convert.manifest": (*_INDEX, "zaya_convert"),
    # from intent to plan
    "zaya_convert.recipe": ("zaya_convert.errors", "zaya_convert.layout", "zaya_quant.spec"),
    "zaya_convert.plan": (*_INDEX, "zaya_convert", "zaya_convert.recipe", "zaya_convert.export",
                          "zaya_quant.spec", "zaya_quant.methods"),
    "zaya_convert.card": (*_INDEX, "huggingface_hub (lazy)"),
    "zaya_convert.publish": ("zaya_convert.errors",),
    "zaya_convert.work": (*_INDEX, "torch", "blake3", "zaya_convert.plan", "zaya_convert.export",
                          "zaya_quant"),
    "zaya_convert.prefix": ("torch", "zaya_convert.plan", "zaya_convert.work",
                            "zaya_convert.runtime.walk", "zaya_quant"),
    "zaya_convert.convert": (*_INDEX, "torch", "zaya_convert", "zaya_convert.plan",
                             "zaya_convert.card", "zaya_convert.manifest", "zaya_convert.publish",
                             "zaya_convert.export", "zaya_convert.work", "zaya_convert.prefix",
                             "zaya_convert.equalize", "zaya_convert.runtime.walk",
                             "zaya_convert.threads", "zaya_quant.methods"),
    # formats: none knows another, except the parts two of them share
    "zaya_convert.export": (*_INDEX,),
    "zaya_convert.export.arrays": ("zaya_convert.headers", "zaya_quant.spec"),
    "zaya_convert.export.container": ("zaya_convert.export.arrays",),
    "zaya_convert.export.split": (*_INDEX, "zaya_convert", "zaya_convert.manifest",
                                  "zaya_convert.export.arrays", "zaya_quant.spec"),
    "zaya_convert.export.safetensors": ("zaya_convert.export.arrays",
                                        "zaya_convert.export.container"),
    "zaya_convert.export.dense": (
        *_INDEX, "zaya_convert", "zaya_convert.manifest", "zaya_convert.export",
        "zaya_convert.export.arrays", "zaya_convert.export.safetensors",
        "zaya_convert.export.split", "torch (lazy)"),
    "zaya_convert.export.gguf": (
        *_INDEX, "zaya_convert", "zaya_convert.card", "zaya_convert.manifest",
        "zaya_convert.export.arrays", "zaya_convert.export.container", "zaya_quant",
        "torch (lazy)"),
    "zaya_convert.export.onnx": (
        *_INDEX, "zaya_convert", "zaya_convert.manifest", "zaya_convert.export.arrays",
        "zaya_convert.export.container", "zaya_quant.spec", "zaya_quant (lazy)", "torch (lazy)"),
    "zaya_convert.export.onnx.builder": ("zaya_convert.export.arrays", "numpy", "onnx"),
    "zaya_convert.export.onnx.graph": (
        *_INDEX, "zaya_convert.export.arrays", "zaya_convert.export.onnx", "zaya_quant.spec",
        "numpy", "onnx"),
    "zaya_convert.export.onnx.codes": ("zaya_convert.export.onnx", "zaya_quant", "torch"),
    "zaya_convert.export.onnx.write": (
        *_INDEX, "zaya_convert.export.arrays", "zaya_convert.export.container",
        "zaya_convert.export.onnx", "torch"),
    "zaya_convert.export.onnx.read": (
        *_INDEX, "zaya_convert.manifest", "zaya_convert.export.arrays", "zaya_convert.export.onnx",
        "zaya_quant", "torch", "onnx", "google.protobuf"),
    "zaya_convert.export.compressed_tensors": (
        *_INDEX, "zaya_convert.export", "zaya_convert.export.arrays",
        "zaya_convert.export.safetensors", "zaya_convert.export.split", "zaya_quant",
        "torch (lazy)"),
    "zaya_convert.export.auto_round": (
        *_INDEX, "zaya_convert.export", "zaya_convert.export.arrays",
        "zaya_convert.export.safetensors", "zaya_convert.export.split", "zaya_quant",
        "torch (lazy)"),
    # running models and judging them
    "zaya_convert.runtime": (*_INDEX, *_NUMERICS, "zaya_convert.threads", "zaya_quant",
                             "zaya_kernels", "tokenizers", "jinja2"),
    "zaya_convert.runtime.onnx_engine": (
        *_INDEX, *_NUMERICS, "zaya_convert.export.onnx", "zaya_convert.runtime", "onnx",
        "onnxruntime (lazy)"),
    "zaya_convert.data": (*_INDEX, "torch", "zaya_convert.hub", "zaya_convert.models",
                          "zaya_convert.runtime"),
    "zaya_convert.validate": (*_INDEX, "torch", "blake3", "zaya_convert.data",
                              "zaya_convert.runtime", "zaya_convert.equalize", "zaya_quant"),
    "zaya_convert.junit": (),
    "zaya_convert.report": ("zaya_convert", "zaya_convert.junit", "rich (lazy)", "jinja2 (lazy)"),
    "zaya_convert.rsa": (*_INDEX, *_NUMERICS, "zaya_convert", "zaya_convert.junit",
                         "zaya_convert.runtime", "zaya_convert.validate", "zaya_quant",
                         "rich (lazy)", "jinja2 (lazy)", "markupsafe (lazy)"),
    "zaya_convert.rsa.endpoint": ("zaya_convert.errors", "zaya_convert.rsa", "httpx2"),
    "zaya_convert.serve": ("zaya_convert.errors", "zaya_convert.config", "zaya_convert.runtime",
                           "zaya_convert.rsa.answers", "torch", "starlette", "uvicorn"),
    "zaya_convert.oracle": (*_INDEX, "zaya_convert", "torch", "transformers",
                            "transformers (lazy)", "zaya_quant", "zaya_convert.models",
                            "zaya_convert.export"),
    "zaya_convert.hf": (*_INDEX, "torch", "transformers (lazy)", "zaya_convert.models",
                        "zaya_convert.oracle", "zaya_kernels"),
    # what models do to their matrices' inputs, and what is concluded from it
    "zaya_convert.stats": (*_INDEX, "torch", "safetensors", "zaya_convert.publish",
                           "zaya_convert.runtime.walk", "zaya_quant.stats"),
    "zaya_convert.imatrix": (*_INDEX, "torch", "zaya_convert", "zaya_convert.export.gguf.names",
                             "zaya_convert.publish", "zaya_convert.runtime.walk",
                             "zaya_convert.stats", "zaya_quant.methods"),
    "zaya_convert.sensitivity": (*_INDEX, "torch", "zaya_convert.data", "zaya_convert.threads",
                                 "zaya_convert.runtime", "zaya_kernels.reference"),
    "zaya_convert.traces": (*_INDEX, "torch", "zaya_convert.data", "zaya_convert.runtime"),
    "zaya_convert.calibrate": (*_INDEX, "zaya_convert.work", "torch", "safetensors", "zaya_convert",
                               "zaya_convert.data", "zaya_convert.publish",
                               "zaya_convert.runtime.walk", "zaya_convert.sensitivity",
                               "zaya_convert.stats"),
    "zaya_convert.equalize": (*_INDEX, *_NUMERICS, "zaya_convert.recipe", "zaya_convert.stats",
                              "zaya_convert.runtime.walk", "zaya_quant"),
    "zaya_convert.allocate": (*_INDEX, "torch", "zaya_convert.threads", "zaya_convert.export",
                              "zaya_convert.recipe", "zaya_convert.runtime.walk",
                              "zaya_convert.stats", "zaya_quant"),
    "zaya_convert.bench": (*_INDEX, "torch", "zaya_convert", "zaya_convert.threads",
                           "zaya_convert.runtime", "zaya_quant", "zaya_kernels",
                           "numpy (lazy)", "onnx (lazy)", "onnxruntime (lazy)", "rich (lazy)",
                           "triton (lazy)"),
    # what a person sees; nothing imports it
    "zaya_convert.doctor": ("zaya_convert", "zaya_convert.models", "zaya_convert.recipe",
                            "torch (lazy)", "zaya_quant (lazy)", "zaya_kernels (lazy)",
                            "zaya_convert.runtime.packed_cache (lazy)"),
    "zaya_convert.cli": ("zaya_convert", "click", "zaya_convert.errors", "zaya_convert.models",
                         "zaya_convert.recipe", "zaya_convert.inspect", "zaya_convert.manifest",
                         "zaya_convert.export", "zaya_convert.publish", "zaya_quant.spec",
                         "zaya_quant.methods",
                         "zaya_convert.doctor (lazy)", "zaya_convert.plan (lazy)",
                         "zaya_convert.convert (lazy)", "zaya_convert.data (lazy)",
                         "zaya_convert.calibrate (lazy)", "zaya_convert.stats (lazy)",
                         "zaya_convert.imatrix (lazy)",
                         "zaya_convert.traces (lazy)", "zaya_convert.allocate (lazy)",
                         "zaya_convert.equalize (lazy)",
                         "zaya_convert.validate (lazy)", "zaya_convert.report (lazy)",
                         "zaya_convert.runtime (lazy)", "zaya_convert.bench (lazy)",
                         "zaya_kernels (lazy)", "zaya_convert.serve (lazy)",
                         "zaya_convert.rsa (lazy)", "rich (lazy)", "torch (lazy)",
                         "numpy (lazy)"),
    "zaya_convert.__main__": ("zaya_convert.cli",),
    "zaya_convert": (),
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of ours by its import name."""
    found = {}
    for root, package in zip(SOURCE_ROOTS, OURS, strict=True):
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> Iterator[tuple[str, bool, bool]]:
    """(module, inside a function, for type checkers only) for every import statement."""

    def walk(node: ast.AST, lazy: bool, types: bool) -> Iterator[tuple[str, bool, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy, types) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:  # "from package import module" imports the module
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module, lazy, types
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            types = True
        for child in ast.iter_child_nodes(node):
            yield from walk(child, lazy, types)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False, False)


def covers(row: str, name: str) -> bool:
    """Whether ``name`` is ``row`` or lies in it; the top package stands for itself alone."""
    return name == row or (row != "zaya_convert" and name.startswith(row + "."))


def row_of(module: str) -> str:
    """The row of ``ALLOWED`` that speaks of a module."""
    rows = [r for r in ALLOWED if module == r or module.startswith(r + ".")]
    return max(rows, key=len)


def violations(module: str, path: Path) -> list[str]:
    own = row_of(module)
    allowed = ALLOWED[own]
    eager = [row for row in allowed if not row.endswith("(lazy)")]
    lazily = [row.removesuffix(" (lazy)") for row in allowed]
    found = []
    for name, lazy, types in imports_of(path):
        inside = covers(own, name) and own not in ("zaya_convert", "zaya_convert.export")
        if name.partition(".")[0] in sys.stdlib_module_names or inside or types:
            continue
        if not any(covers(row, name) for row in (lazily if lazy else eager)):
            found.append(f"{module} imports {name}{' lazily' if lazy else ''}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_table(module: str) -> None:
    assert not violations(module, MODULES[module])


def test_every_row_speaks_of_a_module() -> None:
    assert not {row for row in ALLOWED if row not in MODULES}


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {
        module: {
            name for name, lazy, types in imports_of(path) if name in MODULES and not lazy | types
        }
        for module, path in MODULES.items()
    }
    while leaves := {module for module, names in graph.items() if not names}:
        graph = {m: names - leaves for m, names in graph.items() if m not in leaves}
    assert not graph, f"in or above a cycle: {sorted(graph)}"


def test_nothing_but_the_entry_imports_the_command_line() -> None:
    importers = {
        module
        for module, path in MODULES.items()
        for name, *_ in imports_of(path)
        if covers("zaya_convert.cli", name) and not covers("zaya_convert.cli", module)
    }
    assert importers == {"zaya_convert.__main__"}


def test_the_table_can_fail(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import torch\nfrom zaya_convert.cli import main\nimport json\n")
    assert len(violations("zaya_convert.plan", wrong)) == 2
    wrong.write_text("def f():\n    import torch\n")
    assert not violations("zaya_convert.checkpoint", wrong)
    assert violations("zaya_convert.plan", wrong)


def run_python(script: str) -> str:
    """Run in the repository root with the source roots first, as an IDE or a bare pytest would."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(map(str, SOURCE_ROOTS)), "PATH": ""},
    )
    return done.stdout


LIGHT = ("errors", "headers", "layout", "config", "files", "gguf_header", "checkpoint", "hub",
         "tokenizer_files", "models", "recipe", "plan", "report", "manifest", "inspect",
         "publish")  # fmt: skip


def test_the_index_and_the_plan_import_no_torch() -> None:
    lines = [f"import zaya_convert.{name}" for name in LIGHT]
    script = "\n".join([*lines, "import sys; print('torch' in sys.modules)"])
    assert run_python(script) == "False\n"


def test_transformers_imports_with_our_repository_first_on_the_path() -> None:
    pytest.importorskip("transformers")
    script = (
        "import transformers.models.zaya.modeling_zaya as m, sys;"
        "print(getattr(sys.modules.get('kernels'), '__file__', None))"
    )
    shown = run_python(script).strip()
    assert not shown.startswith(str(ROOT)), shown


def test_source_roots_are_no_packages() -> None:
    for folder in ("quant", "kernels", "recipes", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "recipes").glob("*.py"))
