"""What interrupts the writing of a single file: its name appears complete, or not at all."""

import errno
import fcntl
import os
import shutil
import signal
import struct
from pathlib import Path

import pytest

from cli.running import Zaya
from faults.breaking import digests, failing_writes, stopped_half_way
from nano import Nano, Stored, Surgery
from zaya_convert import publish
from zaya_convert.cli.main import run

pytest_plugins = ("cli.fixtures",)

RECIPE = ("--format", "gguf", "--recipe", "Q4_0")


@pytest.fixture(scope="module")
def source(nano: Nano) -> Path:
    return nano("hybrid", layers=2)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "x.gguf"
    arguments = ["quantize", str(source), *RECIPE, "--method", "rtn", "-o", str(out), "-q"]
    assert run(arguments) == 0
    return out.read_bytes()


@pytest.fixture(scope="module")
def stopped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed run leaves beside its output; to be copied."""
    folder = tmp_path_factory.mktemp("stopped")
    assert stopped_half_way(signal.SIGKILL, source, folder / "x.gguf", *RECIPE)[0] == -9
    assert names(folder) == [".x.gguf.partial"]
    return folder / ".x.gguf.partial"


@pytest.fixture
def partial(stopped: Path, tmp_path: Path) -> Path:
    """The same, as if it had happened here."""
    return Path(shutil.copytree(stopped, tmp_path / stopped.name))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_leaves_no_output_and_resumes_to_the_same_bytes(
    zaya: Zaya, source: Path, whole: bytes, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "x.gguf"
    found, shown = stopped_half_way(number, source, out, *RECIPE)
    assert found == code
    assert names(tmp_path) == [".x.gguf.partial"]
    assert "--resume" in shown
    assert "Traceback" not in shown
    facts = zaya("quantize", source, *RECIPE, "-o", out, "--resume", "--json").json()
    assert facts["resumed_steps"] > 0
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("resume", [True, False])
def test_after_a_kill(zaya: Zaya, source: Path, whole: bytes, partial: Path, resume: bool) -> None:
    out = partial.with_name("x.gguf")
    options = ("-o", out, "--json", *(["--resume"] if resume else []))
    facts = zaya("quantize", source, *RECIPE, *options).json()
    assert (facts["resumed_steps"] > 10) == resume
    assert resume or facts["resumed_steps"] == 0
    assert out.read_bytes() == whole
    assert names(out.parent) == ["x.gguf"]


def test_parts_resume_too(zaya: Zaya, source: Path, tmp_path: Path) -> None:
    sharded = (*RECIPE, "--shard-size", "50kB")
    assert zaya("quantize", source, *sharded, "-o", tmp_path / "undisturbed").code == 0
    out = tmp_path / "out"
    stopped_half_way(signal.SIGKILL, source, out, *sharded)
    facts = zaya("quantize", source, *sharded, "-o", out, "--resume", "--json").json()
    assert facts["resumed_steps"] > 0
    assert digests(out) == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize("options", [("--bits", "8"), ("--dialect", "combined40")])
def test_resume_refuses_another_conversion(
    zaya: Zaya, source: Path, partial: Path, options: tuple[str, ...]
) -> None:
    before, out = digests(partial), partial.with_name("x.gguf")
    done = zaya("quantize", source, *RECIPE, *options, "-o", out, "--resume")
    assert done.code == 3
    assert "belongs to another conversion" in done.err
    assert digests(partial) == before


@pytest.mark.parametrize("damage", ["torn journal", "flipped bits", "lost weights"])
def test_resume_redoes_what_is_damaged(
    zaya: Zaya, source: Path, whole: bytes, partial: Path, damage: str
) -> None:
    out, weights, journal = (
        partial.with_name("x.gguf"), partial / "model.gguf", partial / publish.JOURNAL
    )  # fmt: skip
    if damage == "torn journal":
        journal.write_text(journal.read_text()[:-9])
    elif damage == "flipped bits":
        weights.write_bytes(bytes(byte ^ 1 for byte in weights.read_bytes()))
    else:
        weights.unlink()
    assert zaya("quantize", source, *RECIPE, "-o", out, "--resume").code == 0
    assert out.read_bytes() == whole


def test_what_a_run_killed_after_publishing_leaves_is_removed(
    zaya: Zaya, source: Path, whole: bytes, partial: Path
) -> None:
    """Between the renaming of the file and the emptying of its folder."""
    out = partial.with_name("x.gguf")
    (partial / "model.gguf").unlink()
    out.write_bytes(whole)
    assert zaya("quantize", source, *RECIPE, "-o", out, "--resume").code == 6
    assert out.read_bytes() == whole
    assert zaya("quantize", source, *RECIPE, "-o", out, "--resume", "--overwrite").code == 0
    assert out.read_bytes() == whole
    assert names(out.parent) == ["x.gguf"]


def test_overwriting_keeps_the_old_file_until_the_new_one_is_whole(
    zaya: Zaya, source: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.gguf"
    export = ("export", source, "--to", "gguf", "-o", out)
    assert zaya(*export).code == 0
    before = out.read_bytes()
    with failing_writes(monkeypatch, errno.ENOSPC):
        assert zaya("quantize", source, *RECIPE, "-o", out, "--overwrite").code == 5
    assert out.read_bytes() == before
    assert zaya("quantize", source, *RECIPE, "-o", out, "--overwrite", "--resume").code == 0
    assert out.read_bytes() == whole
    assert names(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_failing_disk(
    zaya: Zaya, source: Path, whole: bytes, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, number: int,
) -> None:  # fmt: skip
    out = tmp_path / "x.gguf"
    with failing_writes(monkeypatch, number):
        done = zaya("quantize", source, *RECIPE, "-o", out)
    assert (done.code, done.out) == (5, "")
    assert os.strerror(number) in done.err
    assert ("--resume" in done.err) == (number == errno.ENOSPC)
    assert not out.exists()
    assert zaya("quantize", source, *RECIPE, "-o", out, "--resume").code == 0
    assert out.read_bytes() == whole


def test_a_second_run_on_the_same_file_is_turned_away(
    zaya: Zaya, source: Path, partial: Path
) -> None:
    before, out = digests(partial), partial.with_name("x.gguf")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        done = zaya("quantize", source, *RECIPE, "-o", out)
    finally:
        os.close(descriptor)
    assert done.code == 6
    assert "being written by another process" in done.err
    assert digests(partial) == before
    assert not out.exists()


def test_too_little_room_is_told_before_any_work(
    zaya: Zaya, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    done = zaya("quantize", source, *RECIPE, "-o", tmp_path / "x.gguf")
    assert done.code == 5
    assert "MB are free" in done.err
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(zaya: Zaya, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = zaya("quantize", source, *RECIPE, "-o", tmp_path / "file" / "x.gguf")
    assert (done.code, done.out) == (5, ""), done.err
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["model.norm.weight", "mlp.experts.down_proj", "q_proj.weight"])
@pytest.mark.parametrize("recipe", [RECIPE, ("--format", "gguf", "--recipe", "F16")])
def test_a_weight_that_is_no_number(
    zaya: Zaya, source: Path, tmp_path: Path, operate: Surgery, name: str, recipe: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "source"))

    def poison(tensors: dict[str, Stored]) -> None:
        tensor = tensors[next(found for found in tensors if found.endswith(name))]
        tensor.data = tensor.data[:-2] + struct.pack("<f", float("nan"))[2:]

    operate(folder / "model.safetensors", poison)
    done = zaya("quantize", folder, *recipe, "-o", tmp_path / "x.gguf")
    assert (done.code, done.out) == (3, "")
    assert "experts.7.down_proj" if "experts" in name else name in done.err
    assert "not a finite number" in done.err
    assert names(tmp_path) == ["source"]
