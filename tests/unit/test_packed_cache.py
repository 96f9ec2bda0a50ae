"""Packed matrices on disk: mapped by the next start, whatever happened to the file meanwhile."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nano import Nano
from zaya_convert.checkpoint import Checkpoint
from zaya_convert.cli.main import run
from zaya_convert.convert import execute
from zaya_convert.errors import UsageError
from zaya_convert.models import open_model
from zaya_convert.plan import make_plan
from zaya_convert.recipe import Recipe, Rule
from zaya_convert.runtime import packed_cache, weights
from zaya_convert.runtime.model import Model
from zaya_kernels import library, table
from zaya_quant.qtensor import Quantized

if not library.supported_isas():
    pytest.skip(library.load()[1], allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = (Rule("experts", 4, 32), Rule("attention", 8, 32), Rule("embedding", 8, 32))
IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module")
def made(nano: Nano, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cached") / "nano.gguf"
    plan = make_plan(open_model(str(nano("hybrid"))), Recipe("t", "", RULES), "gguf-combined40")
    execute(plan, out)
    return out


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Checkpoint:
    return open_model(str(shutil.copytree(made, tmp_path / "nano") if made.is_dir()
                          else shutil.copy2(made, tmp_path / "nano.gguf")))  # fmt: skip


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, that keeps small models too."""
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.delenv(packed_cache.LIMIT, raising=False)
    monkeypatch.setattr(packed_cache, "SMALLEST", 1)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every matrix that is packed from now on."""
    seen: list[object] = []
    rows = dict(table.OPS)
    for op, own in rows.items():
        rows[op] = tuple(counting(row, seen) for row in own)
    monkeypatch.setattr(table, "OPS", rows)
    return seen


def counting(row: table.Row, seen: list[object]) -> table.Row:
    if (pack := row.pack) is None:
        return row

    def watch(value: Quantized) -> Any:
        seen.append(value)
        return pack(value)

    return table.Row(row.name, row.can_run, row.body, row.layout, watch)


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    return Model(checkpoint, torch.bfloat16, fast=True).forward(IDS).logits


def files(place: Path) -> list[str]:
    return sorted(path.suffix for path in place.glob("*"))


def matrices(checkpoint: Checkpoint) -> int:
    return sum(info.spec is not None for info in checkpoint.infos.values())


GRIDS = 2  # int4 and int8: as many matrices are packed to see whether a file is right


def test_the_second_start_maps(
    artifact: Checkpoint, place: Path, packed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(packed_cache.FOLDER, "off")
    wanted = logits(artifact)
    assert GRIDS < len(packed) <= matrices(artifact)  # experts that no token takes are not read
    assert not place.exists()
    monkeypatch.setenv(packed_cache.FOLDER, str(place.parent))
    packed.clear()
    assert torch.equal(logits(artifact), wanted)
    assert len(packed) == matrices(artifact) + GRIDS
    packed.clear()
    assert torch.equal(logits(artifact), wanted)
    assert len(packed) == GRIDS
    assert files(place) == [".bin", ".lock"]
    (whole,) = place.glob("*.bin")
    size = whole.stat().st_size
    assert packed_cache.usage() == (place, size)
    assert packed_cache.clear() == size
    assert packed_cache.usage() == (place, 0)


def test_deleted_while_in_use(artifact: Checkpoint, place: Path) -> None:
    model = Model(artifact, torch.bfloat16, fast=True)
    before = model.forward(IDS).logits
    shutil.rmtree(place)
    assert torch.equal(model.forward(IDS).logits, before)


def test_another_file_is_another_entry(artifact: Checkpoint, place: Path) -> None:
    logits(artifact)
    (file,) = artifact.files
    os.utime(file, (1, 1))
    logits(artifact)
    assert files(place).count(".bin") == 2


def test_other_bytes_of_the_same_size_and_time(artifact: Checkpoint, place: Path) -> None:
    logits(artifact)
    (file,) = artifact.files
    times = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    logits(artifact)
    assert files(place).count(".bin") == 2


def damage(cut: int, at: int = -1) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        if at >= 0:
            data[at:] = bytes(255 - byte for byte in data[at:])
        path.write_bytes(data[: len(data) - cut])

    return change


@pytest.mark.parametrize("change", [damage(1), damage(0, 5), damage(0, 4096)],
                         ids=["cut", "header", "other bytes"])  # fmt: skip
def test_a_damaged_file_is_made_anew(
    change: Callable[[Path], None], artifact: Checkpoint, place: Path, packed: list[object]
) -> None:
    wanted = logits(artifact)
    (file,) = place.glob("*.bin")
    whole = file.read_bytes()
    change(file)
    assert torch.equal(logits(artifact), wanted)
    packed.clear()
    assert torch.equal(logits(artifact), wanted)
    assert torch.equal(logits(artifact), wanted)
    assert file.read_bytes() == whole


def test_a_damaged_file_that_nobody_may_delete(
    artifact: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(artifact)
    (file,) = place.glob("*.bin")
    damage(0, 4096)(file)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", refuse)
    assert torch.equal(logits(artifact), wanted)


def test_a_file_that_cannot_be_mapped(
    artifact: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(artifact)

    def vanished(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(packed_cache, "map_file", vanished)
    assert torch.equal(logits(artifact), wanted)


SCRIPT = """
import sys, torch
from zaya_convert.models import open_model
from zaya_convert.runtime import packed_cache, weights
from zaya_convert.runtime.model import Model
packed_cache.SMALLEST = 1
build = packed_cache._build
def watched(*arguments):
    print("built", flush=True)
    build(*arguments)
packed_cache._build = watched
model = Model(open_model(sys.argv[1]), torch.bfloat16, fast=True)
print(float(model.forward(torch.arange(2, 40)[None]).logits.sum()))
"""


def test_processes_at_once(artifact: Checkpoint, place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(artifact.path)], text=True,
                         stdout=subprocess.PIPE, env=environment)
        for _ in range(3)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("built" in output for output in outputs) == 1
    assert len({output[-1] for output in outputs}) == 1
    assert files(place) == [".bin", ".lock"]


def test_what_a_killed_process_left(
    artifact: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packed_cache, "_packed", stop)
        with pytest.raises(KeyboardInterrupt):
            logits(artifact)
    assert files(place) == [".lock"]
    (lock,) = place.glob("*.lock")
    lock.with_suffix(".partial").write_bytes(b"half of it")
    logits(artifact)
    assert files(place) == [".bin", ".lock"]


def test_the_oldest_go_first(
    artifact: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits(artifact)
    (own,) = place.glob("*.bin")
    size, now = own.stat().st_size, time.time()
    ages = {"old.bin": 300, "used.bin": 100, "dead.partial": 10**6, "writing.partial": 10}
    for name, age in ages.items():
        (place / name).write_bytes(bytes(size))
        os.utime(place / name, (now - age, now - age))
    own.unlink()
    monkeypatch.setenv(packed_cache.LIMIT, str(3.5 * size / 1e9))
    logits(artifact)
    assert {path.name for path in place.glob("*") if path.suffix != ".lock"} == {
        own.name, "used.bin", "writing.partial",
    }  # fmt: skip
    own.unlink()
    monkeypatch.setenv(packed_cache.LIMIT, str(0.5 * size / 1e9))
    logits(artifact)  # larger than all that may be kept: nothing is deleted for it
    assert (place / "used.bin").exists()
    assert not own.exists()
    monkeypatch.setenv(packed_cache.LIMIT, "much")
    with pytest.raises(UsageError, match="CACHE_GB=much: must be a number of gigabytes"):
        logits(artifact)


def test_a_full_disk(artifact: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**8))
    logits(artifact)
    assert files(place) == [".lock"]


def test_a_folder_that_cannot_be(
    artifact: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(packed_cache.FOLDER, str(tmp_path / "file"))
    logits(artifact)


def test_small_models_and_exact_ones_are_not_kept(
    artifact: Checkpoint, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model(artifact)
    Model(artifact, torch.bfloat16)
    monkeypatch.undo()
    monkeypatch.setenv(packed_cache.FOLDER, str(place.parent))
    Model(artifact, torch.bfloat16, fast=True)
    assert not place.exists()


def test_large_float_matrices_are_mapped(nano: Nano, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_model(str(nano("hybrid")))
    model = Model(checkpoint, torch.bfloat16, fast=True)
    wanted = model.forward(IDS).logits
    monkeypatch.setattr(weights, "_MAPPED_BYTES", 1024)
    mapping = Model(checkpoint, torch.bfloat16, fast=True)
    assert torch.equal(mapping.forward(IDS).logits, wanted)
    (file,) = checkpoint.files
    matrix, small = mapping.weights.expert(0, 0).down, mapping.weights.vector("norm.weight")
    assert isinstance(matrix, torch.Tensor)
    assert isinstance(small, torch.Tensor)
    assert matrix.untyped_storage().nbytes() == file.stat().st_size
    assert small.untyped_storage().nbytes() == small.nbytes
    exact = Model(checkpoint).weights.expert(0, 0).down  # of another dtype, and not fast
    assert isinstance(exact, torch.Tensor)
    assert exact.untyped_storage().nbytes() == exact.nbytes


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(packed_cache.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert packed_cache.folder() == tmp_path / "zaya-convert" / "packed"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert packed_cache.folder() == tmp_path / ".cache" / "zaya-convert" / "packed"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}[0])  # a user without a home
    assert packed_cache.folder() is None
    assert packed_cache.usage() == (None, 0)


def test_doctor_clears(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place.mkdir(parents=True)
    (place / "a.bin").write_bytes(bytes(1234))
    assert run(["doctor", "--clear-cache"]) == 0
    assert "1.23 kB" in capsys.readouterr().out
    assert not place.exists()
