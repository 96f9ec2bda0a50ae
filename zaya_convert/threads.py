"""Threads that share out pieces of work, and can be interrupted at any moment.

``concurrent.futures`` cannot: ``Condition.__enter__`` is Python code, so Ctrl-C in the main thread
may arrive after it took the lock of a future and before anyone is bound to give it back, and the
thread that finishes this future then waits for ever. Here the main thread touches nothing but
``SimpleQueue``, whose operations are whole as far as signals are concerned.
"""

from __future__ import annotations

import _thread
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import torch

# Pieces handed out ahead: enough to keep the threads busy while whoever takes the results waits for
# the disk. Only running pieces hold memory.
_AHEAD = 512

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """``threads`` threads; a context manager that is left when all of them have ended.

    A piece of work must not hand out more: it would wait for its own thread.
    """

    def __init__(self, threads: int) -> None:
        self._count = max(1, threads)
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._abandoned = False

    def __enter__(self) -> Threads:
        for _ in range(self._count):
            # ``threading.Thread.start`` waits for a ``Condition``, too.
            _thread.start_new_thread(self._run, ())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._abandoned = kind is not None
        for _ in range(self._count):
            self._tasks.put(None)
        for _ in range(self._count):
            self._ended.get()

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Items with the results of ``work``, as they finish.

        Raises:
            Exception: what ``work`` raised, as soon as it is met.
        """
        results: SimpleQueue[tuple[T, Callable[[], R]]] = SimpleQueue()

        def task(item: T) -> Callable[[], None]:
            return lambda: results.put((item, _outcome(work, item)))

        running, left = 0, iter(items)
        while True:
            for item in left:
                self._tasks.put(task(item))
                running += 1
                if running == _AHEAD:
                    break
            if not running:
                return
            item, result = results.get()
            running -= 1
            yield item, result()

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The results of ``work``, in the order of the items.

        Raises:
            Exception: what ``work`` raised, when its turn comes.
        """
        early: dict[int, Callable[[], R]] = {}
        turn = 0
        for (index, _), result in self.each(lambda pair: _outcome(work, pair[1]), enumerate(items)):
            early[index] = result
            while turn in early:
                yield early.pop(turn)()
                turn += 1

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            if not self._abandoned:
                task()
        self._ended.put(None)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch use one thread: parallelism is over pieces of work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _outcome(work: Callable[[T], R], item: T) -> Callable[[], R]:
    """Returns the result of the work when called, or raises what the work raised."""
    try:
        result = work(item)
    except BaseException as raised:
        error = raised

        def fail() -> R:
            raise error

        return fail
    return lambda: result
