"""Packed matrices kept on disk, so that the next start maps them instead of packing.

``~/.cache/zaya-convert/packed/KEY.bin`` (``$XDG_CACHE_HOME``, ``$ZAYA_CONVERT_CACHE``): a page that
names the key, then the bytes of every packed matrix in the order of the model, each aligned. The
key is over the manifest, the size and times of every weight file, what is packed in which form, and
the version of the kernels' layout; when a file is opened, one small matrix of each grid is packed
anew and compared. Files appear whole or not at all. One process builds, others wait for it.

A file that is in use may be deleted at any time, as may the whole folder. The least recently used
ones go when the folder would outgrow ``ZAYA_CONVERT_CACHE_GB`` (30), or the disk would run full.
Small models are not kept: packing them takes no time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from zaya_convert.checkpoint import Checkpoint
from zaya_convert.errors import UsageError
from zaya_convert.layout import TensorKey
from zaya_convert.runtime.mapping import map_file
from zaya_kernels.packed import ALIGNMENT, PackedWeight, layout_version, packed_bytes
from zaya_quant.qtensor import Quantized
from zaya_quant.spec import Spec

FOLDER, LIMIT = "ZAYA_CONVERT_CACHE", "ZAYA_CONVERT_CACHE_GB"
OFF = ("0", "off", "no", "false")
SMALLEST = 64 << 20  # bytes of packed matrices worth keeping
_DEFAULT_GB = 30.0
_ABANDONED = 24 * 3600  # seconds after which nobody still writes a partial file
_HEADER = 4096
_COMPARED = 1 << 24  # weights of the largest matrix that is packed anew only to be compared
_SPARE = 1 << 30  # bytes of the disk that are left free
_PIECE = 4 << 20  # bytes written at once: Linux keeps such files in large pages

Pack = Callable[[Quantized], PackedWeight]


@dataclass(frozen=True)
class Wanted:
    """A matrix to be packed: what it is, and what packs it."""

    key: TensorKey
    shape: tuple[int, int]
    spec: Spec
    pack: Pack


def folder() -> Path | None:
    """Where packed matrices are kept; None when they are not."""
    own = os.environ.get(FOLDER, "")
    if own.lower() in OFF:
        return None
    parts = (own,) if own else (os.environ.get("XDG_CACHE_HOME") or "~/.cache", "zaya-convert")
    try:
        return Path(*parts, "packed").expanduser()
    except RuntimeError:  # a user without a home
        return None


def mapped(
    checkpoint: Checkpoint, wanted: Sequence[Wanted], fast: bool
) -> Mapping[TensorKey, PackedWeight]:
    """The packed matrices of a model, mapped from the cache, into which they are put if need be.

    Args:
        wanted: what would be packed, in any order.
        fast: whether products may round activations to int8.

    Returns:
        All of them; or none, when there is no cache to use: it is off, cannot be written, has no
        room, or the model is small.
    """
    place, entries = folder(), sorted(wanted, key=lambda entry: entry.key)
    if place is None or not entries:
        return {}
    sizes = [
        -(-packed_bytes(entry.shape, entry.spec) // ALIGNMENT) * ALIGNMENT for entry in entries
    ]
    total = sum(sizes)
    if total < SMALLEST:
        return {}
    path = place / f"{_key(checkpoint, entries)}.bin"
    try:
        data = _open(path, total)
        if data is None:
            with _locked(path.with_suffix(".lock")):
                data = _open(path, total)
                if data is None and _make_room(place, total):
                    _build(path, checkpoint, entries, sizes)
                    data = _open(path, total)
        if data is None:
            return {}
        found = _over(data, entries, sizes, fast)
        if _same(checkpoint, entries, found):
            return found
        path.unlink(missing_ok=True)
    except OSError:  # a folder that cannot be written, a full disk
        pass
    return {}


def usage() -> tuple[Path | None, int]:
    """(where packed matrices are kept, bytes they take)."""
    place = folder()
    return place, 0 if place is None else sum(_size(path) for path in _files(place))


def clear() -> int:
    """Delete every packed matrix; returns the bytes that were freed."""
    place, size = usage()
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)
    return size


def _key(checkpoint: Checkpoint, entries: Sequence[Wanted]) -> str:
    manifest = json.dumps(checkpoint.manifest, sort_keys=True, default=str)
    facts = {
        "version": layout_version(),
        "manifest": hashlib.sha256(manifest.encode()).hexdigest(),
        "files": checkpoint.stamp(),
        # archives and copies keep times of modification; nothing keeps this one
        "changed": [path.stat().st_ctime_ns for path in checkpoint.files],
        "matrices": [[str(e.key), list(e.shape), asdict(e.spec)] for e in entries],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _header(path: Path, total: int) -> bytes:
    text = f"zaya-convert packed matrices {path.stem} {total}\n"
    return text.encode().ljust(_HEADER, b"\0")


def _open(path: Path, total: int) -> Tensor | None:
    """The bytes of a whole file, mapped; None when it is not there, or not whole."""
    if not path.is_file() or path.stat().st_size != _HEADER + total:
        return None
    with path.open("rb") as file:
        if file.read(_HEADER) != _header(path, total):
            return None
    with suppress(OSError):  # a folder that others own
        os.utime(path)  # it was used now
    try:
        return map_file(path)[_HEADER:]
    except OSError:  # deleted meanwhile, or no memory to map it to
        return None


def _build(
    path: Path, checkpoint: Checkpoint, entries: Sequence[Wanted], sizes: Sequence[int]
) -> None:
    """Pack one matrix after the other into a new file; what an earlier process left goes."""
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            held = bytearray(_header(path, sum(sizes)))
            for entry, size in zip(entries, sizes, strict=True):
                data = _packed(checkpoint, entry).data
                held += data.numpy().data
                held += bytes(size - len(data))
                while len(held) >= _PIECE:
                    file.write(held[:_PIECE])
                    del held[:_PIECE]
            file.write(held)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _packed(checkpoint: Checkpoint, entry: Wanted) -> PackedWeight:
    value = checkpoint.read(entry.key)
    assert not isinstance(value, Tensor)
    return entry.pack(value)


def _over(
    data: Tensor, entries: Sequence[Wanted], sizes: Sequence[int], fast: bool
) -> dict[TensorKey, PackedWeight]:
    parts = data.split(list(sizes))
    return {
        entry.key: PackedWeight(entry.shape, entry.spec, fast, part)
        for entry, part in zip(entries, parts, strict=True)
    }


def _same(
    checkpoint: Checkpoint, entries: Sequence[Wanted], found: Mapping[TensorKey, PackedWeight]
) -> bool:
    """Whether the smallest matrix of each grid has the bytes that it is packed into now."""
    ordered = sorted(entries, key=lambda entry: math.prod(entry.shape), reverse=True)
    smallest = {entry.spec: entry for entry in ordered}
    return all(
        torch.equal(_packed(checkpoint, entry).data, found[entry.key].data)
        for entry in smallest.values()
        if math.prod(entry.shape) <= _COMPARED
    )


def _make_room(place: Path, total: int) -> bool:
    """Delete the least recently used files until there is room; whether there is now."""
    limit = _limit()
    if total > limit:
        return False
    by_age = sorted((_changed(path), path) for path in _files(place))
    kept, now = sum(_size(path) for _, path in by_age), time.time()
    files = [p for changed, p in by_age if p.suffix == ".bin" or now - changed > _ABANDONED]
    while files and (kept + total > limit or not _fits(place, total)):
        kept -= _size(files[0])
        files.pop(0).unlink(missing_ok=True)
    return _fits(place, total)


def _fits(place: Path, total: int) -> bool:
    return shutil.disk_usage(place).free >= total + _SPARE


def _limit() -> int:
    """Bytes that the folder may take.

    Raises:
        UsageError: the environment holds no number.
    """
    text = os.environ.get(LIMIT, "")
    try:
        return int(float(text or _DEFAULT_GB) * 10**9)
    except (ValueError, OverflowError):
        raise UsageError(f"{LIMIT}={text}: must be a number of gigabytes") from None


def _files(place: Path) -> list[Path]:
    return [path for path in place.glob("*") if path.suffix in (".bin", ".partial")]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for whoever has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
