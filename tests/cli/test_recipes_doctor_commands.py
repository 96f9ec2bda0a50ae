"""``recipes`` and ``doctor``."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.running import ROOT, Run, Zaya
from zaya_convert import doctor, recipe

pytest_plugins = ("cli.fixtures",)


def test_recipes(process: Callable[..., Run]) -> None:
    done = process("recipes")
    assert (done.code, done.err) == (0, "")
    assert [line.split()[0] for line in done.out.splitlines()] == list(recipe.shipped())


def test_recipes_as_json(zaya: Zaya) -> None:
    entries = zaya("recipes", "--json").json()["recipes"]
    assert "int4" in [entry["name"] for entry in entries]
    assert all(entry["description"] for entry in entries)


def test_one_recipe_is_a_file_to_start_from(zaya: Zaya, tmp_path: Path) -> None:
    shown = zaya("recipes", "int4")
    assert "# For most people" in shown.out
    (tmp_path / "mine.toml").write_text(shown.out)
    again = zaya("recipes", tmp_path / "mine.toml", "--json").json()
    assert again["rules"] == zaya("recipes", "int4", "--json").json()["rules"]


@pytest.mark.parametrize("name", ["int44", "/nonexistent.toml"])
def test_no_such_recipe(zaya: Zaya, name: str) -> None:
    done = zaya("recipes", name)
    assert (done.code, done.out) == (2, "")
    assert "shipped recipes: " in done.err


def test_doctor(process: Callable[..., Run]) -> None:
    facts = process("doctor", "--json").json()
    assert facts["packages"]["torch"]
    assert facts["cpu"]["cores"] >= 1
    assert facts["devices"][0]["name"] == "cpu"
    assert facts["native"]["detail"]
    assert all({"op", "kernel", "weights", "status"} == set(row) for row in facts["kernels"])
    assert any(row["status"] == "in use" for row in facts["kernels"])


def test_doctor_in_words(zaya: Zaya, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.EXTRAS, "imaginary", (("no-such-package",), "nothing"))
    monkeypatch.setenv("ZAYA_QUANT_NATIVE", "0")
    shown = zaya("doctor").out
    assert "pip install 'zaya-convert[imaginary]'" in shown
    assert "torch reference: ZAYA_QUANT_NATIVE=0" in shown


def test_doctor_survives_a_wrong_kernel_choice(zaya: Zaya, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZAYA_KERNELS", "warp-drive")
    done = zaya("doctor")
    assert done.code == 0
    assert "warp-drive" in done.out


@pytest.mark.parametrize("command", [("quantize", "--method", "gptq"), ("calibrate",)])
def test_a_kernel_that_cannot_run_is_one_line(
    command: tuple[str, ...],
    zaya: Zaya,
    nano_hybrid: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZAYA_KERNELS", "warp-drive")
    data = tmp_path / "ids.jsonl"
    data.write_text('{"ids": [1, 2, 3, 4, 5, 6, 7, 8]}\n')
    made = tmp_path / "made.safetensors"
    done = zaya(*command, nano_hybrid, "--data", data, "--tokens", 8, "-o", made)
    assert done.code == 2
    assert "error: ZAYA_KERNELS=warp-drive: there is no such kernel" in done.err
    assert "internal" not in done.err
    assert not made.exists()


def test_the_table_of_extras_is_that_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev"}
