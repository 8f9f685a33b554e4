"""WandbTracker: mirrors a run to Weights & Biases, online or into files to sync later."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from kvlab.core import BadInput
from kvlab.track.base import Tracker
from kvlab.track.probe import MODES, choose_mode
from kvlab.track.rows import plain
from kvlab.track.shown import by_step, cell, interval, key_of, own_files, scalar, summary_keys
from kvlab.track.wandb_run import run_id, run_name

COLUMNS = ("variant", "params", "name", "value", "unit", "better", "low", "high", "count")
STEP = "measurement"  # the x axis of measurements without a step: how many batches came before


def _guarded(method: Callable) -> Callable:
    """What fails inside W&B ends the tracking, not the run, and says so in one line."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if self._run is None or self._broken:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self._give_up(error)

    return guarded


class WandbTracker(Tracker):
    """One W&B run for each run folder, however often the run is resumed.

    name: of the W&B run; None: the experiment and the folder, in a sweep the sweep's and the job's.
    mode: `auto` is online with a key and a server that answers within `probe_seconds`, else
        offline at once, with the reason on stderr; `online` refuses instead; `offline`; `disabled`.
        The variable WANDB_MODE decides where mode is `auto`.
    group, job_type, tags: added to what `start` is told (a sweep's folder is its group).
    artifacts: whether files and figures are uploaded, beside config, history and summary.
    finish_seconds: how long the end may wait for an upload; the files stay for `wandb sync`.

    History: `VARIANT/NAME` with its `low` and `high`, over `measurement` (a count) or the step
    given. Summary: `VARIANT/NAME` -> value, low, high; where one variant was measured under several
    settings, the settings that differ follow in brackets. A table holds every measurement.
    """

    def __init__(
        self,
        project: str = "kvlab",
        entity: str | None = None,
        mode: str = "auto",
        name: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Iterable[str] = (),
        notes: str | None = None,
        artifacts: bool = True,
        probe_seconds: float = 3.0,
        finish_seconds: float = 60.0,
    ):
        self.project, self.entity, self.mode, self.name = project, entity, mode, name
        self.group, self.job_type, self.tags, self.notes = group, job_type, tuple(tags), notes
        self.artifacts = artifacts
        if mode not in MODES:
            raise BadInput("track.mode", mode, f"known: {', '.join(MODES)}")
        for key, seconds in (("probe", probe_seconds), ("finish", finish_seconds)):
            if not seconds > 0:
                raise BadInput(f"track.{key}_seconds", seconds, "must be more than 0 seconds")
        self.probe_seconds, self.finish_seconds = probe_seconds, finish_seconds
        self._wandb = self._run = None
        self._broken = self._refused = False
        self._rows: list[dict] = []
        self._metrics: set[str] = set()
        self._batches = 0

    def start(self, run_dir, config, environment, *, group=None, job_type=None, tags=()):
        self._dir = Path(run_dir)
        # The library reports its own errors to its makers, and an exit may wait 20 s for that.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            self._wandb = import_module("wandb")
            mode = self._choose_mode()
            self._run = self._init(
                mode,
                name=self.name or run_name(self._dir, self.job_type or job_type),
                config={**plain(config), "environment": plain(environment)},
                group=self.group or group,
                job_type=self.job_type or job_type,
                tags=[*dict.fromkeys([*self.tags, *tags])],
            )
            self._run.define_metric(STEP, hidden=True)
        except BadInput:
            raise
        except Exception as error:
            self._give_up(error)

    @_guarded
    def environment(self, environment):
        self._run.config.update({"environment": plain(environment)}, allow_val_change=True)

    @_guarded
    def log(self, rows):
        for step, batch in by_step(rows).items():
            axis, at = (STEP, self._batches + 1) if step is None else ("step", step)
            self._run.log({**self._values(batch, axis), axis: at})
        self._told(rows)

    @_guarded
    def kept(self, rows):
        if getattr(self._run, "resumed", False):  # the server has their history
            self._told(rows, len(rows))  # no fewer batches than they came in
        else:
            self.log(rows)

    def _told(self, rows: list[dict], batches: int = 1) -> None:
        self._rows += rows
        self._batches += batches
        for row in rows:
            self._run.summary[key_of(row)] = interval(row)

    @_guarded
    def history(self, step, values):
        for key in values:
            self._define(key, "step")
        self._run.log({**values, "step": step})

    @_guarded
    def artifact(self, path, kind):
        path = Path(path)
        if not self.artifacts or not path.exists():
            return
        artifact = self._wandb.Artifact(f"run-{self._run.id}-{kind}", type=kind)
        for file in [path] if path.is_file() else own_files(path):
            artifact.add_file(
                str(file), name=str(file.relative_to(path)) if path.is_dir() else None
            )
            if file.suffix == ".png":
                self._run.log({f"figures/{file.stem}": self._wandb.Image(str(file))})
        self._run.log_artifact(artifact)

    def finish(self, *, failed=False):
        self._table()
        run, self._run = self._run, None
        if run is None:
            return
        # The library waits for its upload without an end; a thread lets the user go home.
        waiter = threading.Thread(target=self._end, args=(run, int(failed)), daemon=True)
        waiter.start()
        waiter.join(self.finish_seconds)
        if waiter.is_alive():
            self._broken = True
            kept = Path(run.dir).parent
            self._say(f"upload unfinished after {self.finish_seconds:.0f} s; wandb sync {kept}")
        if waiter.is_alive() or self._refused:
            _cut_off(self._wandb)

    def _end(self, run, exit_code: int) -> None:
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            if not self._broken:  # else it was said already
                self._say(f"the end was not recorded ({_line(error)})")

    @_guarded
    def _table(self):
        self._summarize()
        failed = any("reason" in row for row in self._rows)
        columns = [*COLUMNS, "reason"] if failed else list(COLUMNS)
        cells = [[cell(row.get(column)) for column in columns] for row in self._rows]
        self._run.log({"measurements": self._wandb.Table(columns=columns, data=cells)})

    def _choose_mode(self) -> str:
        settings = self._wandb.setup(settings=self._quiet()).settings
        mode, reason = choose_mode(
            self.mode, settings.base_url, settings.api_key, self.probe_seconds
        )
        if reason:
            self._say(f"offline, {reason}; the run is kept in {self._dir / 'wandb'}")
        return mode

    def _quiet(self):
        return self._wandb.Settings(silent=True, console="off", init_timeout=10)

    def _init(self, mode: str, **about):
        start = functools.partial(
            self._wandb.init,
            project=self.project,
            entity=self.entity,
            id=run_id(self._dir),
            notes=self.notes,
            dir=str(self._dir),
            settings=self._quiet(),
            **about,
        )
        try:
            # Offline there is nothing to resume: files of a run are whole, the last ones count.
            return start(mode=mode, **({"resume": "allow"} if mode == "online" else {}))
        except Exception as error:
            if mode != "online":
                raise
            self._refused = True
            self._say(f"offline, the server refused the start ({_line(error)})")
            return start(mode="offline")

    def _values(self, rows: list[dict], axis: str) -> dict:
        """History keys of one batch; the settings go along, so that they can be plotted against."""
        values = {}
        for row in rows:
            key = key_of(row)
            self._define(f"{row['variant']}/*", axis)
            ends = {f"{key}_{end}": row[end] for end in ("low", "high") if row[end] is not None}
            values.update({key: row["value"], **ends})
            values.update({f"params/{k}": v for k, v in row["params"].items() if scalar(v)})
        return values

    def _define(self, name: str, axis: str) -> None:
        # summary="none": the summary is ours, W&B's would hold the last value without interval.
        if name not in self._metrics:
            self._metrics.add(name)
            self._run.define_metric(name, step_metric=axis, summary="none")

    def _summarize(self) -> None:
        """Where one variant was measured under several settings, one entry for each of them."""
        several = [(row, more) for _, more, row in summary_keys(self._rows) if more]
        for key in {key_of(row) for row, _ in several}:
            del self._run.summary[key]
        for row, more in several:
            self._run.summary[f"{key_of(row)}{more}"] = interval(row)

    def _give_up(self, error: Exception) -> None:
        self._broken = True
        self._say(f"tracking stopped ({_line(error)}); the run goes on, its folder has all")

    @staticmethod
    def _say(text: str) -> None:
        print(f"W&B: {text}", file=sys.stderr, flush=True)


def _cut_off(wandb, seconds: float = 5.0) -> None:
    """End W&B's own process, which would hold up our exit for as long as it retries.

    It first gets a few seconds to write its files. The library has no way to be cut off, hence the
    private names; where a version has others, the exit waits for the upload.
    """
    connection = getattr(wandb.setup(), "_connection", None)
    process = getattr(getattr(connection, "_proc", None), "_process", None)
    waiter = threading.Thread(target=wandb.teardown, daemon=True)
    waiter.start()
    waiter.join(seconds)
    if process and waiter.is_alive():
        process.kill()


def _line(error: Exception) -> str:
    """The first line of an error, cut to a length that stays one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
