"""AXIS track: where a run's numbers go besides its folder. The default member does nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path

from kvlab.track.rows import plain


class Tracker:
    """Follows one run; this member ignores it (`track=none`).

    The order of calls is start, kept, then any of log, history, artifact, environment, then finish.
    A tracker never changes results and never stops a run: what fails inside it becomes one line
    on stderr. Only BadInput from `start` may leave it, before anything was computed.
    """

    def start(
        self,
        run_dir: Path,
        config: dict,
        environment: dict,
        *,
        group: str | None = None,
        job_type: str | None = None,
        tags: tuple[str, ...] = (),
    ) -> None:
        """Begin. `config` is the composed config as plain data; `group` names the sweep, if any."""

    def environment(self, environment: dict) -> None:
        """The environment is known better now (the device, once the model library is loaded)."""

    def log(self, rows: list[dict]) -> None:
        """Rows of measurements.jsonl, as they were written."""

    def kept(self, rows: list[dict]) -> None:
        """Rows of an earlier run that this one resumes, told before any of its own."""
        self.log(rows)

    def history(self, step: int, values: dict[str, float]) -> None:
        """One point of a series that is no measurement (progress); `step` never decreases."""

    def artifact(self, path: Path, kind: str) -> None:
        """A file or folder to keep with the run; `kind` such as "results" or "report"."""

    def finish(self, *, failed: bool = False) -> None:
        """The run is over, `failed` by an error. Calling it again does nothing."""


class JsonlTracker(Tracker):
    """Writes what W&B would be told to `track.jsonl` in the run folder (`track=jsonl`).

    Measurements are not repeated, measurements.jsonl has them: the file holds the start (group,
    job type, tags), the history with its steps, the artifacts and the end, each with seconds since
    the start.
    """

    def __init__(self):
        self._path, self._began = None, 0.0

    def start(self, run_dir, config, environment, *, group=None, job_type=None, tags=()):
        self._path, self._began = Path(run_dir) / "track.jsonl", time.monotonic()
        self._write(event="start", group=group, job_type=job_type, tags=tags)

    def log(self, rows):
        self._write(event="log", measurements=len(rows))

    def history(self, step, values):
        self._write(event="history", step=step, **values)

    def artifact(self, path, kind):
        self._write(event="artifact", kind=kind, path=Path(path).name)

    def finish(self, *, failed=False):
        self._write(event="finish", failed=failed)
        self._path = None

    def _write(self, **fields):
        if self._path is None:
            return
        line = {**plain(fields), "seconds": round(time.monotonic() - self._began, 3)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
