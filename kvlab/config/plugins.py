"""kvlab's launchers as plugins of Hydra: `hydra/launcher=joblib`, `submitit`, `ray`.

A job is given as the command line that would do it alone, so nothing of Hydra is pickled. This
module is imported whenever kvlab composes, so it imports little.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from kvlab.axes import load
from kvlab.config.sweep import PACKAGE, task_of
from kvlab.launch import ByJoblib, ByRay, BySubmitit, Outcome, launch

ENTRY = "kvlab.__main__.main"  # what a worker calls with a command line; known here by name only


class _Tasks(Launcher):
    """Jobs of a sweep as tasks of a member of `kvlab.launch`."""

    def setup(self, *, hydra_context, task_function, config) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        state, resume = self.config.hydra, self.config.resume
        numbered = list(enumerate(map(list, job_overrides), initial_job_idx))
        tasks = [
            task_of(state, resume, number, overrides, self._subdir(number, overrides))
            for number, overrides in numbered
        ]
        ended = launch(self, tasks, load("hydra/launcher", ENTRY))
        return [_told(overrides, outcome) for (_, overrides), outcome in zip(numbered, ended)]

    def _subdir(self, number: int, overrides: list[str]) -> Path:
        """The job's folder inside the sweep's, as `hydra.sweep.subdir` says."""
        named = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)["subdir"]
        if named == "${hydra.job.num}":  # Hydra's default: no job has to be composed for it
            return Path(str(number))
        job = self.context.config_loader.load_sweep_config(self.config, overrides)
        OmegaConf.set_struct(job, False)
        job.hydra.job.num = job.hydra.job.id = number
        return Path(str(job.hydra.sweep.subdir))


def _told(overrides: list[str], outcome: Outcome) -> JobReturn:
    """For a sweeper: every job has ended, and what it returns is its exit status."""
    job = JobReturn(overrides=overrides, status=JobStatus.COMPLETED)
    job.return_value = outcome.status
    return job


class JoblibLauncher(ByJoblib, _Tasks):
    """Processes of this host."""

    __module__ = PACKAGE


class SubmititLauncher(BySubmitit, _Tasks):
    """Jobs of SLURM, or processes of this host."""

    __module__ = PACKAGE


class RayLauncher(ByRay, _Tasks):
    """Tasks of a Ray cluster."""

    __module__ = PACKAGE


LAUNCHERS = (JoblibLauncher, SubmititLauncher, RayLauncher)
