"""What launchers have in common: settings, the extra they need, the devices of a host."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from kvlab.core import BadInput
from kvlab.launch.task import Outcome, Task
from kvlab.launch.worker import Entry, Pins


class Launching:
    """Runs tasks in other processes; a member says how.

    gpus: of each run; None: one where there are any, else none. retries: how often a run that
    failed, or whose worker died, is given again.
    """

    name, extra, needs = "", "launch", ""  # as on the command line; of pyproject; the library

    def __init__(self, gpus: int | None = None, retries: int = 2):
        for key, value in (("gpus", gpus), ("retries", retries)):
            if value is not None and value < 0:
                raise BadInput(f"hydra.launcher.{key}", value, "must not be negative")
        self.gpus, self.retries = gpus, retries

    def refuse(self) -> None:
        """Raises `BadInput` where the library is missing."""
        if find_spec(self.needs) is None:
            remedy = f"needs {self.needs}: pip install 'kvlab[{self.extra}]'"
            raise BadInput("hydra/launcher", self.name, remedy)

    def run(self, tasks: Sequence[Task], entry: Entry) -> Iterator[tuple[Task, Outcome | None]]:
        """Tasks as they end; None: the worker died. Tasks that never began may be left out."""
        raise NotImplementedError


def visible_gpus() -> list[str]:
    """The devices of this host, as CUDA_VISIBLE_DEVICES names them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [word.strip() for word in told.split(",") if word.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = asked.stdout.splitlines() if asked.returncode == 0 else []
    return [str(number) for number, line in enumerate(li for li in lines if li.startswith("GPU "))]


def divided(folder: Path, gpus: int | None, n_jobs: int | None) -> tuple[int, Pins]:
    """How many processes this host runs at a time, and the devices of each.

    Raises `BadInput` where there are fewer devices than were asked for.
    """
    if n_jobs is not None and n_jobs < 1:
        raise BadInput("hydra.launcher.n_jobs", n_jobs, "must be at least 1")
    there = visible_gpus()
    each = min(1, len(there)) if gpus is None else gpus
    if each == 0:
        count = n_jobs or len(os.sched_getaffinity(0))
        return count, Pins(folder, ("",) * count if there else ())
    count = n_jobs or max(1, len(there) // each)
    if count * each > len(there):
        asked = f"{count} runs at a time with {each} each need {count * each}"
        raise BadInput("hydra.launcher.gpus", each, f"{asked}; this host has {len(there)}")
    sets = [",".join(there[at * each : (at + 1) * each]) for at in range(count)]
    return count, Pins(folder, tuple(sets))
