"""`hydra/launcher=submitit`: jobs of SLURM, or processes of this host where there is no SLURM."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from kvlab.core import BadInput
from kvlab.launch.base import Launching, divided
from kvlab.launch.task import TASKS, Outcome, Task
from kvlab.launch.worker import Entry, Pins, perform

_POLL_SECONDS = {"local": 0.1, "slurm": 2.0}


class Job:
    """What is pickled for submitit: a task that is given again where SLURM takes its node."""

    def __call__(self, task: Task, entry: Entry, pins: Pins | None) -> Outcome:
        return perform(task, entry, pins)

    def checkpoint(self, *arguments):
        """Called by submitit at preemption and timeout; the run goes on with what is on disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Job(), *arguments)


class BySubmitit(Launching):
    """cluster: None is SLURM where it is found, else this host. n_jobs: runs at a time; None: as
    many as this host's devices or cores allow, or as SLURM gives. minutes: how long a run may take.
    parameters: more for submitit, as `{slurm_partition: gpu, mem_gb: 64}`.
    """

    name, needs = "submitit", "submitit"

    def __init__(
        self,
        cluster: Literal["slurm", "local"] | None = None,
        n_jobs: int | None = None,
        gpus: int | None = None,
        retries: int = 2,
        minutes: int = 1440,
        parameters: dict | None = None,
    ):
        super().__init__(gpus, retries)
        if minutes < 1:
            raise BadInput("hydra.launcher.minutes", minutes, "must be at least 1")
        self.cluster, self.n_jobs, self.minutes = cluster, n_jobs, minutes
        self.parameters = dict(parameters or {})

    def refuse(self):
        super().refuse()
        if self.where() == "local":
            divided(Path(), self.gpus, self.n_jobs)
        with tempfile.TemporaryDirectory() as folder:
            self.executor(Path(folder))

    def where(self) -> str:
        """slurm or local. Raises `BadInput` where SLURM is asked for and is not there."""
        from submitit import AutoExecutor, SlurmExecutor

        there = SlurmExecutor.affinity() > 0
        if self.cluster == "slurm" and not there:
            remedy = "there is no srun on this host; give the sweep from a login node, or local"
            raise BadInput("hydra.launcher.cluster", "slurm", remedy)
        return self.cluster or ("slurm" if there else AutoExecutor.which())

    def executor(self, folder: Path):
        """submitit's, with the settings. Raises `BadInput` for parameters that it refuses."""
        from submitit import AutoExecutor

        where = self.where()
        made = AutoExecutor(folder=folder, cluster=where)
        given = {"timeout_min": self.minutes}
        if where == "slurm":
            given |= {"gpus_per_node": self.gpus} if self.gpus else {}
            given |= {"slurm_array_parallelism": self.n_jobs} if self.n_jobs else {}
        try:
            made.update_parameters(**given, **self.parameters)
        except (NameError, TypeError, ValueError, AssertionError) as error:
            said = " ".join(str(error).split())
            raise BadInput("hydra.launcher.parameters", self.parameters, said) from None
        return made

    def run(self, tasks, entry):
        executor, where = self.executor(tasks[0].sweep / TASKS / "submitit"), self.where()
        if where == "slurm":
            with executor.batch():  # one array
                jobs = [(executor.submit(Job(), task, entry, None), task) for task in tasks]
            yield from _ended(jobs, [], len(jobs), lambda task: None, where)
            return
        with tempfile.TemporaryDirectory(prefix="kvlab-devices-") as folder:
            count, pins = divided(Path(folder), self.gpus, self.n_jobs)

            def start(task: Task):
                return executor.submit(Job(), task, entry, pins)

            yield from _ended([], list(tasks), count, start, where)


def _ended(
    jobs: list, tasks: list[Task], count: int, start: Callable, where: str
) -> Iterator[tuple[Task, Outcome | None]]:
    """Jobs as they end; `start` gives the tasks that wait, so that `count` are at work.

    submitit's local mode starts whatever it is given at once.
    """
    try:
        while jobs or tasks:
            while tasks and len(jobs) < count:
                task = tasks.pop(0)
                jobs.append((start(task), task))
            over = [pair for pair in jobs if pair[0].done()]
            for job, task in over:
                jobs.remove((job, task))
                yield task, _outcome(job, where)
            if not over:
                time.sleep(_POLL_SECONDS[where])
    finally:
        for job, _ in jobs:
            job.cancel()


def _outcome(job, where: str) -> Outcome | None:
    from submitit.core.utils import FailedJobError, UncompletedJobError

    if where == "local" and not job.paths.result_pickle.exists():
        return None  # submitit would wait for it: files of a cluster may come late
    try:
        return job.result()
    except (FailedJobError, UncompletedJobError):
        return None
