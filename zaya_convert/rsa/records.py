"""A run on disk: a JSON Lines file that grows by whole rounds, and from which a run goes on.

The first line says what the run is of; a run that differs in any of it is refused. Then come the
candidates, one a line, each round closed by a line with their digest. Lines behind the last such
line are of a round that was interrupted, and are dropped. Nothing is written or dropped before the
first round is done, so a run that fails at once leaves what was there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zaya_convert import __version__
from zaya_convert.errors import InputError, OutputError, OutputExistsError
from zaya_convert.rsa.loop import Candidate, Round

SCHEMA = 2


@dataclass
class RunFile:
    """An open file of a run.

    Attributes:
        rounds: those it held when it was opened.
    """

    path: Path
    rounds: list[Round]
    _head: Mapping[str, Any]
    _file: IO[bytes]
    _end: int  # of what counts

    def append(self, found: Round) -> None:
        """Add one round: all of it is on disk when this returns, or none of it counts."""
        head = b"" if self._end else _line(self._head)
        rows = b"".join(_line(candidate.to_dict()) for row in found for candidate in row)
        end = {"end_of_round": len(self.rounds), "sha256": hashlib.sha256(rows).hexdigest()}
        data = head + rows + _line(end)
        try:
            self._file.truncate(self._end)
            self._file.write(data)
            self._file.flush()
            os.fdatasync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from None
        self._end += len(data)
        self.rounds.append(found)


def header(
    settings: Mapping[str, Any], *, seed: int, problems: str, model: Mapping[str, Any]
) -> dict[str, Any]:
    """What determines a run.

    Args:
        problems: their digest.
        model: what says which model it is, and what computes it.
    """
    return {
        "schema": SCHEMA, "kind": "markovian-rsa", "version": __version__, "seed": seed,
        "problems": problems, "model": dict(model), "settings": dict(settings),
    }  # fmt: skip


@contextmanager
def open_run(
    path: Path, head: Mapping[str, Any], *, resume: bool, overwrite: bool = False
) -> Iterator[RunFile]:
    """Open the file of a run for appending, locked against other runs.

    Raises:
        OutputExistsError: it exists, and is neither to be resumed nor replaced; or it is in use.
        InputError: it is to be resumed, but is of another run or damaged.
        OutputError: it cannot be written.
    """
    new = not path.exists()
    if not (new or resume or overwrite):
        raise OutputExistsError(f"{path} exists; --resume continues it, --overwrite replaces it")
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("ab+"))
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OutputError(f"{path} is no file")
            _lock(file, path)
            rounds, end = _read(path, head) if resume else ([], 0)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror or error}") from None
        try:
            yield RunFile(path, rounds, head, file, end)
        finally:
            if new and not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputExistsError(f"{path} is being written by another run") from None


def _read(path: Path, head: Mapping[str, Any]) -> tuple[list[Round], int]:
    """Whole rounds of a file, and where they end; none where even the header is torn."""
    data = path.read_bytes()
    if b"\n" not in data and _line(head).startswith(data):
        return [], 0
    lines = data.split(b"\n")
    try:
        there = json.loads(lines[0])
    except ValueError:
        there = None
    if not isinstance(there, dict) or there.get("kind") != head["kind"]:
        raise InputError("is no file of a Markovian RSA run", str(path))
    different = list(_differences(there, json.loads(json.dumps(head))))
    if different:
        raise InputError(
            [*different, "a run can only be resumed as it was begun; name another file"], str(path)
        )
    return _rounds(path, lines)


def _rounds(path: Path, lines: Sequence[bytes]) -> tuple[list[Round], int]:
    rounds: list[Round] = []
    end = position = len(lines[0]) + 1
    open_round: list[Candidate] = []
    digest = hashlib.sha256()
    for number, line in enumerate(lines[1:-1], 2):  # what follows the last line break is torn
        position += len(line) + 1
        try:
            row = json.loads(line)
            if "end_of_round" not in row:
                open_round.append(Candidate.from_dict(row))
                digest.update(line + b"\n")
                continue
            if (row["end_of_round"], row["sha256"]) != (len(rounds), digest.hexdigest()):
                raise InputError("a round is not whole, or changed", f"{path}:{number}")
        except (ValueError, KeyError, TypeError):
            raise InputError("is damaged", f"{path}:{number}") from None
        by_problem: dict[int, list[Candidate]] = {}
        for candidate in open_round:
            by_problem.setdefault(candidate.problem, []).append(candidate)
        rounds.append([by_problem[index] for index in sorted(by_problem)])
        open_round, digest, end = [], hashlib.sha256(), position
    return rounds, end


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Where two headers differ, one line each."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            yield from _differences(there.get(key), here.get(key), f"{name}.{key}".strip("."))
    elif there != here:
        yield f"{name}: {there!r} there, {here!r} here"


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
