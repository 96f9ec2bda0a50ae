"""Pieces of work on threads: results, order, errors, and interrupts at any moment."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from zaya_convert.threads import Threads, one_thread_each

# Interrupts the main thread ever later, while it hands out work and takes results.
INTERRUPTED = """
import signal, sys, time
from zaya_convert.threads import Threads

class Stop(Exception):
    pass

def stop(number, frame):
    raise Stop

signal.signal(signal.SIGALRM, stop)
finished = 0
for attempt in range(2000):
    try:
        with Threads(2) as pool:
            signal.setitimer(signal.ITIMER_REAL, 1e-5 + attempt * 1e-6)
            for _ in pool.map(lambda n: time.sleep(2e-5), range(60)):
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
        finished += 1
    except Stop:
        pass
print(finished)
"""


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("items", [0, 1, 3, 2000])
def test_results_come_in_the_order_of_the_items(threads: int, items: int) -> None:
    def work(n: int) -> int:
        time.sleep(n % 7 * 1e-5)
        return n * n

    with Threads(threads) as pool:
        assert list(pool.map(work, range(items))) == [n * n for n in range(items)]
        assert sorted(pool.each(work, range(items))) == [(n, n * n) for n in range(items)]


def test_work_is_done_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=20)
    with Threads(3) as pool:
        assert sorted(pool.map(lambda _: together.wait(), range(3))) == [0, 1, 2]


def test_results_come_as_they_finish() -> None:
    first = threading.Event()
    with Threads(2) as pool:
        results = pool.each(lambda n: first.wait(20) if n == 0 else first.set(), range(2))
        assert [item for item, _ in results] == [1, 0]


def test_the_first_error_in_the_items_order_is_raised() -> None:
    def work(n: int) -> int:
        if n == 2:
            time.sleep(0.02)
        if n in (2, 3):
            raise ValueError(n)
        return n

    got = []
    with pytest.raises(ValueError, match="2"), Threads(4) as pool:  # noqa: PT012
        for result in pool.map(work, range(8)):
            got.append(result)
    assert got == [0, 1]


def test_after_an_error_nothing_new_is_begun() -> None:
    begun = []

    def work(n: int) -> None:
        begun.append(n)
        time.sleep(0.01)
        raise ValueError(n)

    with pytest.raises(ValueError, match="0"), Threads(1) as pool:
        next(pool.each(work, range(100)))
    assert len(begun) < 10


def test_an_interrupt_at_any_moment_ends_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2000


def test_torch_gets_its_threads_back() -> None:
    before = torch.get_num_threads()
    with one_thread_each():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
