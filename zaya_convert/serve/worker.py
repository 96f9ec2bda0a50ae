"""``Worker``: the one thread that runs the model, for everybody at once.

Sequences join the running batch between two steps and leave it when they are done, so nobody waits
for somebody else's last token. Prompts are run a chunk at a time, and the others step between.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from zaya_convert.runtime.engine import Engine
from zaya_convert.runtime.generate import Decoder, Step, Task

_PREFILL_CHUNK = 256  # columns of prompts run at once: bounds how long the others wait for a step


class Listener(Protocol):
    """Who wants the tokens of one sequence; called in the worker's thread."""

    def take(self, step: Step, logits: Tensor) -> bool:
        """One token and the logits [V] it was chosen from; False when no more are wanted."""
        ...

    def fail(self, error: Exception) -> None:
        """There will be no more tokens."""
        ...


class Full(Exception):
    """No room for more sequences at this time."""


class Stopped(Exception):
    """The worker has been stopped."""


@dataclass(eq=False)
class Job:
    """A sequence on its way.

    Attributes:
        cancelled: nobody listens any more; whoever set it wakes nobody, the next step will see.
    """

    task: Task
    listener: Listener
    cancelled: bool = False


class Worker:
    """Runs jobs on an engine, at most ``batch`` at a time, in their order of arrival.

    Args:
        waiting: how many more may wait.
    """

    def __init__(self, engine: Engine[Any], batch: int, waiting: int) -> None:
        self.batch, self.capacity = batch, batch + waiting
        self._engine = engine
        self._decoder = Decoder(engine, _PREFILL_CHUNK)
        self._running: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._joining: list[Job] = []
        self._prefill: Generator[None, None, list[int]] | None = None  # of those that join
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="worker", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Fail what is left and end, after the step that runs."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are worked on."""
        return self._thread.is_alive()

    @property
    def counts(self) -> tuple[int, int]:
        """How many sequences run, and how many wait."""
        return len(self._running) + len(self._joining), len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take all of some jobs, or none.

        Raises:
            Full: there is no room for all of them.
            Stopped: there never will be.
        """
        with self._changed:
            if self._stopping or not self.alive:
                raise Stopped
            for job in [job for job in self._waiting if job.cancelled]:
                self._waiting.remove(job)
            if sum(self.counts) + len(jobs) > self.capacity:
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def _loop(self) -> None:
        while self._admit():
            try:
                self._join()
                self._step()
            except Exception as error:
                # A decoder that failed half way is not to be trusted again.
                self._decoder = Decoder(self._engine, _PREFILL_CHUNK)
                self._fail([*self._running.values(), *self._joining], error)
                self._running.clear()
                self._joining, self._prefill = [], None
        self._fail([*self._running.values(), *self._joining, *self._waiting], Stopped())

    def _admit(self) -> bool:
        """Wait for something to do, and choose who joins; False when it is time to stop."""
        with self._changed:
            while not (self._running or self._joining or self._waiting or self._stopping):
                self._changed.wait()
            room = 0 if self._prefill else self.batch - len(self._running)
            while self._waiting and len(self._joining) < room:
                job = self._waiting.popleft()
                if not job.cancelled:
                    self._joining.append(job)
            return not self._stopping

    def _join(self) -> None:
        """Run one more chunk of the prompts of those who join."""
        self._leave([name for name, job in self._running.items() if job.cancelled])
        if self._prefill is None:
            self._prefill = self._decoder.adding([job.task for job in self._joining])
        elif all(job.cancelled for job in self._joining):
            self._joining, self._prefill = [], None
            return
        try:
            next(self._prefill)
        except StopIteration as end:
            self._running |= zip(end.value, self._joining, strict=True)
            self._joining, self._prefill = [], None

    def _step(self) -> None:
        steps = self._decoder.step()
        done: list[int] = []
        for step, logits in zip(steps, self._decoder.logits, strict=True):
            listener = self._running[step.sequence].listener
            try:
                wanted = listener.take(step, logits)
            except Exception as error:  # which is none of the others' business
                listener.fail(error)
                wanted = False
            if step.finished:
                del self._running[step.sequence]
            elif not wanted:
                done.append(step.sequence)
        self._leave(done)

    def _leave(self, names: Collection[int]) -> None:
        if names:
            self._decoder.remove(names)
        for name in names:
            del self._running[name]

    @staticmethod
    def _fail(jobs: Collection[Job], error: Exception) -> None:
        for job in jobs:
            job.listener.fail(error)
