"""Tasks in rounds: what is there is skipped, what failed or was lost is given again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from kvlab.launch.base import Launching
from kvlab.launch.task import LOST, TASKS, Outcome, Task, done, look, note, same_run
from kvlab.launch.worker import INTERRUPTED, Entry

_LOST = "its worker ended before it did (killed, out of memory, or its node was lost)"
_NEVER = "no worker began it"
_REFUSED = (2, INTERRUPTED)  # bad input is the user's to mend, an interrupt was meant


def launch(
    over: Launching,
    tasks: Sequence[Task],
    entry: Entry,
    *,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Do the tasks and return how each stands. A round ends when all its tasks have.

    A task is given again up to `over.retries` times where it failed or its worker died, each time
    with `resume=true`. Raises `BadInput` where a folder holds another run.
    """
    same_run(tasks)
    left = [task for task in tasks if not done(task)]
    if len(left) < len(tasks):
        say(f"{len(tasks) - len(left)} of {len(tasks)} runs are there already")
    stand: dict[Task, Outcome] = {}
    tries = dict.fromkeys(left, 0)
    while left:
        for task in left:
            (task.sweep / TASKS).mkdir(parents=True, exist_ok=True)
        before = {task: _attempts(task) for task in left}
        stand |= _round(over, left, entry, say, len(tasks) - len(left), len(tasks))
        began = [task for task in left if _attempts(task) > before[task]]
        for task in began:
            tries[task] += 1
        again = [task for task in left if stand[task].status not in (0, *_REFUSED)]
        if not began:  # a worker that cannot even start: the next round would be the same
            break
        left = [task for task in again if tries[task] <= over.retries]
        if left:
            say(f"{len(left)} of {len(tasks)} runs are given again")
    return [_final(task, stand.get(task)) for task in tasks]


def _final(task: Task, outcome: Outcome | None) -> Outcome:
    """How the task stands, on disk too where no worker could say so."""
    held = look(task.mark)
    if outcome is None or outcome == held:
        return held or outcome
    if outcome.status is None:
        outcome = Outcome(1, _NEVER, attempts=outcome.attempts)
    return note(task, outcome)


def _round(
    over: Launching, tasks: list[Task], entry: Entry, say: Callable, there: int, of: int
) -> dict[Task, Outcome]:
    """Every task once. A line for each that ends; what its worker left on disk where that died."""
    stand: dict[Task, Outcome] = {}
    began = time.monotonic()
    for task, outcome in over.run(tasks, entry):
        stand[task] = outcome or _left_behind(task)
        if stand[task].status is not None:
            there += stand[task].status == 0
            say(_line(task, stand[task], there, of, time.monotonic() - began))
    for task in tasks:
        stand.setdefault(task, _left_behind(task))
    return stand


def _left_behind(task: Task) -> Outcome:
    """How a task stands whose worker died: it may have ended before."""
    held = look(task.mark)
    if held is None:
        return Outcome(None, _NEVER)
    if held.status is None:
        return note(task, held._replace(status=LOST, reason=_LOST))
    return held


def _attempts(task: Task) -> int:
    held = look(task.mark)
    return held.attempts if held else 0


def _line(task: Task, outcome: Outcome, there: int, of: int, seconds: float) -> str:
    how = "done" if outcome.status == 0 else f"failed, {outcome.reason}"
    took = f"{outcome.seconds:.1f} s on {outcome.host or 'no host'}"
    return f"[{there}/{of}, {seconds:.0f} s] run {task.number}: {how} ({took})"
