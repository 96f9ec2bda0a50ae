"""Problems from JSON Lines, under the names that data sets use."""

import json
from pathlib import Path
from typing import Any

import pytest

from zaya_convert.errors import InputError
from zaya_convert.rsa.problems import Problem, digest_of, read


def write(path: Path, *rows: Any) -> Path:
    file = path / "problems.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return file


def test_names_of_fields(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"problem": "a", "answer": "1", "id": "x"},
        {"question": "b\u2028c", "answer": "so 2+2 is\n#### 1,004"},
        "",
        {"prompt": "d", "answer": 7},
        {"problem": "e", "solution": "thus \\boxed{\\frac{1}{2}}."},
        {"query": "f"},
    )
    assert read(file) == [
        Problem("x", "a", "1"),
        Problem("2", "b\u2028c", "1,004"),
        Problem("4", "d", "7"),
        Problem("5", "e", "\\frac{1}{2}"),
        Problem("6", "f", None),
    ]
    assert len(read(file, limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, ":1: needs a text"),
        ({"problem": " "}, "needs a text"),
        ({"problem": 3}, "needs a text"),
        ({"problem": "a", "answer": ["1"]}, "must be a text or a number"),
        ({"problem": "a", "answer": True}, "must be a text or a number"),
        ({"problem": "a", "answer": float("nan")}, "must be a text or a number"),
        ({"problem": "half \ud800"}, ":1: holds half a character"),
        ({"problem": "a", "id": "\ud800"}, "holds half a character"),
        ("{", ":1"),
        ("", "holds no problems"),
    ],
)
def test_refusals(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path, row))


def test_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"problem": "a"}\r\n\r\n{"problem": "b"}\r\n')
    assert [problem.text for problem in read(file)] == ["a", "b"]


def test_the_digest_is_of_texts_and_answers() -> None:
    one = digest_of([Problem("1", "a", "b")])
    assert one == digest_of([Problem("2", "a", "b")])
    assert one != digest_of([Problem("1", "a", None)])
    assert one != digest_of([Problem("1", "a", "b"), Problem("2", "a", "b")])
