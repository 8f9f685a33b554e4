"""A run of a sweep as a task, and what is known of it on disk.

A sweep's folder has `tasks/NUMBER.json`, how the run stands, and `tasks/NUMBER.log`, what it
printed. The worker writes them, so they are right whoever is killed: worker, launcher or node.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from kvlab.core import BadInput

TASKS = "tasks"
LOST = 137  # as a shell says of a process that was killed
# Words that may differ between a run and its resumption; they choose no result.
_MAY_CHANGE = ("resume=", "track=", "track.", "hydra.", "hydra/", "--config-dir=")


class Task(NamedTuple):
    """One run: the words behind `python -m kvlab`, its folder, and where the words are read.

    words: `command` puts the folder and `resume` in place of what they say of these. resume:
    whether the first try goes on with what is there.
    """

    number: int
    words: tuple[str, ...]
    folder: Path
    sweep: Path
    cwd: Path
    resume: bool = False

    @property
    def mark(self) -> Path:
        return self.sweep / TASKS / f"{self.number}.json"

    @property
    def log(self) -> Path:
        return self.mark.with_suffix(".log")


class Outcome(NamedTuple):
    """How a run stands. status: its exit status, None while it is at work."""

    status: int | None = None
    reason: str = ""
    seconds: float = 0.0
    host: str = ""
    attempts: int = 0
    pid: int = 0
    words: tuple[str, ...] = ()
    folder: str = ""


def command(words: Sequence[str], folder: Path | str, resume: bool) -> list[str]:
    """The words of one run in `folder`, with `resume` where it goes on with what is there."""
    kept = [word for word in words if not word.startswith(("hydra.run.dir=", "resume="))]
    return [*kept, *(["resume=true"] if resume else []), f"hydra.run.dir={_quoted(str(folder))}"]


def _quoted(path: str) -> str:
    """A path that Hydra's grammar takes as it stands."""
    if re.fullmatch(r"[\w./-]+", path, re.ASCII):
        return path
    return "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


def told(words: Sequence[str], folder: Path | str, resume: bool = True) -> str:
    """The line for a shell that gives the run (anew, or going on with what is there)."""
    return shlex.join(["python", "-m", "kvlab", *command(words, folder, resume)])


def note(task: Task, outcome: Outcome) -> Outcome:
    """Keep on disk how the task stands, whole or not at all."""
    full = outcome._replace(words=task.words, folder=str(task.folder))
    task.mark.parent.mkdir(parents=True, exist_ok=True)
    partial = task.mark.with_name(f"{task.number}.{os.getpid()}.partial")
    partial.write_text(json.dumps(full._asdict(), ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, task.mark)
    return full


def look(mark: Path) -> Outcome | None:
    """How a task stands; None where none has begun, or its file is none of ours."""
    try:
        held = json.loads(mark.read_text(encoding="utf-8"))
        return Outcome(**{**held, "words": tuple(held["words"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def done(task: Task) -> bool:
    """Whether the run ended well and its rows are there."""
    held = look(task.mark)
    return bool(held and held.status == 0 and (task.folder / "measurements.jsonl").is_file())


def outcomes(sweep: Path) -> dict[int, Outcome]:
    """How all runs of a sweep stand, by number."""
    marks = {int(mark.stem): mark for mark in (sweep / TASKS).glob("*.json") if mark.stem.isdigit()}
    held = {number: look(marks[number]) for number in sorted(marks)}
    return {number: outcome for number, outcome in held.items() if outcome}


def same_run(tasks: Iterable[Task]) -> None:
    """Raises `BadInput` where a folder holds another run than the task, or one without `resume`."""
    for task in tasks:
        held = look(task.mark)
        if held and not task.resume:
            remedy = "holds runs of a sweep; resume=true goes on with it, or choose another folder"
            raise BadInput("hydra.sweep.dir", task.sweep, remedy)
        if held and _meant(held.words) != _meant(task.words):
            was = shlex.join(_meant(held.words))
            remedy = f"run {task.number} of {task.sweep} began as `{was}`; use a new folder"
            raise BadInput("resume", "true", remedy)


def _meant(words: Iterable[str]) -> list[str]:
    return [word for word in words if not word.startswith(_MAY_CHANGE)]
