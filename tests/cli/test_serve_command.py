"""``serve`` as a process: it says where it is, answers, and ends well."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cli.running import Zaya, environment, imported_by

pytest_plugins = ("cli.fixtures",)


@contextmanager
def serving(*arguments: object, **extra: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A running server, and the JSON that it printed."""
    command = [sys.executable, "-m", "zaya_convert", "serve", "--port", "0", "--json"]
    with subprocess.Popen(
        [*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(**extra),
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            printed = ""
            while not printed.endswith("}\n"):
                line = process.stdout.readline()
                assert line, process.communicate()[1]
                printed += line
            yield process, json.loads(printed)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(
    zaya: Zaya, bundled: Path, number: signal.Signals
) -> None:
    prompt = ("--prompt", "Compute 2 + 3.", "--max-new-tokens", "8", "--dtype", "float32")
    text = zaya("generate", bundled, *prompt, "--json").json()["text"]
    with serving(bundled, "--dtype", "float32", "-q") as (process, said):
        assert (said["model"], said["key"]) == (bundled.name, False)
        fields = {"messages": [{"role": "user", "content": "Compute 2 + 3."}], "max_tokens": 8}
        answer = httpx2.post(
            f"{said['url']}/v1/chat/completions", json=fields | {"temperature": 0}, timeout=60
        )
        assert answer.json()["choices"][0]["message"]["content"] == text
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_a_running_stream_is_ended_with_it(bundled: Path) -> None:
    with serving(bundled) as (process, said):
        fields = {"prompt": "2", "stream": True, "temperature": 3, "max_tokens": 40}
        with httpx2.stream(
            "POST", f"{said['url']}/v1/completions", json=fields, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert err.endswith("stopped\n")


def test_the_key_and_the_name(bundled: Path) -> None:
    options = ("--name", "mine", "--api-key-env", "MY_KEY")
    with serving(bundled, *options, MY_KEY="sesame") as (process, said):
        url = f"{said['url']}/v1/models"
        assert (said["model"], said["key"]) == ("mine", True)
        assert httpx2.get(url).status_code == 401
        listed = httpx2.get(url, headers={"Authorization": "Bearer sesame"}).json()
        assert listed["data"][0]["id"] == "mine"
        process.terminate()
        assert "sesame" not in process.communicate(timeout=60)[1]


def test_a_port_that_is_taken(zaya: Zaya, bundled: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = zaya("serve", bundled, "--port", other.getsockname()[1])
    assert (done.code, done.out) == (5, "")
    assert "choose another --port" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--api-key-env", "NOT_SET"], 2, "NOT_SET: this environment variable is not set"),
        (["--host", "no such host"], 2, "--host"),
        (["--max-batch", "0"], 2, "--max-batch"),
        (["--engine", "onnxruntime"], 2, "runs ONNX folders"),
    ],
)
def test_refusals(zaya: Zaya, bundled: Path, arguments: list[str], code: int, message: str) -> None:
    done = zaya("serve", bundled, "--port", "0", *arguments)
    assert (done.code, done.out) == (code, "")
    assert message in done.err


def test_without_tokenizer(zaya: Zaya, nano_hybrid: Path) -> None:
    done = zaya("serve", nano_hybrid, "--port", "0")
    assert (done.code, done.out) == (3, "")
    assert "tokenizer.json" in done.err


def test_without_the_extra(zaya: Zaya, bundled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("zaya_convert.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = zaya("serve", bundled, "--port", "0")
    assert (done.code, done.out) == (2, "")
    assert "pip install 'zaya-convert[serve]'" in done.err


def test_help_imports_nothing_heavy() -> None:
    assert not {"torch", "starlette", "uvicorn"} & imported_by("serve", "--help")
