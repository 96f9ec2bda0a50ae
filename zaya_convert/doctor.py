"""What this machine offers: versions, optional packages, devices, native code, kernels, room."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from zaya_convert import __version__, models, recipe

REQUIRED = ("torch", "numpy", "tokenizers", "jinja2", "huggingface_hub", "click", "rich")

# extra → the packages it brings and what they are for
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "oracle": (
        ("transformers", "accelerate", "compressed-tensors"),
        "transformers as an independent reference, and reading artifacts with it",
    ),
    "onnx": (("onnx", "onnxruntime"), "writing and reading ONNX, and running it"),
    "serve": (("starlette", "uvicorn"), "serving a model with OpenAI's API"),
    "gpu": (("triton",), "kernels for CUDA and ROCm"),
}

# What makes a difference to our code, as the kernel names it (x86 and arm)
_CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16",
    "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """All findings; what cannot be found out says why instead of failing."""
    return {
        "zaya_convert": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in REQUIRED},
        "extras": [_extra(name) for name in EXTRAS],
        "cpu": {"cores": os.cpu_count(), "memory_bytes": _memory(), "features": _cpu_features()},
        "devices": _devices(),
        "native": _native(),
        "kernels": _kernels(),
        "bundled_checkpoint": (models.BUNDLED / "config.json").is_file(),
        "recipes": list(recipe.shipped()),
        "cache": _cache(),
        "free_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extra(name: str) -> dict[str, Any]:
    packages, purpose = EXTRAS[name]
    found = {package: version(package) for package in packages}
    complete = all(found.values())
    return {
        "name": name,
        "purpose": purpose,
        "packages": found,
        "install": None if complete else f"pip install 'zaya-convert[{name}]'",
    }


def _cpu_features() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    lines = [line for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    flags = set(lines[0].split()) if lines else set()
    return [flag for flag in _CPU_FLAGS if flag in flags]


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _devices() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError as error:
        return [{"name": "cpu", "detail": f"torch does not import: {error}"}]
    found: list[dict[str, Any]] = [
        {"name": "cpu", "detail": f"torch uses {torch.backends.cpu.get_cpu_capability()}"}
    ]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {"name": f"cuda:{index}", "detail": facts.name, "memory_bytes": facts.total_memory}
        )
    return found


def _native() -> dict[str, Any]:
    """The native quantizer: in use or not, with the place or the reason."""
    try:
        from zaya_quant import native

        available, detail = native.available()
        return {"available": available, "isa": native.isa(), "detail": detail}
    except ImportError as error:
        return {"available": False, "isa": "reference", "detail": str(error)}


def _cache() -> dict[str, Any]:
    """Where packed matrices are kept, None when they are not, and what they take."""
    try:
        from zaya_convert.runtime.packed_cache import usage
    except ImportError:
        return {"folder": None, "bytes": 0}
    place, size = usage()
    return {"folder": None if place is None else str(place), "bytes": size}


def _kernels() -> list[dict[str, str]]:
    """Every kernel of every op, for float weights and for quantized ones where they could run."""
    try:
        import torch

        from zaya_kernels.request import Request
        from zaya_kernels.table import explain
        from zaya_quant.spec import QuantSpec

        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        int4 = {"dtype": torch.bfloat16, "spec": QuantSpec(4, 32), "fast": True}
        requests = {"float32 on the cpu": Request()} | {
            f"int4 in bfloat16 on the {device}": Request(device=device, **int4)
            for device in devices
        }
        return [
            {"op": op, "kernel": name, "weights": weights, "status": why}
            for weights, request in requests.items()
            for op, name, why in explain(request)
        ]
    except (ImportError, ValueError) as error:  # ValueError: the environment forces a bad one
        return [{"op": "all", "kernel": "none", "weights": "all", "status": str(error)}]
