"""A command that is told to stop does, even where the first signal is swallowed."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli.running import environment

DEAF = """
import signal, sys, time
from zaya_convert.cli import signals

signals.PATIENCE_SECONDS = int(sys.argv[1])
ignored = sys.argv[2] == "ignored"
signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
said = "ready"
with signals.interruptible():
    while True:
        try:
            print(said, flush=True)
            time.sleep(60)
        except KeyboardInterrupt as stop:
            said = type(stop).__name__
            if sys.argv[2] == "once":
                break
assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
"""


@contextmanager
def deaf(patience: int, how: str = "always") -> Iterator[subprocess.Popen[str]]:
    """A process that is ready to swallow signals."""
    command = [sys.executable, "-c", DEAF, str(patience), how]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("number", "name", "word", "code"),
    [
        (signal.SIGINT, "KeyboardInterrupt", "interrupted", 130),
        (signal.SIGTERM, "Terminated", "terminated", 143),
    ],
)
def test_the_second_signal_ends_it(number: int, name: str, word: str, code: int) -> None:
    with deaf(60) as process:
        assert process.stdout is not None
        process.send_signal(number)
        assert process.stdout.readline() == f"{name}\n"
        process.send_signal(number)  # an echo of the first
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code
        assert f"{word}: a second time" in err


def test_so_does_time() -> None:
    with deaf(1) as process:
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 143
        assert "terminated: did not stop within 1 s" in err


def test_an_ignored_signal_stays_ignored() -> None:
    with deaf(60, "ignored") as process:
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.terminate()
        assert process.stdout is not None
        assert process.stdout.readline() == "Terminated\n"


def test_everything_is_as_before_afterwards() -> None:
    with deaf(1, "once") as process:
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")


IMPORTING = """
import os, signal, sys
from zaya_convert.cli import signals

if sys.argv[1] == "import":
    sys.path.insert(0, sys.argv[2])
    with signals.interruptible():
        try:
            import interrupted
        except KeyboardInterrupt:
            print("raised in the import")
else:
    class Last:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    with signals.interruptible():
        Last()
print("went on")
"""


@pytest.mark.parametrize("where", ["import", "del"])
def test_where_nothing_can_be_raised_the_first_signal_ends_it(where: str, tmp_path: Path) -> None:
    module = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
    (tmp_path / "interrupted.py").write_text(module)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, where, tmp_path],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "error: terminated\n")
