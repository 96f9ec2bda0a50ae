"""A llama.cpp build as a second runtime for GGUF files: builds and runs ``llama_cpp_probe.cpp``.

The folder named by ``ZAYA_CONVERT_LLAMA_CPP`` is a llama.cpp source folder with its shared
libraries built inside. It must know the architecture; releases of llama.cpp do not. ``locate``
raises ``Unavailable`` with the reason when there is nothing to run, which tests turn into a skip.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

VARIABLE = "ZAYA_CONVERT_LLAMA_CPP"
SOURCE = Path(__file__).with_name("llama_cpp_probe.cpp")
HEADERS = ("llama.h", "ggml-backend.h")
LIBRARIES = ("llama", "ggml", "ggml-base")
SUFFIXES = (".so", ".dylib")


class Unavailable(Exception):
    """Why there is no llama.cpp to compare with."""


class ProbeError(Exception):
    """The probe, or llama.cpp in it, gave up."""


@dataclass(frozen=True)
class LlamaCpp:
    """Where the headers and the shared libraries of a build are, and what compiles against them."""

    compiler: str
    headers: tuple[Path, ...]
    libraries: tuple[Path, ...]

    def build(self, cache: Path) -> Probe:
        """The probe, compiled into ``cache`` unless it is there already."""
        command = self._command()
        state = (SOURCE.read_bytes(), *(str(part).encode() for part in command))
        program = cache / f"llama-cpp-probe-{hashlib.sha256(b'|'.join(state)).hexdigest()[:16]}"
        if not program.exists():
            cache.mkdir(parents=True, exist_ok=True)
            unfinished = program.with_suffix(f".{os.getpid()}")
            _run([*command, "-o", unfinished], what="compiling the probe")
            unfinished.rename(program)
        return Probe(program)

    def _command(self) -> list[str | Path]:
        return [
            *(self.compiler, "-std=c++17", "-O1", SOURCE),
            *(f"-I{folder}" for folder in self.headers),
            *(f"-L{folder}" for folder in self.libraries),
            *(f"-l{name}" for name in LIBRARIES),
            *(f"-Wl,-rpath,{folder}" for folder in self.libraries),
        ]


@dataclass(frozen=True)
class Probe:
    """The compiled probe."""

    program: Path

    def logits(
        self,
        model: Path,
        sequences: Sequence[Sequence[int]],
        scratch: Path,
        *,
        kv_f32: bool = True,
        threads: int = 2,
    ) -> list[NDArray[np.float32]]:
        """The logits ``[tokens, vocabulary]`` of each sequence, run alone and in one batch."""
        ids, out = scratch / "ids.txt", scratch / "logits.f32"
        ids.write_text("".join(f"{_words(sequence)}\n" for sequence in sequences))
        self._run("logits", model, ids, out, *_options(kv_f32, threads))
        ends = np.cumsum([len(sequence) for sequence in sequences])
        values = np.fromfile(out, dtype=np.float32).reshape(int(ends[-1]), -1)
        return np.split(values, ends[:-1].tolist())

    def tokens(self, model: Path, texts: Sequence[str], *, bos: bool = False) -> list[list[int]]:
        """The token ids of each text; special tokens in a text are recognised."""
        lines = "".join(f"{base64.b64encode(text.encode()).decode()}\n" for text in texts)
        out = self._run("tokens", model, *(["--bos"] if bos else []), stdin=lines)
        return [_ids(line) for line in out.decode().splitlines()]

    def generate(
        self,
        model: Path,
        prompt: Sequence[int],
        count: int,
        *,
        kv_f32: bool = True,
        threads: int = 2,
    ) -> tuple[list[int], str]:
        """``count`` greedy token ids after ``prompt``, and their text."""
        options = _options(kv_f32, threads)
        out = self._run("generate", model, str(count), *options, stdin=_words(prompt))
        ids, _, text = out.partition(b"\n")
        return _ids(ids.decode()), text.decode(errors="replace")

    def _run(self, *arguments: str | Path, stdin: str = "") -> bytes:
        return _run([self.program, *arguments], what="the llama.cpp probe", stdin=stdin)


def locate(environment: Mapping[str, str] = os.environ) -> LlamaCpp:
    """The build in the folder that ``ZAYA_CONVERT_LLAMA_CPP`` names, or ``Unavailable``."""
    name = environment.get(VARIABLE, "")
    if not name:
        raise Unavailable(f"{VARIABLE} names no folder with a built llama.cpp")
    folder = Path(name).resolve()
    if not folder.is_dir():
        raise Unavailable(f"{VARIABLE}: {folder} is not a folder")
    compiler = shutil.which(environment.get("CXX") or "c++")
    if compiler is None:
        raise Unavailable("no C++ compiler")
    return LlamaCpp(compiler, _headers(folder), _libraries(folder))


def _headers(folder: Path) -> tuple[Path, ...]:
    candidates = (folder / "include", folder / "ggml" / "include")
    for header in HEADERS:
        if not any((candidate / header).is_file() for candidate in candidates):
            raise Unavailable(f"{VARIABLE}: no {header} in include/ or ggml/include/ of {folder}")
    return tuple(candidate for candidate in candidates if candidate.is_dir())


def _libraries(folder: Path) -> tuple[Path, ...]:
    places = [
        *(folder / name for name in ("build/bin", "build/src", "build/ggml/src", "build", "lib")),
        *sorted((folder / "build" / "ggml" / "src").glob("ggml-*")),
    ]
    found: list[Path] = []
    for library in LIBRARIES:
        names = [f"lib{library}{suffix}" for suffix in SUFFIXES]
        holders = [place for place in places if any((place / name).exists() for name in names)]
        if not holders:
            raise Unavailable(f"{VARIABLE}: no shared library {names[0]} under {folder}/build")
        found.append(holders[0])
    return tuple(dict.fromkeys(found))


def _options(kv_f32: bool, threads: int) -> list[str]:
    return [*(["--kv-f32"] if kv_f32 else []), "--threads", str(threads)]


def _words(ids: Sequence[int]) -> str:
    return " ".join(str(int(token)) for token in ids)


def _ids(line: str) -> list[int]:
    return [int(word) for word in line.split()]


def _run(command: Sequence[str | Path], *, what: str, stdin: str = "") -> bytes:
    done = subprocess.run(
        [str(part) for part in command], input=stdin.encode(), capture_output=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ProbeError(f"{what} ended with {done.returncode}:\n" + "\n".join(lines[-20:]))
    return done.stdout
