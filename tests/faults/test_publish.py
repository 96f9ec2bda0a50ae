"""What interrupts a conversion: the final name appears complete or not at all, and work is kept."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.running import Run, Zaya
from faults.breaking import digests, failing_writes, stopped_half_way
from nano import Stored, Surgery
from zaya_convert import publish

pytest_plugins = ("cli.fixtures",)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_stopped_run_leaves_no_output_and_resumes_to_the_same_bytes(
    zaya: Zaya, nano_hybrid: Path, artifact: Path, tmp_path: Path, number: int, code: int
) -> None:
    out = tmp_path / "out"
    found, shown = stopped_half_way(number, nano_hybrid, out)
    assert found == code
    assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    if code > 0:
        assert "--resume" in shown
        assert "Traceback" not in shown
    again = ("quantize", nano_hybrid, "--bits", "4", "-o", out, "--resume", "--json")
    facts = zaya(*again).json()
    assert facts["resumed_steps"] > 10
    assert digests(out) == digests(artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_resume_it_starts_over(
    zaya: Zaya, nano_hybrid: Path, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped_half_way(signal.SIGKILL, nano_hybrid, out)
    facts = zaya("quantize", nano_hybrid, "--bits", "4", "-o", out, "--json").json()
    assert facts["resumed_steps"] == 0
    assert digests(out) == digests(artifact)


def test_resume_refuses_another_conversion(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped_half_way(signal.SIGKILL, nano_hybrid, out)
    before = digests(tmp_path / ".out.partial")
    done = zaya("quantize", nano_hybrid, "--bits", "8", "-o", out, "--resume")
    assert done.code == 3
    assert "belongs to another conversion" in done.err
    assert digests(tmp_path / ".out.partial") == before


def test_resume_redoes_what_is_damaged(
    zaya: Zaya, nano_hybrid: Path, artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopped_half_way(signal.SIGKILL, nano_hybrid, out)
    journal = tmp_path / ".out.partial" / publish.JOURNAL
    journal.write_text(journal.read_text()[:-9])  # torn while it was written
    weights = tmp_path / ".out.partial" / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(bytes(byte ^ 1 for byte in raw))  # the disk lied about everything
    facts = zaya("quantize", nano_hybrid, "--bits", "4", "-o", out, "--resume", "--json").json()
    assert facts["output"] == str(out)
    assert digests(out) == digests(artifact)


def test_resume_with_nothing_to_resume(
    zaya: Zaya, nano_hybrid: Path, artifact: Path, tmp_path: Path
) -> None:
    assert zaya("quantize", nano_hybrid, "-o", tmp_path / "out", "--resume").code == 0
    assert digests(tmp_path / "out") == digests(artifact)


def test_overwriting_keeps_the_old_output_until_the_new_one_is_whole(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert zaya("quantize", nano_hybrid, "--bits", "8", "-o", out).code == 0
    before = digests(out)
    with failing_writes(monkeypatch, errno.ENOSPC):
        assert zaya("quantize", nano_hybrid, "-o", out, "--overwrite").code == 5
    assert digests(out) == before


def test_a_second_run_on_the_same_output_is_turned_away(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "mine").write_text("kept")
    descriptor = os.open(partial, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        for flag in ("--overwrite", "--resume"):
            done = zaya("quantize", nano_hybrid, "-o", tmp_path / "out", flag)
            assert done.code == 6
            assert "being written by another process" in done.err
    finally:
        os.close(descriptor)
    assert [path.name for path in partial.iterdir()] == ["mine"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_disk(
    zaya: Zaya,
    nano_hybrid: Path,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    out = tmp_path / "out"
    with failing_writes(monkeypatch, number):
        done = zaya("quantize", nano_hybrid, "-o", out)
    assert (done.code, done.out) == (5, "")
    assert os.strerror(number) in done.err
    assert ("--resume" in done.err) == (number == errno.ENOSPC)
    assert not out.exists()
    assert zaya("quantize", nano_hybrid, "-o", out, "--resume").code == 0
    assert digests(out) == digests(artifact)


def test_a_limit_on_file_size(
    process: Callable[..., Run], nano_hybrid: Path, tmp_path: Path
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = process("quantize", nano_hybrid, "-o", tmp_path / "out", preexec_fn=limit)
    assert (done.code, done.out) == (5, "")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_told_before_any_work(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    done = zaya("quantize", nano_hybrid, "-o", tmp_path / "out")
    assert done.code == 5
    assert "MB are free" in done.err
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", Path("/proc/nowhere/out")):
        done = zaya("quantize", nano_hybrid, "-o", place)
        assert (done.code, done.out) == (5, ""), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["norm.weight", "mlp.experts.down_proj", "q_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, operate: Surgery, name: str, value: float
) -> None:
    source = Path(shutil.copytree(nano_hybrid, tmp_path / "source"))

    def poison(tensors: dict[str, Stored]) -> None:
        tensor = tensors[next(found for found in tensors if found.endswith(name))]
        data = bytearray(tensor.data)
        data[-2:] = struct.pack("<f", value)[2:]  # the upper half is the bf16
        tensor.data = bytes(data)

    operate(source / "model.safetensors", poison)
    done = zaya("quantize", source, "-o", tmp_path / "out")
    assert (done.code, done.out) == (3, "")
    assert "model.safetensors" in done.err
    expected = "experts.7.down_proj" if "experts" in name else name
    assert expected in done.err
    assert "not a finite number" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_every_bad_weight_is_listed(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, operate: Surgery
) -> None:
    source = Path(shutil.copytree(nano_hybrid, tmp_path / "source"))
    names = []

    def poison(tensors: dict[str, Stored]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("o_proj.weight"):
                names.append(name)
                tensor.data = b"\xff\xff" + tensor.data[2:]

    operate(source / "model.safetensors", poison)
    done = zaya("quantize", source, "-o", tmp_path / "out")
    assert done.code == 3
    assert len(names) == 3
    assert all(name in done.err for name in names)


def test_a_truncated_shard(zaya: Zaya, nano_sharded: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(nano_sharded, tmp_path / "source"))
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    done = zaya("quantize", source, "-o", tmp_path / "out")
    assert done.code == 3
    assert shard.name in done.err
    assert "truncated" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_changes_meanwhile(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zaya_quant.methods import rtn

    source = Path(shutil.copytree(nano_hybrid, tmp_path / "source"))
    quick = rtn.quantize

    def touching(*arguments: object) -> object:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return quick(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rtn, "quantize", touching)
    done = zaya("quantize", source, "-o", tmp_path / "out")
    assert done.code == 3
    assert "changed while it was read" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_whole_file_follows_links_and_leaves_devices_alone(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    publish.write_whole(link, b"text")
    assert link.is_symlink()
    assert target.read_bytes() == b"text"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    publish.write_whole(pipe, b"text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]


def test_what_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.check_writable(tmp_path / "new" / "file")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(publish.OutputError, match=f"{tmp_path}/file: is no folder"):
        publish.check_writable(tmp_path / "file" / "file")
    with pytest.raises(publish.OutputError, match="Is a directory"):
        publish.check_writable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(publish.OutputError, match=f"{tmp_path}: cannot be written"):
        publish.check_writable(tmp_path / "file")
