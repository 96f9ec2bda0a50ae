"""The group itself: what --help costs, how failures look, streams, environment, completion."""

import importlib
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import zaya_convert.inspect
from cli.running import Run, Zaya, environment, imported_by
from zaya_convert import __version__
from zaya_convert.cli.main import COMMANDS, cli
from zaya_convert.errors import EXIT_CODES

pytest_plugins = ("cli.fixtures",)

Process = Callable[..., Run]

# What --help may import: click, itself, and the standard library.
_HEAVY = ("torch", "numpy", "transformers", "rich", "tokenizers", "jinja2", "huggingface_hub",
          "safetensors")  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS), ["recipes"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = imported_by(*arguments)
    assert "click" in modules
    assert not modules & set(_HEAVY)


def test_help_of_the_group_imports_no_command() -> None:
    script = (
        "import sys; from zaya_convert.cli.main import run; run(['--help']);"
        "ours = [m for m in sys.modules if m.startswith(('zaya_convert.', 'zaya_quant'))];"
        "print('MODULES', *sorted(ours))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment()
    )
    assert done.stdout.rpartition("MODULES ")[2].split() == [
        "zaya_convert.cli",
        "zaya_convert.cli.main",
        "zaya_convert.cli.output",
        "zaya_convert.cli.signals",
        "zaya_convert.errors",
    ]


def test_help_lists_commands_and_exit_codes(zaya: Zaya) -> None:
    shown = zaya("--help").out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name}" in shown
        assert text in shown
    for code, meaning in EXIT_CODES.items():
        assert f"{code}  {meaning}" in shown
    assert "_ZAYA_CONVERT_COMPLETE" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_quiet_and_help(name: str) -> None:
    command = importlib.import_module(COMMANDS[name][0]).command
    options = {flag for parameter in command.params for flag in parameter.opts}
    assert command.name == name
    assert {"--json", "--quiet", "-q"} <= options
    assert command.help


def test_version(zaya: Zaya) -> None:
    assert zaya("--version").out == f"zaya-convert {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quantise"], "did you mean 'quantize'"),
        (["quantize", "--bist", "4"], "--bist"),
        (["quantize", "--bits", "9"], "9 is not in the range"),
        (["quantize", "--shard-size", "big"], "not a size like"),
        (["quantize", "--packing", "zip"], "compressed-tensors"),
        (["export"], "MODEL"),
        ([], "Usage:"),
    ],
)
def test_usage_errors_exit_2_on_stderr(zaya: Zaya, arguments: list[str], says: str) -> None:
    done = zaya(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert says in done.err


def fail(error: BaseException) -> Callable[[object], dict[str, object]]:
    """Something that raises ``error`` when called."""

    def raising(_: object) -> dict[str, object]:
        raise error

    return raising


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device", "there"), 5),
        (PermissionError(13, "Permission denied", "there"), 5),
        (RuntimeError("odd\nthings"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_failure_is_one_line(
    zaya: Zaya,
    monkeypatch: pytest.MonkeyPatch,
    nano_hybrid: Path,
    error: BaseException,
    code: int,
) -> None:
    monkeypatch.setattr(zaya_convert.inspect, "describe", fail(error))
    done = zaya("inspect", nano_hybrid, "--json")
    assert done.code == code
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1
    assert ("ZAYA_CONVERT_DEBUG" in done.err) == (code == 1)


def test_debug_shows_the_traceback(
    zaya: Zaya, monkeypatch: pytest.MonkeyPatch, nano_hybrid: Path
) -> None:
    monkeypatch.setattr(zaya_convert.inspect, "describe", fail(RuntimeError("odd")))
    monkeypatch.setenv("ZAYA_CONVERT_DEBUG", "1")
    assert "Traceback" in zaya("inspect", nano_hybrid).err


def test_a_reader_that_leaves_is_no_failure(nano_hybrid: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "zaya_convert", "inspect", nano_hybrid],
        stdout=write,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_an_io_error(nano_hybrid: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "zaya_convert", "inspect", nano_hybrid],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
        )
    assert done.returncode == 5


@pytest.mark.parametrize("mode", ["pipe", "full"])
def test_work_goes_on_when_nobody_reads_stderr(
    mode: str, nano_hybrid: Path, tmp_path: Path
) -> None:
    if mode == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-m", "zaya_convert", "quantize", nano_hybrid, "-o", tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=write,
        env=environment(),
    )
    os.close(write)
    assert done.returncode == 0
    assert done.stdout.decode().strip() == f"{tmp_path / 'out'}"
    assert (tmp_path / "out" / "zaya-convert.json").is_file()


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("<&-", 0), ("2>&-", 3)])
def test_closed_streams(closed: str, code: int, nano_hybrid: Path) -> None:
    model = nano_hybrid if code == 0 else "nowhere"
    command = f'"{sys.executable}" -m zaya_convert inspect "{model}" {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment())
    assert done.returncode == code
    assert done.stderr == b""


def stderr_of_a_terminal(**extra: str) -> bytes:
    """What a failing command shows when stderr is a terminal."""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "zaya_convert", "inspect", "/nonexistent"],
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        env=environment(**extra),
    )
    os.close(theirs)
    shown = os.read(ours, 10_000)
    os.close(ours)
    assert done.returncode == 3
    return shown


def test_colours_on_a_terminal_unless_no_color() -> None:
    assert b"\x1b[" in stderr_of_a_terminal()
    assert b"\x1b" not in stderr_of_a_terminal(NO_COLOR="1")


def test_control_characters_are_escaped(zaya: Zaya) -> None:
    done = zaya("inspect", "/no\x1b[31mwhere\x07")
    assert done.code == 3
    assert "\x1b" not in done.err
    assert "\\x1b[31m" in done.err


def test_completion(process: Process) -> None:
    script = process(env={"_ZAYA_CONVERT_COMPLETE": "bash_source"})
    assert script.code == 0
    assert "complete " in script.out
    words = {"COMP_WORDS": "zaya-convert qu", "COMP_CWORD": "1"}
    found = process(env={"_ZAYA_CONVERT_COMPLETE": "bash_complete", **words})
    assert found.out.split() == ["plain,quantize"]


def test_flag_over_environment_over_recipe(
    zaya: Zaya, monkeypatch: pytest.MonkeyPatch, nano_hybrid: Path
) -> None:
    def bits(*arguments: str) -> int:
        plan = zaya("quantize", nano_hybrid, "--dry-run", "--json", *arguments).json()
        return plan["recipe"]["rules"][0]["bits"]

    assert bits() == 4
    monkeypatch.setenv("ZAYA_CONVERT_QUANTIZE_RECIPE", "int8")
    assert bits() == 8
    monkeypatch.setenv("ZAYA_CONVERT_QUANTIZE_BITS", "6")
    assert bits() == 6
    assert bits("--bits", "5") == 5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_set_by_its_long_flag_in_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = cli.make_context("zaya-convert", [name], resilient_parsing=True)
    command = cli.get_command(context, name)
    assert command is not None
    child = click.Context(command, parent=context, info_name=name)
    options = [option for option in command.params if isinstance(option, click.Option)]
    for option in options:
        (flag,) = (text for text in option.opts if text.startswith("--"))
        variable = "ZAYA_CONVERT_" + f"{name}_{flag[2:]}".replace("-", "_").upper()
        assert option.value_from_envvar(child) is None
        monkeypatch.setenv(variable, "1")
        assert option.value_from_envvar(child) == "1", variable
        monkeypatch.delenv(variable)


def test_json_by_environment(
    zaya: Zaya, monkeypatch: pytest.MonkeyPatch, nano_hybrid: Path
) -> None:
    monkeypatch.setenv("ZAYA_CONVERT_INSPECT_JSON", "1")
    assert zaya("inspect", nano_hybrid).json()["layout"] == "hybrid"


def test_quiet_before_or_after_the_command(zaya: Zaya, nano_hybrid: Path, tmp_path: Path) -> None:
    plan = ("quantize", nano_hybrid, "--bits", "4", "-o")
    assert zaya("-q", *plan, tmp_path / "a").err == ""
    assert zaya(*plan, tmp_path / "b", "-q").err == ""
    assert zaya(*plan, tmp_path / "c").err != ""
