"""Models in several GGUF files, read as one."""

import re
from pathlib import Path

from zaya_convert.errors import InputError
from zaya_convert.files import contained
from zaya_convert.gguf_format import ALIGNMENT_KEY, COUNT_KEY, NUMBER_KEY, TOTAL_KEY
from zaya_convert.gguf_header import GgufHeader, read_gguf
from zaya_convert.headers import RawTensor

_MAX_PARTS = 1024
_INTEGERS = ("u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64")
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
# What parts of one model need not share.
_OF_ONE_PART = (NUMBER_KEY, COUNT_KEY, ALIGNMENT_KEY)


def read_gguf_set(path: Path) -> tuple[GgufHeader, tuple[Path, ...]]:
    """Read a model in one file or, given any of its parts, in several.

    Returns:
        The tensors of all parts with the metadata of the first, which has all of it; and the
        files in order.

    Raises:
        InputError: a file ``read_gguf`` refuses, missing parts, parts that do not belong together.
    """
    header = read_gguf(path)
    named = _PART_NAME.fullmatch(path.name)
    count = header.short(COUNT_KEY, 0)
    # 1 is a split into one; 0 is what merging the parts into one file leaves behind
    if header.kinds.get(COUNT_KEY, "u16") in _INTEGERS and count in (0, 1):
        if named and int(named["count"]) > 1:
            raise InputError(
                f"is named as one part of several, but {COUNT_KEY} does not say so", path.name
            )
        return header, (path,)
    if not named:
        raise InputError(
            f"{COUNT_KEY} is {count!r}, but the name is not like NAME-00001-of-00002.gguf, "
            "so the other parts cannot be found",
            path.name,
        )
    number, count = int(named["number"]), int(named["count"])
    if problem := _part_problem(header, number, count):
        raise InputError(problem, path.name)
    return _read_parts(header, path, named["stem"], count)


def _read_parts(
    header: GgufHeader, path: Path, stem: str, count: int
) -> tuple[GgufHeader, tuple[Path, ...]]:
    """All parts; the metadata of all but the first is let go as soon as it is compared."""
    first: GgufHeader | None = None
    tensors: dict[str, RawTensor] = {}
    paths: list[Path] = []
    problems: list[str] = []
    for number in range(1, count + 1):
        name = f"{stem}-{number:05}-of-{count:05}.gguf"
        try:
            paths.append(contained(path.parent, name))
            part = header if name == path.name else read_gguf(paths[-1])
        except InputError as error:
            problems.append(str(error))
            continue
        first = part if number == 1 else first
        found = (_part_problem(part, number, count), *_disagreements(first, part))
        problems += [f"{name}: {problem}" for problem in found if problem]
        problems += _add_tensors(tensors, part)
    total = header.metadata[TOTAL_KEY]
    if not problems and len(tensors) != total:
        problems.append(f"{len(tensors)} tensors in all parts, {TOTAL_KEY} is {total}")
    if problems or first is None:
        raise InputError(problems, stem)
    whole = GgufHeader(first.version, first.metadata, first.kinds, tensors, first.alignment)
    return whole, tuple(paths)


def _add_tensors(tensors: dict[str, RawTensor], part: GgufHeader) -> list[str]:
    others = [tensors.setdefault(name, tensor) for name, tensor in part.tensors.items()]
    return [
        f"tensor {own.name!r} is in {other.file.name} and in {own.file.name}"
        for own, other in zip(part.tensors.values(), others, strict=True)
        if own is not other
    ]


def _part_problem(header: GgufHeader, number: int, count: int) -> str:
    """What is wrong with the numbers of the part that is named ``number`` of ``count``."""
    for key in (NUMBER_KEY, COUNT_KEY, TOTAL_KEY):
        if header.kinds.get(key) not in _INTEGERS:
            return f"{key} is {'not a whole number' if key in header.kinds else 'missing'}"
    said = (header.metadata[NUMBER_KEY], header.metadata[COUNT_KEY])
    if said != (number - 1, count):
        return (
            f"{NUMBER_KEY} and {COUNT_KEY} are {said[0]} and {said[1]}, "
            f"by its name they should be {number - 1} and {count}"
        )
    return f"{count} parts; at most {_MAX_PARTS} are read" if count > _MAX_PARTS else ""


def _disagreements(first: GgufHeader | None, part: GgufHeader) -> list[str]:
    """Where a part contradicts the first one: it is of another model, or another split of it."""
    if first is None:
        return []
    return [
        f"{key} differs from that of the first part"
        for key, kind in part.kinds.items()
        if key in first.kinds and key not in _OF_ONE_PART
        and (first.kinds[key] != kind or first.metadata[key] != part.metadata[key])
    ]  # fmt: skip
