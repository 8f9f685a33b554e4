"""Runs of a sweep as tasks of other processes, on this host or on a cluster. Imports no torch."""

from kvlab.launch.base import Launching
from kvlab.launch.by_joblib import ByJoblib
from kvlab.launch.by_ray import ByRay
from kvlab.launch.by_submitit import BySubmitit
from kvlab.launch.rounds import launch
from kvlab.launch.task import Outcome, Task, done, outcomes, same_run
from kvlab.launch.told import failures_told, worst
from kvlab.launch.worker import in_turn

__all__ = [
    "ByJoblib", "ByRay", "BySubmitit", "Launching", "Outcome", "Task", "done",
    "failures_told", "in_turn", "launch", "outcomes", "same_run", "worst",
]  # fmt: skip
