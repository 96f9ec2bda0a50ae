"""Problems to solve: a JSON Lines file with a question, and an answer where there is one.

Names of fields are those of common data sets: ``problem``, ``question``, ``prompt`` or ``query``
for the text; ``answer``, ``final_answer``, ``target`` or ``solution`` for the answer, of which the
part behind ``####`` (as GSM8K writes) or the content of the last ``\\boxed{}`` counts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zaya_convert.errors import InputError
from zaya_convert.files import read_small
from zaya_convert.headers import parse_json_object
from zaya_convert.rsa.answers import extract_boxed

_TEXT = ("problem", "question", "prompt", "query")
_ANSWER = ("answer", "final_answer", "target", "solution")
_GSM_MARK = "####"


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, and its answer if that is known."""

    id: str
    text: str
    answer: str | None = None


def read(path: Path, limit: int | None = None) -> list[Problem]:
    """The problems of a file, the first ``limit`` of them.

    Raises:
        InputError: it cannot be read, a line is no problem, or it holds none.
    """
    try:
        text = read_small(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 (byte {error.start})", path.name) from None
    found: list[Problem] = []
    # Not splitlines: U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if limit is not None and len(found) >= limit:
            break
        if line.strip():
            where = f"{path.name}:{number}"
            found.append(_problem(parse_json_object(line.encode(), where), number, where))
    if not found:
        raise InputError("holds no problems", path.name)
    return found


def digest_of(problems: Sequence[Problem]) -> str:
    """sha256 over texts and answers, so that a result names its evidence."""
    rows = [[problem.text, problem.answer] for problem in problems]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _problem(entry: Mapping[str, Any], number: int, where: str) -> Problem:
    text = next((entry[name] for name in _TEXT if name in entry), None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"needs a text as one of {', '.join(_TEXT)}", where)
    answer = next((entry[name] for name in _ANSWER if entry.get(name) is not None), None)
    if answer is not None:
        number_or_text = isinstance(answer, str | int | float) and not isinstance(answer, bool)
        if not number_or_text or (isinstance(answer, float) and not math.isfinite(answer)):
            raise InputError("the answer must be a text or a number", where)
        answer = _short(str(answer))
    name = str(entry.get("id", number))
    try:
        f"{text}{answer}{name}".encode()
    except UnicodeEncodeError:
        raise InputError("holds half a character (a lone surrogate)", where) from None
    return Problem(name, text, answer)


def _short(answer: str) -> str:
    """The answer itself out of a worked solution."""
    if _GSM_MARK in answer:
        return answer.rpartition(_GSM_MARK)[2].strip()
    boxed = extract_boxed(answer)
    return answer.strip() if boxed is None else boxed
