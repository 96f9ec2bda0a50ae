"""What SIGINT and SIGTERM do to a command: it always ends, and in order where that is possible."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from zaya_convert.cli.output import complain

# A command stops between two pieces of work, which are seconds long at most.
PATIENCE_SECONDS = 60
# Both the shell and its ``timeout`` may send the same signal, one after the other.
_ECHO_SECONDS = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM; a ``KeyboardInterrupt`` so that whatever handles one handles the other."""


@contextmanager
def interruptible() -> Iterator[None]:
    """The first signal raises where the main thread is, ``KeyboardInterrupt`` or ``Terminated``.

    That may be within a library that was not written for it. So a second signal, or a minute
    without an end, ends the process as it is: outputs appear atomically anyway, and what the
    journal vouches for is resumed. So does a signal within an import, which libraries answer with
    errors of their own, with a crash or not at all, and one that was raised where nothing can be
    raised. A signal that is ignored (``nohup``, jobs of a script) stays so.
    """
    first: list[tuple[int, float]] = []

    def again(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            _end(first[0][0], f": did not stop within {PATIENCE_SECONDS} s")
        elif time.monotonic() - first[0][1] >= _ECHO_SECONDS:
            _end(number, ": a second time")

    def stop(number: int, frame: FrameType | None) -> None:
        if first:
            return again(number, frame)
        first.append((number, time.monotonic()))
        if _importing(frame):
            _end(number)
        signal.alarm(PATIENCE_SECONDS)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def lost(what: sys.UnraisableHookArgs) -> None:
        if first and isinstance(what.exc_value, KeyboardInterrupt):
            _end(first[0][0])
        hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, lost

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    for number in (signal.SIGINT, signal.SIGTERM):
        if before[number] != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        signal.alarm(0)
        sys.unraisablehook = hook
        for number, handler in before.items():
            if handler is not None:  # it was not Python's
                signal.signal(number, handler)


def _end(number: int, why: str = "") -> NoReturn:
    try:
        complain(f"{'terminated' if number == signal.SIGTERM else 'interrupted'}{why}")
    finally:  # the signal may have come within another print
        os._exit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
