"""How far a whole run is: one bar on a terminal, a line now and then in a log.

Time left is what is still to be done, each kind of it at what it was measured to cost in this very
run: a decoded token is no prefilled one, and int4 not Quest. What nothing was measured of yet is
left out, and the time left is then called the least that it can be.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.table import Column
from rich.text import Text

LOG_SECONDS = 10.0  # to the first line of a log; later ones come at a tenth of the time so far


class Cell(NamedTuple):
    """One kind of work (read, decode, answer, ...) of one cache or policy in one part of a run."""

    part: str
    who: str
    kind: str


class Work:
    """What is to be done in a run, and what it was measured to cost.

    Amounts of a cell are in any unit (tokens, accesses, points) in which its cost is even.
    clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._left: dict[Cell, float] = {}
        self._cost: dict[Cell, tuple[float, float]] = {}  # amount done, seconds spent
        self.started = self._mark = clock()
        self.now = ""

    def plan(self, part: str, who: str, amounts: dict[str, float]) -> None:
        """More is to be done: `amounts` by kind."""
        for kind, amount in amounts.items():
            cell = Cell(part, who, kind)
            self._left[cell] = self._left.get(cell, 0.0) + amount

    def spend(self, part: str, who: str, kind: str) -> None:
        """The time since the last word went into this."""
        cell, now = Cell(part, who, kind), self._clock()
        done, spent = self._cost.get(cell, (0.0, 0.0))
        self._cost[cell] = (done, spent + now - self._mark)
        self._mark, self.now = now, f"{part}, {who}"

    def done(self, part: str, who: str, amounts: dict[str, float]) -> None:
        """As much as this is through."""
        for kind, amount in amounts.items():
            cell = Cell(part, who, kind)
            done, spent = self._cost.get(cell, (0.0, 0.0))
            self._cost[cell] = (done + amount, spent)
            self._left[cell] = max(0.0, self._left.get(cell, 0.0) - amount)

    def spread(self, part: str, who: str, amounts: dict[str, float]) -> None:
        """The time since the last word went into all of these, and they are through; it is divided
        as they were estimated."""
        rates, now = self._rates(), self._clock()
        cells = [Cell(part, who, kind) for kind in amounts]
        guess = [amount * next((rates[key] for key in _keys(cell) if key in rates), 1.0)
                 for cell, amount in zip(cells, amounts.values())]  # fmt: skip
        for cell, share in zip(cells, guess):
            done, spent = self._cost.get(cell, (0.0, 0.0))
            self._cost[cell] = (done, spent + (now - self._mark) * share / (sum(guess) or 1.0))
        self._mark, self.now = now, f"{part}, {who}"
        self.done(part, who, amounts)

    def drop(self, who: str, part: str | None = None) -> None:
        """What is left of this one will not be done: it failed."""
        for cell in self._left:
            if cell.who == who and part in (None, cell.part):
                self._left[cell] = 0.0

    @property
    def elapsed(self) -> float:
        return self._clock() - self.started

    def left(self) -> tuple[float, bool]:
        """Seconds that what is left takes, and whether all of it was measured.

        A cell that was not goes by the others of its part and kind, then by what the same one cost
        in another part, then by all of its kind.
        """
        rates, seconds, known = self._rates(), 0.0, True
        for cell, amount in self._left.items():
            rate = next((rates[key] for key in _keys(cell) if key in rates), None)
            if rate is not None:
                seconds += amount * rate
            elif amount:
                known = False
        return max(0.0, seconds - (self._clock() - self._mark)), known

    def _rates(self) -> dict[tuple, float]:
        """Seconds for one unit of each cell, and of cells together, where any was done."""
        sums: dict[tuple, list[float]] = {}
        for cell, (done, spent) in self._cost.items():
            for key in _keys(cell):
                total = sums.setdefault(key, [0.0, 0.0])
                total[0] += done
                total[1] += spent
        return {key: spent / done for key, (done, spent) in sums.items() if done}

    def share(self) -> float:
        """Of the time that the run takes in all, as far as it is known, what has passed."""
        left, _ = self.left()
        return self.elapsed / max(1e-9, self.elapsed + left)

    def told(self) -> str:
        """`34 %, 1:05 so far, 2:05 left`."""
        left, known = self.left()
        if not known and not left:
            return f"{clock_time(self.elapsed)} so far, time left not known yet"
        so_far = f"{clock_time(self.elapsed)} so far"
        if not known:
            return f"{so_far}, at least {clock_time(left)} left"
        return f"{100 * self.share():.0f} %, {so_far}, {clock_time(left)} left"


def _keys(cell: Cell) -> tuple[tuple, ...]:
    """What a cell goes by, the nearest first."""
    return cell, ("part", cell.part, cell.kind), ("who", cell.who, cell.kind), ("kind", cell.kind)


class Open(NamedTuple):
    """The run that is shown at the moment, which parts of it join."""

    work: Work
    show: Callable[[], None]


_open: list[Open] = []


@contextmanager
def total(shown: bool, name: str) -> Iterator[Open]:
    """The one bar of a run, called `name`; within another it is that one.

    Whoever measures calls `show` now and then: a log gets its lines by that.
    """
    if _open:
        yield _open[-1]
        return
    work = Work()
    with _shown(work, name) if shown else _nothing() as show:
        _open.append(Open(work, show))
        try:
            yield _open[-1]
        finally:
            _open.pop()


@contextmanager
def _nothing() -> Iterator[Callable[[], None]]:
    yield lambda: None


@contextmanager
def _shown(work: Work, name: str) -> Iterator[Callable[[], None]]:
    if not sys.stderr.isatty():
        yield _log(work, name)
        return
    with Progress(*_columns(work), console=Console(stderr=True), refresh_per_second=4,
                  transient=True, expand=True) as bar:  # fmt: skip
        task = bar.add_task(name, total=1.0)
        yield lambda: bar.update(task, completed=work.share(), description=work.now or name)


def _columns(work: Work) -> tuple[ProgressColumn, ...]:
    """One line at any width: the bar gives way first, then the words."""
    words = TextColumn("{task.description}", table_column=Column(
        no_wrap=True, overflow="ellipsis", max_width=34))  # fmt: skip
    return SpinnerColumn(), words, BarColumn(None, table_column=Column(ratio=1)), _Told(work)


class _Told(ProgressColumn):
    """Time goes on between two words of who measures."""

    def __init__(self, work: Work):
        super().__init__(table_column=Column(no_wrap=True))
        self.work = work

    def render(self, task) -> Text:
        return Text(self.work.told())


def _log(work: Work, name: str) -> Callable[[], None]:
    due = LOG_SECONDS

    def show() -> None:
        nonlocal due
        if work.elapsed >= due:
            due = work.elapsed + max(LOG_SECONDS, work.elapsed / 10)
            print(f"{name}: {work.told()} ({work.now})", file=sys.stderr, flush=True)

    return show


def clock_time(seconds: float) -> str:
    """`2:05`, `1:02:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def paced(
    name: str, steps: Iterable, plan: Sequence[tuple[str, str, float]],
    kinds: Sequence[str] | None = None,
) -> Iterator:  # fmt: skip
    """The `steps`, one after the other, under one bar: the time until the next one is asked for is
    what a step took.

    plan: for each step its part, who it is of, and how much it is, such as a trace, a policy and
    the accesses. kinds: of each step, where not all cost alike, as a policy's first one with what
    is compiled for it; a kind that was not measured yet is not guessed from another.
    """
    kinds = kinds or ["step"] * len(plan)
    with total(True, name) as (work, show):
        for (part, who, amount), kind in zip(plan, kinds, strict=True):
            work.plan(part, who, {kind: amount})
        for step, (part, who, amount), kind in zip(steps, plan, kinds, strict=True):
            yield step
            work.spend(part, who, kind)
            work.done(part, who, {kind: amount})
            show()


def firsts(names: Iterable[str]) -> list[str]:
    """`first` where a name comes for the first time, else `step`."""
    seen: set[str] = set()
    return ["step" if name in seen or seen.add(name) else "first" for name in names]
