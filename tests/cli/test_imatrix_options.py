"""``calibrate --imatrix``, and ``quantize --stats`` with a file that llama.cpp could read too."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from cli.running import Zaya
from zaya_convert import imatrix
from zaya_convert.cli.main import run
from zaya_convert.models import open_model

pytest_plugins = ("cli.fixtures",)

FEW = ("--tokens", 256, "--max-tokens", 256, "--sequence-length", 64, "--threads", 1)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def both(nano_hybrid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one calibration as ``stats`` and ``imatrix.gguf``, not to be changed."""
    folder = tmp_path_factory.mktemp("both")
    files = ("-o", folder / "stats", "--imatrix", folder / "imatrix.gguf")
    assert run([str(a) for a in ("calibrate", nano_hybrid, *FEW, *files, "-q")]) == 0
    return folder


# ---- writing ------------------------------------------------------------------------------------


def test_calibrate_writes_both(zaya: Zaya, both: Path, nano_hybrid: Path, tmp_path: Path) -> None:
    other = tmp_path / "new" / "imatrix.gguf"
    done = zaya("calibrate", nano_hybrid, *FEW, "-o", tmp_path, "--imatrix", other, "--json")
    assert done.code == 0
    assert done.json()["imatrix"] == str(other)
    assert f"imatrix: {other}" in done.err
    assert other.read_bytes() == (both / "imatrix.gguf").read_bytes()
    model = open_model(str(nano_hybrid))
    found = imatrix.read(other, model)
    found.check_fits(model)
    assert found.counts.tolist() == done.json()["counts"]
    assert names(other.parent) == {"imatrix.gguf"}


def test_without_the_option_there_is_none(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    done = zaya("calibrate", nano_hybrid, *FEW, "-o", tmp_path / "s", "--json")
    assert done.json()["imatrix"] is None
    assert names(tmp_path) == {"s"}


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        (("-o", "s", "--imatrix", "there"), 6, "there exists; choose another --imatrix"),
        (("-o", "s", "--imatrix", "s"), 2, "name the same file"),
        (("-o", "s.gguf"), 2, "--imatrix FILE.gguf writes an imatrix as well"),
        (("-o", "s", "--imatrix", "."), 2, "--imatrix"),
    ],
    ids=str,
)
def test_names_that_will_not_do(
    zaya: Zaya, nano_hybrid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    files: tuple[str, ...], code: int, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    done = zaya("calibrate", nano_hybrid, *FEW, *files)
    assert (done.code, done.out) == (code, "")
    assert says in done.err
    assert names(tmp_path) == {"there"}
    assert Path("there").read_text() == "mine"


def test_overwrite_replaces_both(zaya: Zaya, nano_hybrid: Path, both: Path, tmp_path: Path) -> None:
    files = (tmp_path / "s", tmp_path / "i")
    for file in files:
        file.write_text("old")
    arguments = ("-o", files[0], "--imatrix", files[1], "--overwrite")
    assert zaya("calibrate", nano_hybrid, *FEW, *arguments).code == 0
    assert files[0].read_bytes() == (both / "stats").read_bytes()
    assert files[1].read_bytes() == (both / "imatrix.gguf").read_bytes()


# ---- reading ------------------------------------------------------------------------------------


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "zaya-convert.json").read_text())


@pytest.mark.parametrize("options", [(), ("--equalize",)], ids=str)
def test_it_serves_as_statistics(
    zaya: Zaya, nano_hybrid: Path, both: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Sums in fp32 turn some last bits of the moments, which hardly turns a code."""
    outputs = (tmp_path / "mine", tmp_path / "theirs")
    for stats, output in zip(("stats", "imatrix.gguf"), outputs, strict=True):
        done = zaya(
            "quantize", nano_hybrid, "--method", "imatrix", *options, "--stats", both / stats,
            "--threads", 1, "-o", output,
        )  # fmt: skip
        assert done.code == 0
    mine, theirs = (manifest(output)["calibration"] for output in outputs)
    assert mine["digest"] != theirs["digest"]
    same = ("data", "tokens", "min_tokens", "skip_rate", "counts", "below_minimum", "fallback")
    assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}
    files = [output / "model.safetensors" for output in outputs]
    one, other = (file.read_bytes()[-file.stat().st_size // 2 :] for file in files)
    differing = sum(a != b for a, b in zip(one, other, strict=True))
    assert differing <= len(one) // 1000


SENSITIVE = "choosing bits for a size takes sensitivities; calibrate with"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--method", "gptq"), "gptq runs the model on tokens; use --method imatrix"),
        (("--method", "gptaq", "--dry-run"), "gptaq runs the model on tokens"),
        (("--method", "imatrix", "--target-bpw", 6), SENSITIVE),
        (("--method", "imatrix", "--target-size", "1MB"), SENSITIVE),
        (("--method", "imatrix", "--recipe", "edge-6gb"), SENSITIVE),
    ],
    ids=str,
)
def test_what_it_is_not_enough_for(
    zaya: Zaya, nano_hybrid: Path, both: Path, tmp_path: Path, options: tuple[Any, ...], says: str
) -> None:
    arguments = ("--group-size", 32, *options, "--stats", both / "imatrix.gguf")
    done = zaya("quantize", nano_hybrid, *arguments, "-o", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    assert f"imatrix.gguf is an imatrix, which holds second moments only, and {says}" in done.err
    assert "warning" not in done.err
    assert not any(tmp_path.iterdir())


def test_experts_below_the_minimum_are_told(
    zaya: Zaya, nano_hybrid: Path, both: Path, tmp_path: Path
) -> None:
    done = zaya(
        "quantize", nano_hybrid, "--method", "imatrix", "--on-uncovered", "error",
        "--stats", both / "imatrix.gguf", "-o", tmp_path / "out",
    )  # fmt: skip
    assert done.code == 3
    assert "experts with fewer than 256 calibration tokens" in done.err


def test_files_that_will_not_do(
    zaya: Zaya, nano_hybrid: Path, bundled: Path, both: Path, tmp_path: Path
) -> None:
    name = b"blk.0.attn_k.weight"
    old = tmp_path / "imatrix.dat"
    old.write_bytes(struct.pack("<II", 1, len(name)) + name + bytes(64))
    arguments = ("--method", "imatrix", "-o", tmp_path / "out", "--stats")
    for model, path, code, says in (
        (nano_hybrid, old, 3, "imatrix.dat: is an imatrix in llama.cpp's old format; convert it"),
        (nano_hybrid, tmp_path / "no.gguf", 2, "`zaya-convert calibrate --imatrix` makes one"),
        (bundled, both / "imatrix.gguf", 3, "imatrix.gguf: "),
    ):
        done = zaya("quantize", model, *arguments, path)
        assert (done.code, done.out) == (code, "")
        assert says in done.err
    assert names(tmp_path) == {"imatrix.dat"}
