"""Progress bars on stderr, for a person at a terminal and nobody else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zaya_convert.cli.output import Output


@contextmanager
def bytes_bar(out: Output, label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over bytes; yields the function to call with the bytes just finished."""
    if not out.live:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def stages_bar(out: Output) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage; yields the function to call with (stage, done, of)."""
    if not out.live:
        yield lambda stage, done, of: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def update(stage: str, done: int, of: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=of)
            bar.update(tasks[stage], completed=done, total=of)

        yield update
