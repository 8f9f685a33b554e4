"""A job of a sweep as a command line of its own, and the launchers that do such jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from kvlab.axes import load
from kvlab.config.build import check, target_of
from kvlab.config.paths import conf_dir
from kvlab.core import BadInput
from kvlab.launch import Launching, Task, failures_told, outcomes, worst

# Hydra takes plugins of a package of this name only; `launchers.py` lets ours be found there.
PACKAGE = "hydra_plugins.kvlab_launch"
_LAUNCHER = ("hydra/launcher=", "hydra.launcher.")
_OF_SWEEPS = (*_LAUNCHER, "hydra.sweep", "hydra/sweeper=", "hydra.run.", "hydra.mode=")


def task_of(
    state: DictConfig, resume: bool, number: int, overrides: Sequence[str], folder: Path
) -> Task:
    """The job `number` with `overrides`; `state` is Hydra's node in the sweep's composition."""
    own = [word for word in given(state, "hydra") if not word.startswith(_OF_SWEEPS)]
    sweep = Path(os.path.abspath(state.sweep.dir))
    words = (*_options(state), *own, *overrides)
    return Task(number, words, sweep / folder, sweep, Path.cwd(), bool(resume))


def given(state: DictConfig, kind: str) -> list[str]:
    """Overrides as they were given, `task` or `hydra`: what they refer to is not looked up."""
    return OmegaConf.to_container(state.overrides, resolve=False)[kind]


def overrides_of(state: DictConfig) -> list[str]:
    """A sweep's job was composed by Hydra; its variants need the user's search path again."""
    search = [o for o in given(state, "hydra") if o.startswith("hydra.searchpath=")]
    return [*search, *given(state, "task")]


def _options(state: DictConfig) -> list[str]:
    """Hydra's options that say where configurations lie."""
    told = []
    for source in state.runtime.config_sources:
        if source.provider == "main" and Path(source.path) != conf_dir():
            told.append(f"--config-path={os.path.abspath(source.path)}")
        if source.provider == "command-line":
            told.append(f"--config-dir={os.path.abspath(source.path)}")
    if state.job.config_name != "config":
        told.append(f"--config-name={state.job.config_name}")
    return told


def sweep_of(folder: Path) -> str | None:
    """The sweep that a run's folder belongs to, whoever does the run; None: a run by itself."""
    above = next((p for p in folder.parents if _is_sweep(p)), None)
    return above.name if above else None


def _is_sweep(folder: Path) -> bool:
    # the file is of Hydra's own sweeper, others may leave it out
    return (folder / "multirun.yaml").is_file() or bool(outcomes(folder))


def conclude(sweep: Path) -> int:
    """One report of all runs of a sweep, and what failed with the commands that repeat it.

    Returns the worst status of its runs.
    """
    ended = outcomes(sweep)
    measured = [o.folder for o in ended.values() if _has_rows(Path(o.folder))]
    if len(measured) > 1:
        write_report = load("report", "kvlab.report.write_report")  # its libraries are slow
        page = write_report(measured, sweep / "report", title=f"{sweep.name}: {len(measured)} runs")
        print(f"\nresults of {len(measured)} runs in {sweep}, their report in {page.parent}")
    if told := failures_told(ended):
        print(f"kvlab: {told}", file=sys.stderr)
    return worst(ended)


def _has_rows(folder: Path) -> bool:
    rows = folder / "measurements.jsonl"
    return rows.is_file() and rows.stat().st_size > 0


def launcher(state: DictConfig, sweep: bool) -> Launching | None:
    """Our launcher that `hydra/launcher` names, checked; None where Hydra's own does the sweep.

    Raises `BadInput` for a setting that cannot be, an extra that is missing, and a launcher of a
    run that is no sweep.
    """
    chosen = state.runtime.choices.get("hydra/launcher", "basic")
    if not sweep:
        if any(word.startswith(_LAUNCHER) for word in given(state, "hydra")):
            raise BadInput("hydra/launcher", chosen, "needs --multirun: one run has no tasks")
        return None
    tree = {"hydra": {"launcher": OmegaConf.to_container(state.launcher, resolve=True)}}
    node = tree["hydra"]["launcher"]
    if str(node["_target_"]).rpartition(".")[0] != PACKAGE:
        return None
    check(tree, node, "hydra.launcher")
    settings = {key: value for key, value in node.items() if key != "_target_"}
    made = target_of(tree, "hydra.launcher")(**settings)
    made.refuse()
    return made
