"""Atomic output folders: a name appears with everything in it, or not at all.

Work happens in ``.NAME.partial`` beside the final place, under an exclusive lock. The journal in
it records each finished step; with ``--resume`` a later run continues where it stops, provided
that source, recipe and version are the same. Publishing is fsync + rename.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zaya_convert.errors import InputError, OutputError, OutputExistsError

JOURNAL = "journal.jsonl"


@contextmanager
def io_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one clear line and exit code 5."""
    try:
        yield
    except OSError as error:
        hint = "; free some space, then run again with --resume" * (error.errno == errno.ENOSPC)
        reason = error.strerror or str(error)
        if isinstance(error, FileExistsError):  # what mkdir says of a file in its way
            reason = "is no folder"
        raise OutputError(f"{error.filename or path}: {reason}{hint}") from None


def check_writable(path: Path) -> None:
    """Make a file's folder, and refuse one that could not be written: before the work, not after.

    Raises:
        OutputError: it is a folder, or its folder cannot be made or written.
    """
    with io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        target = path.parent if path.is_file() or not path.exists() else path
        if not os.access(target, os.W_OK):  # which says nothing about why
            raise PermissionError(errno.EACCES, "cannot be written to", str(target))


def write_whole(path: Path, data: bytes) -> None:
    """Write a file such that its name never stands for less than all of it.

    Where there is a device or a pipe by that name, write to that.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    path = Path(os.path.realpath(path))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass
class Workspace:
    """The partial folder of one output.

    Attributes:
        out: final path.
        partial: where files are written until they are published.
        done: journal records of an interrupted run with the same fingerprint, by step name.
    """

    out: Path
    partial: Path
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def publish(self, single: str | None = None) -> None:
        """Make everything durable and give it its final name.

        Args:
            single: the one file to publish, which replaces what stands there; None for the folder.
        """
        with io_errors(self.out):
            if single is not None:
                _fsync(self.partial / single)
                (self.partial / single).rename(self.out)
                _fsync(self.out.parent)
                empty(self.partial)
                return
            (self.partial / JOURNAL).unlink(missing_ok=True)
            for path in self.partial.rglob("*"):
                _fsync(path)
            _fsync(self.partial)
            old = _old(self.out)
            if self.out.exists():
                _remove(old)
                self.out.rename(old)
            self.partial.rename(self.out)
            _remove(old)
            _fsync(self.out.parent)

    def discard(self) -> None:
        """Leave nothing behind."""
        empty(self.partial)


class Journal:
    """Append-only record of finished steps. A step counts only once its bytes are on disk."""

    def __init__(self, workspace: Workspace, files: list[int]) -> None:
        self._file = (workspace.partial / JOURNAL).open("a", encoding="utf-8")
        self._data = files
        self._pending: list[str] = []

    def add(self, record: dict[str, Any]) -> None:
        """Remember a step; ``flush`` makes it durable."""
        self._pending.append(json.dumps(record) + "\n")

    def flush(self) -> None:
        """Data first, then the lines that vouch for it."""
        for descriptor in self._data:
            os.fdatasync(descriptor)
        self._file.write("".join(self._pending))
        self._file.flush()
        os.fdatasync(self._file.fileno())
        self._pending.clear()

    def close(self) -> None:
        """Close the file; pending records are flushed by the caller or lost on purpose."""
        self._file.close()


@contextmanager
def workspace(
    out: Path, fingerprint: str, needed_bytes: int, *, marker: str, resume: bool, overwrite: bool
) -> Iterator[Workspace]:
    """Claim an output path.

    Args:
        fingerprint: digest of everything that determines the output's bytes.
        needed_bytes: size of the finished output, checked against the disk before work begins.
        marker: a file that every output folder holds, "" when the output is a GGUF file; nothing
            else is ever replaced.

    Raises:
        OutputExistsError: the output exists (without ``overwrite``) or another run writes it.
        OutputError: no room, no permission.
        InputError: ``resume`` asked for, but the partial output is of another conversion.
    """
    out = out.absolute()
    with io_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    with locked(partial, out):
        try:
            if _old(out).exists() and not out.exists():
                _old(out).rename(out)  # an overwriting run was killed between its two renames
            _check_free(out, marker, overwrite)
            done = _journal(partial, fingerprint, resume)
            if not done:
                empty(partial)
            _check_space(out.parent, needed_bytes, partial)
            with io_errors(out):
                if not (partial / JOURNAL).exists():
                    (partial / JOURNAL).write_text(json.dumps({"fingerprint": fingerprint}) + "\n")
            yield Workspace(out, partial, done)
        finally:
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()


def check_ready(out: Path, needed_bytes: int, *, marker: str, overwrite: bool) -> None:
    """What ``workspace`` would refuse, asked before long work that precedes it.

    Raises:
        OutputExistsError, OutputError: as ``workspace``.
    """
    out = out.absolute()
    partial = out.parent / f".{out.name}.partial"
    with io_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with locked(partial, out):
        try:
            _check_free(out, marker, overwrite)
            _check_space(out.parent, needed_bytes, partial)
        finally:
            if not any(partial.iterdir()):
                partial.rmdir()


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _check_free(out: Path, marker: str, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{out} exists; choose another -o, or pass --overwrite")
    if marker:
        ours = out.is_dir() and ((out / marker).is_file() or not any(out.iterdir()))
    else:
        ours = out.is_file() and _begins(out, b"GGUF")
    if not ours:
        lacks = f"it has no {marker}" if marker else "it is no GGUF file"
        raise OutputExistsError(
            f"{out} exists and is not an artifact ({lacks}); --overwrite replaces "
            "nothing else, so choose another -o"
        )


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


@contextmanager
def locked(partial: Path, out: Path) -> Iterator[None]:
    """Hold the partial folder itself as the lock: it leaves no extra file, and dies with us."""
    with io_errors(out):
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        busy = OutputExistsError(f"{out} is being written by another process")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        # The other process may have published (renamed) the folder between open and lock.
        if not partial.is_dir() or partial.stat().st_ino != os.fstat(descriptor).st_ino:
            raise busy
        yield
    finally:
        os.close(descriptor)


def _journal(partial: Path, fingerprint: str, resume: bool) -> dict[str, dict[str, Any]]:
    path = partial / JOURNAL
    if not resume or not path.is_file():
        return {}
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break  # a torn last line: that step was not finished
    if not records:
        return {}
    if records[0].get("fingerprint") != fingerprint:
        raise InputError(
            f"{partial} belongs to another conversion (source, recipe or version changed); "
            "run without --resume to start over"
        )
    # Without the torn line, which further ones would be appended to.
    whole = path.with_suffix(".tmp")
    whole.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    whole.replace(path)
    return {record["step"]: record for record in records[1:]}


def _check_space(folder: Path, needed: int, partial: Path) -> None:
    have = shutil.disk_usage(folder).free
    if partial.is_dir():
        have += sum(path.stat().st_blocks * 512 for path in partial.rglob("*"))
    if needed > have:
        raise OutputError(
            f"{folder}: needs {needed / 1e6:,.0f} MB, only {have / 1e6:,.0f} MB are free"
        )


def empty(folder: Path) -> None:
    """Remove all that a folder holds."""
    for path in folder.iterdir():
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
