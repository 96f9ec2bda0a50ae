"""The Hugging Face Hub: ``hf://`` names of models and data sets → local files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from zaya_convert.errors import InputError

MODEL_ID = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+?))?(/(?P<file>[\w.-]+\.gguf))?"
)
_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")  # of a GGUF that was split
_DATASET_ID = re.compile(
    r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./ -]+))?"
)
_WANTED: tuple[str, ...] = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer*",
    "LICENSE*",
    "NOTICE",
    "README.md",
)
_TEXTS = (".jsonl", ".txt")

T = TypeVar("T")


def fetch_model(name: str) -> Path:
    """The folder of ``hf://org/name[@revision]``, or the GGUF file of that with ``/file.gguf``.

    Fetched if it is not cached: one GGUF file with all its parts, or all but such files.

    Raises:
        InputError: not such a name, not there, or the Hub cannot be reached.
    """
    match = MODEL_ID.fullmatch(name)
    if not match:
        raise InputError("is not of the form hf://org/name[@revision][/file.gguf]", name)
    from huggingface_hub import snapshot_download

    repo, revision, file = match["repo"], match["revision"], match["file"]
    wanted: list[str] = list(_WANTED) if file is None else [_PART.sub(r"-*-of-\1.gguf", file)]
    folder = Path(
        _guarded(name, lambda: snapshot_download(repo, revision=revision, allow_patterns=wanted))
    )
    if file is None:
        return folder
    if not (folder / file).is_file():
        raise InputError("is not in that repository", name)
    return folder / file


def fetch_dataset(name: str) -> Path:
    """One text file of ``hf://datasets/org/name[@revision][/file]``, fetched if it is not cached.

    Without a file it is the first ``.jsonl`` or ``.txt`` file, one of a training split if there is
    any.

    Raises:
        InputError: as ``fetch_model``; or the data set holds no file of these kinds.
    """
    match = _DATASET_ID.fullmatch(name)
    if not match:
        raise InputError("is not of the form hf://datasets/org/name[@revision][/file]", name)
    from huggingface_hub import HfApi, hf_hub_download

    repo, revision, file = match["repo"], match["revision"], match["file"]
    if file is None:
        files = _guarded(
            name, lambda: HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        )
        texts = sorted(f for f in files if f.endswith(_TEXTS))
        if not texts:
            raise InputError(
                f"holds no {' or '.join(_TEXTS)} file; name one, or save the texts as JSONL", name
            )
        file = next((f for f in texts if "train" in f), texts[0])
    return Path(
        _guarded(name, lambda: hf_hub_download(repo, file, repo_type="dataset", revision=revision))
    )


def _guarded(name: str, action: Callable[[], T]) -> T:
    """Run a Hub call; its many errors become one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return action()
    except LocalEntryNotFoundError:
        raise InputError("is not in the local cache, and the Hub cannot be reached", name) from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"cannot be fetched: {str(error).splitlines()[0]}", name) from None
