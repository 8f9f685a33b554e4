"""Progress of long runs over tokens: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LOG_SECONDS = 10.0


@contextmanager
def shown(progress: bool | Callable[[int, int], None], total: int, name: str = "prefill"):
    """A function that is told the tokens done; see `prefill` for `progress`."""
    if callable(progress):
        yield lambda done: progress(done, total)
    elif not progress:
        yield lambda done: None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task(name, total=total, rate=0.0)
            yield _bar_update(bar, task)
    else:
        yield _log_line(total, name)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(
        "{task.completed:,.0f}/{task.total:,.0f} tokens, {task.fields[rate]:,.0f}/s"
    ), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _bar_update(bar: Progress, task) -> Callable[[int], None]:
    start = time.perf_counter()
    return lambda done: bar.update(
        task, completed=done, rate=done / max(1e-9, time.perf_counter() - start)
    )


def _log_line(total: int, name: str) -> Callable[[int], None]:
    """One line every ten seconds, and one at the end of a prefill that took that long."""
    start = last = time.perf_counter()

    def show(done: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= LOG_SECONDS or (done == total and now - start >= LOG_SECONDS):
            last, rate = now, done / (now - start)
            left = (total - done) / rate
            print(f"{name} {done:,}/{total:,} tokens, {rate:,.0f}/s, {left:.0f} s left",
                  file=sys.stderr, flush=True)

    return show
