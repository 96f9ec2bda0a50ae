"""Fixtures shared by all tests: small checkpoints in every form, written once per session."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nano import NANO_SKIP_BIAS, Nano, Stored, Surgery, safetensors_bytes
from synthetic import nano_config, write_checkpoint
from zaya_convert.config import ModelConfig
from zaya_convert.threads import one_thread_each

ROOT = Path(__file__).resolve().parent.parent

# Small as it is, the model has what can go wrong: a sliding layer, EDA, reachable skip expert.
NANO_CHANGES: dict[str, Any] = {"windows": (0, 9, 0)}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small products, which threads would only slow down: other jobs may use the cores."""
    with one_thread_each():
        yield


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Nano:
    """Folder of a small checkpoint with these properties, shared and so not to be changed."""
    made: dict[str, Path] = {}

    def make(layout: str = "hybrid", **options: Any) -> Path:
        known = repr((layout, sorted(options.items())))
        if known not in made:
            writing: dict[str, Any] = {"skip_bias": NANO_SKIP_BIAS} | {
                name: options.pop(name)
                for name in ("dtype", "shards", "index", "seed", "skip_bias", "lying")
                if name in options
            }
            changes = options if "layers" in options else NANO_CHANGES | options
            folder = tmp_path_factory.mktemp("nano")
            made[known] = write_checkpoint(folder, nano_config(**changes), layout=layout, **writing)
        return made[known]

    return make


@pytest.fixture(scope="session")
def nano_model() -> ModelConfig:
    """The configuration of every ``nano`` checkpoint that names no changes."""
    return nano_config(**NANO_CHANGES)


@pytest.fixture(scope="session")
def nano_hybrid(nano: Nano) -> Path:
    """Hybrid layout, one file, bf16."""
    return nano("hybrid")


@pytest.fixture(scope="session")
def nano_legacy(nano: Nano) -> Path:
    """Legacy layout, one file, bf16."""
    return nano("legacy")


@pytest.fixture(scope="session")
def nano_sharded(nano: Nano) -> Path:
    """Hybrid layout, three files and an index, bf16."""
    return nano("hybrid", shards=3)


@pytest.fixture(scope="session")
def nano_f32(nano: Nano) -> Path:
    """Hybrid layout, one file, float32: the form to compare with other implementations."""
    return nano("hybrid", dtype=torch.float32)


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The checkpoint that ships with the package."""
    path = ROOT / "zaya_convert" / "bundled" / "zaya1-tiny"
    if not (path / "config.json").is_file():
        pytest.skip("the bundled checkpoint is not here")
    return path


@pytest.fixture(scope="session")
def operate() -> Surgery:
    """``operate(file, change)``: rewrite a safetensors file after changing its tensors in place."""

    def run(path: Path, change: Callable[[dict[str, Stored]], object]) -> None:
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        tensors = {
            name: Stored(e["dtype"], e["shape"], raw[start:][slice(*e["data_offsets"])])
            for name, e in json.loads(raw[8:start]).items()
            if name != "__metadata__"
        }
        change(tensors)
        path.write_bytes(safetensors_bytes(tensors))

    return run
