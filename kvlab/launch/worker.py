"""In a worker: one run from its command line, everything it prints in a file."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from kvlab.core import BadInput, KvlabError, RunFailed
from kvlab.launch.task import Outcome, Task, command, look, note

MAIN = Path(__file__).resolve().parents[1] / "__main__.py"
Entry = Callable[[list[str]], int]  # the command line: words -> exit status
INTERRUPTED = 130  # as a shell says of a process that was
_WAIT_SECONDS = 60.0  # for the devices of a worker that is being ended
_taken: dict[Path, FileLock] = {}  # held until this process ends, however it ends


class Pins(NamedTuple):
    """Devices for processes of one host: each takes the first free of `sets`, for good.

    folder: on this host, where locks say which are taken; the system takes them back from a process
    that is killed. sets: values of CUDA_VISIBLE_DEVICES; none: processes see what there is.
    """

    folder: Path
    sets: tuple[str, ...] = ()

    def take(self) -> None:
        """Pin this process. Raises `BadInput` where all devices stay taken."""
        if not self.sets or self.folder in _taken:
            return
        until = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < until:
            for number, devices in enumerate(self.sets):
                lock = FileLock(self.folder / str(number))
                try:
                    lock.acquire(timeout=0)
                except Timeout:
                    continue
                os.environ["CUDA_VISIBLE_DEVICES"], _taken[self.folder] = devices, lock
                return
            time.sleep(0.2)
        raise BadInput("hydra.launcher.gpus", self.sets, "all are taken by other workers")


def perform(task: Task, entry: Entry, pins: Pins | None = None) -> Outcome:
    """Do the task, and say on disk that it began and how it ended. Raises nothing."""
    host = socket.gethostname()
    if not task.mark.parent.is_dir() or not task.cwd.is_dir():
        lacking = task.cwd if task.mark.parent.is_dir() else task.sweep
        reason = f"{lacking} is not there on {host}; all nodes must see the same file system"
        return Outcome(2, reason, host=host)
    began, held = time.monotonic(), look(task.mark)
    attempts = held.attempts + 1 if held else 1
    here = note(task, Outcome(host=host, attempts=attempts, pid=os.getpid()))
    try:
        if pins is not None:
            pins.take()
        os.chdir(task.cwd)
        words = command(task.words, task.folder, task.resume or attempts > 1)
        status, reason = _written(task, entry, words)
    except Exception as error:
        status, reason = 1, f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - began, 3)
    return note(task, here._replace(status=status, reason=reason, seconds=seconds))


def in_turn(task: Task, run: Callable[[], int]) -> None:
    """Do the task in the launcher's own process, where its refusal is no end of the others."""
    began, held = time.monotonic(), look(task.mark)
    attempts = held.attempts + 1 if held else 1
    here = note(task, Outcome(host=socket.gethostname(), attempts=attempts, pid=os.getpid()))
    status, reason = INTERRUPTED, "it was interrupted"
    try:
        status = run()
        reason = "variants failed: its report says which" if status else ""
    except KvlabError as error:
        status, reason = 1 if isinstance(error, RunFailed) else 2, " ".join(str(error).split())
    except Exception as error:
        status, reason = 1, f"{type(error).__name__}: {error}"
        raise
    finally:
        seconds = round(time.monotonic() - began, 3)
        note(task, here._replace(status=status, reason=reason, seconds=seconds))


def _written(task: Task, entry: Entry, words: list[str]) -> tuple[int, str]:
    """Exit status, and the last that a run without success said."""
    # Set while Hydra runs the sweep, and inherited: there it lets errors through to us.
    os.environ.pop("HYDRA_FULL_ERROR", None)
    before, sys.argv = sys.argv, [str(MAIN), *words]  # the command that a run notes
    with task.log.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        at = log.tell()
        try:
            status = entry(words)
        except BaseException:  # also SystemExit: a worker goes on with the next task
            traceback.print_exc()
            status = 1
        finally:
            sys.argv = before
    return status, _last_words(task.log, at) if status else ""


def _last_words(log: Path, at: int) -> str:
    with log.open("rb") as file:
        file.seek(at)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    ours = [line.removeprefix("kvlab: ") for line in lines if line.startswith("kvlab: ")]
    return (ours or lines or ["it said nothing"])[-1][:400]
