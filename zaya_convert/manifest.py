"""The manifest: what an artifact is, where it came from, and a checksum of every byte in it.

No weight format carries a checksum; a flipped bit loads silently everywhere. ``verify`` compares
an artifact with its manifest, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from zaya_convert.errors import InputError
from zaya_convert.files import read_json
from zaya_convert.gguf_header import read_gguf
from zaya_convert.headers import RawTensor, read_header

NAME = "zaya-convert.json"
SCHEMA = 1
_BLOCK = 8 << 20


@dataclass(frozen=True)
class FileDigest:
    """Checksums of one file; ``tensors`` maps names to (sha256, dtype, shape)."""

    name: str
    bytes: int
    sha256: str
    tensors: Mapping[str, tuple[str, str, tuple[int, ...]]]


def read(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact, {} when it has none.

    Raises:
        InputError: it is not one of ours, or damaged.
    """
    if not (folder / NAME).is_file():
        return {}
    manifest = read_json(folder / NAME)
    source = manifest.get("source")
    known = isinstance(source, dict) and all(
        isinstance(source.get(name), str) for name in ("digest", "model")
    )
    if manifest.get("schema") != SCHEMA or not known:
        raise InputError("is damaged, or of another version", NAME)
    return manifest


def digest_file(path: Path, known: Mapping[str, str] | None = None) -> FileDigest:
    """Checksum a file, and every tensor in it if it is a weight file, in one pass.

    Args:
        known: sha256 of tensors that were hashed when they were written; not hashed again.
    """
    known = known or {}
    tensors = _tensors(path)
    total = hashlib.sha256()
    found: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    size = 0
    with path.open("rb", buffering=0) as file:

        def take(count: int, also: Callable[[memoryview], None] | None = None) -> None:
            nonlocal size
            while count > 0 and (block := file.read(min(_BLOCK, count))):
                view = memoryview(block)
                total.update(view)
                if also:
                    also(view)
                count -= len(view)
                size += len(view)

        for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
            take(tensor.begin - size)
            own = hashlib.sha256()
            take(tensor.end - tensor.begin, None if tensor.name in known else own.update)
            digest = known.get(tensor.name) or own.hexdigest()
            found[tensor.name] = (digest, tensor.dtype, tensor.shape)
        take(1 << 62)
    return FileDigest(path.name, size, total.hexdigest(), found)


def _tensors(path: Path) -> Mapping[str, RawTensor]:
    """The tensors of a weight file, {} for any other."""
    if path.suffix == ".safetensors":
        return read_header(path)[0]
    return read_gguf(path).tensors if path.suffix == ".gguf" else {}


def build(facts: Mapping[str, Any], files: list[FileDigest]) -> bytes:
    """Serialise a manifest: ``facts`` about the conversion, then files and tensors, sorted."""
    tensors = {
        name: {"file": file.name, "sha256": digest, "dtype": dtype, "shape": list(shape)}
        for file in files
        for name, (digest, dtype, shape) in file.tensors.items()
    }
    manifest = {
        "schema": SCHEMA,
        **facts,
        "files": {f.name: {"bytes": f.bytes, "sha256": f.sha256} for f in sorted(files, key=_name)},
        "tensors": dict(sorted(tensors.items())),
    }
    return (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()


def _name(file: FileDigest) -> str:
    return file.name


def verify(folder: Path, progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Check every file and tensor of an artifact against its manifest.

    Args:
        progress: called with the number of bytes just checked.

    Returns:
        The manifest.

    Raises:
        InputError: no manifest, a missing, changed or unlisted file; all of them at once.
    """
    manifest = read(folder)
    if not manifest:
        raise InputError(
            f"has no {NAME}; only artifacts that zaya-convert wrote can be verified", str(folder)
        )
    files: Any = manifest.get("files")
    tensors: Any = manifest.get("tensors")
    if not _well_formed(files, tensors):
        raise InputError("is damaged, or of another version", NAME)
    problems = [f"{name} is missing" for name in files if not (folder / name).is_file()]
    listed = {*files, NAME}
    held = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    problems += [f"{name} is not in the manifest" for name in sorted(held - listed)]
    for name, expected in files.items():
        if (folder / name).is_file():
            problems += _compare(folder, name, expected, tensors)
            progress(expected["bytes"])
    if problems:
        raise InputError(problems, folder.name)
    return manifest


def _well_formed(files: Any, tensors: Any) -> bool:
    """Whether both tables look as ``build`` writes them; files lie in the folder, or in one of it.

    There are no tensors where weight files do not say themselves what they hold, as in ONNX.
    """
    if not isinstance(files, dict) or not isinstance(tensors, dict) or not files:
        return False
    entries = [*files.values(), *tensors.values()]
    return (
        all(isinstance(e, dict) and isinstance(e.get("sha256"), str) for e in entries)
        and all(type(entry.get("bytes")) is int for entry in files.values())
        and all(_is_inside(name) for name in files)
        and all(entry.get("file") in files for entry in tensors.values())
    )


def _is_inside(name: str) -> bool:
    """Whether a file's name stays in the folder, and is written in the one usual way."""
    path = PurePosixPath(name)
    return str(path) == name and name != "." and ".." not in path.parts and not path.is_absolute()


def _compare(
    folder: Path, name: str, expected: Mapping[str, Any], tensors: Mapping[str, Any]
) -> list[str]:
    """Problems of one file and of the tensors that the manifest places in it."""
    path = folder / name
    if path.stat().st_size != expected["bytes"]:
        return [f"{name}: {path.stat().st_size} bytes, expected {expected['bytes']}"]
    try:
        found = digest_file(path)
    except InputError as error:
        return [str(error)]
    listed = {key: entry for key, entry in tensors.items() if entry["file"] == name}
    held = {
        key: {"file": name, "sha256": digest, "dtype": dtype, "shape": list(shape)}
        for key, (digest, dtype, shape) in found.tensors.items()
    }
    changed = [
        f"{name}: tensor {key!r} has changed: not what the manifest says"
        for key in sorted({*listed, *held})
        if listed.get(key) != held.get(key)
    ]
    if not changed and found.sha256 != expected["sha256"]:
        changed.append(
            f"{name}: has changed (sha256 {found.sha256[:12]}..., "
            f"expected {expected['sha256'][:12]}...)"
        )
    return changed
