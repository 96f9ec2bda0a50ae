"""The files of a model folder, read without trusting them.

Side files (config, tokenizer) have a size cap. Shards are found by index or by name, must stay
inside the folder, and their headers must agree with the index and with each other.
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zaya_convert.errors import InputError
from zaya_convert.headers import RawTensor, parse_json_object, read_header

_MAX_SIDE_FILE = 64 << 20


def read_small(path: Path) -> bytes:
    """Read a side file (config, tokenizer) with a size cap, or raise InputError."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # before opening: a pipe would block for ever
            raise InputError("not a regular file", path.name)
        if status.st_size > _MAX_SIDE_FILE:
            raise InputError(f"is larger than {_MAX_SIDE_FILE >> 20} MiB", path.name)
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", str(path)) from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a side file, strictly."""
    return parse_json_object(read_small(path), path.name)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Pretty JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def load_tensors(folder: Path) -> dict[str, RawTensor]:
    """Headers of every weight file of a folder, by tensor name.

    With an index, exactly the files it names are read and it must agree with them; without one,
    every ``*.safetensors`` file of the folder is.

    Raises:
        InputError: missing or damaged files, names that leave the folder, tensors stored twice,
            an index that disagrees with its shards.
    """
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    if index.is_file():
        weight_map = _weight_map(index)
        names = sorted(set(weight_map.values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InputError(_no_weights(folder), str(folder))
    tensors: dict[str, RawTensor] = {}
    problems: list[str] = []
    for name in names:
        try:
            found, _ = read_header(contained(folder, name))
        except InputError as error:
            problems.append(str(error))
            continue
        for tensor in found.values():
            other = tensors.setdefault(tensor.name, tensor)
            if other is not tensor:
                problems.append(
                    f"{tensor.name!r} is stored twice: in {other.file.name} and in {name}"
                )
    if not problems:
        problems = _index_disagreements(weight_map, tensors)
    if problems:
        raise InputError(problems, folder.name)
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError("weight_map must map tensor names to file names", index.name)
    if not weight_map:
        raise InputError("weight_map is empty", index.name)
    return weight_map


def contained(folder: Path, name: str) -> Path:
    """A shard's path, refusing names that leave the folder by ``..``, a slash or a symlink.

    The Hub cache stores snapshots, and folders in them, as symlinks into a ``blobs`` folder beside
    ``snapshots``; those may be followed, nothing else may.
    """
    unsafe = not name.isprintable() or "\\" in name  # surrogates and NUL are not printable
    if name in ("", ".", "..") or Path(name).name != name or unsafe:
        raise InputError(f"shard name {name!r} leaves the folder: refused", "index")
    path, root = folder / name, Path(os.path.realpath(folder))
    roots = [root]
    inside = (root, *root.parents)
    roots += [at.parent.parent / "blobs" for at in inside if at.parent.name == "snapshots"]
    # realpath and not Path.resolve, which raises on a link that points at itself
    if not any(Path(os.path.realpath(path)).is_relative_to(allowed) for allowed in roots):
        raise InputError(f"{name!r} is a link that leaves the folder: refused", folder.name)
    return path


def _index_disagreements(
    weight_map: Mapping[str, str], tensors: Mapping[str, RawTensor]
) -> list[str]:
    if not weight_map:
        return []
    problems = [
        f"the index promises {name!r} in {file}, which does not hold it"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    return problems + [
        f"{name!r} in {tensor.file.name} is not in the index"
        for name, tensor in tensors.items()
        if name not in weight_map
    ]


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return "only pickle weights here, which can run code; convert them to safetensors first"
    return "no *.safetensors files here"
