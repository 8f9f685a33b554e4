"""RunFolder: what a run leaves on disk, written so that a killed run leaves a valid prefix."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import yaml

from kvlab.core import BadInput, Measurement, RunFailed
from kvlab.track.base import Tracker
from kvlab.track.environment import collect
from kvlab.track.failure import Failure
from kvlab.track.owner import Owner, own
from kvlab.track.rows import (
    FAILED,
    canonical,
    encode,
    failed_row,
    identity,
    plain,
    read_rows,
    standing,
    to_row,
    torn_batch,
)

# Settings that may differ between a run and its resumption: they choose no result of a variant.
MAY_CHANGE = ("resume", "track", "variants", "progress", "report")


class RunFolder:
    """One run: config.yaml, environment.json, measurements.jsonl and arrays, mirrored to a tracker.

    `config` is the composed config as YAML text. A folder that already holds something is refused
    without `resume`; with it, rows that are there count as done (`done`) and are not written twice,
    and a last line torn by a kill is cut off. A resumed run must have the config it began with,
    except for MAY_CHANGE. Raises BadInput, before it writes, for a folder that cannot be used.

    owner: who owns the folder already; by default it is owned here, until `close`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        config: str = "",
        resume: bool = False,
        tracker: Tracker | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Iterable[str] = (),
        owner: Owner | None = None,
    ):
        self.path, self.tracker = Path(path), tracker or Tracker()
        if self.path.exists() and not self.path.is_dir():
            raise BadInput("hydra.run.dir", path, "is a file; name a folder")
        self.config = yaml.safe_load(config) or {}
        self._owner = own(self.path) if owner is None else None
        try:
            self._begin(config, resume, {"group": group, "job_type": job_type, "tags": tuple(tags)})
        except BaseException:
            self._release()
            raise

    def _begin(self, config: str, resume: bool, about: dict) -> None:
        """Look at what is there, then write; `about`: what the tracker is told."""
        _check(self.path, self.config, resume)
        self._measurements = self.path / "measurements.jsonl"
        self._rows = self._recover()
        self._kept = {identity(row) for row in self._rows}
        self._names: dict[tuple, set[str]] = {}
        self._note(self._rows)
        self._names.pop(self._torn, None)  # measured again; rows that are there stay
        self._earlier = _earlier(self.path)
        (self.path / "config.yaml").write_text(config, encoding="utf-8")
        self._device_known = False
        self.environment = self._write_environment()
        self.tracker.start(self.path, self.config, self.environment, **about)
        measured = [row for row in self._rows if row["name"] != FAILED]
        for _, batch in groupby(measured, key=lambda row: identity(row)[:2]):
            self.tracker.kept(list(batch))  # it mirrors the whole file
        self._earlier_failures = self.failures()  # told at the end, if they stand till then
        self._file = self._measurements.open("ab", buffering=0)

    def add(
        self,
        variant: str,
        params: dict,
        measurements: Iterable[Measurement],
        *,
        step: int | None = None,
    ) -> None:
        """Append measurements of one variant under one setting; on disk when this returns."""
        if not self._device_known:  # by now the job has loaded torch, if it ever does
            self.refresh_environment()
        rows = [to_row(variant, params, m, step) for m in measurements]
        self._note(rows)
        new = {identity(row): row for row in reversed(rows) if identity(row) not in self._kept}
        rows = [*reversed(new.values())]
        if not rows:
            return
        # One write for the whole batch: a kill falls between batches, hardly ever inside one.
        self._file.write("".join(encode(row) + "\n" for row in rows).encode())
        self._rows += rows
        self._kept |= new.keys()
        self.tracker.log(rows)
        if len(left := standing(self._rows)) < len(self._rows):
            self._replace(left)

    def fail(
        self, variant: str, params: dict, failure: Failure, *, missing: str | None = None
    ) -> None:
        """Note why a variant has no numbers; it stands until `missing` (None: any) is measured."""
        row = failed_row(variant, params, failure.reason, missing)
        self._replace([*(r for r in self._rows if identity(r) != identity(row)), row])
        self.tracker.log([row])
        print(f"kvlab: {variant} failed: {failure.reason}", file=sys.stderr, flush=True)
        with (self.path / "failures.log").open("a", encoding="utf-8") as file:
            file.write(f"{variant} {canonical(params)}\n{failure.trace}\n")

    @contextmanager
    def surviving(self, variant: str, params: dict, missing: str | None = None) -> Iterator[None]:
        """What raises inside is this variant's failure and not the run's.

        Bad input before the first number is the user's to mend, and passes.
        """
        try:
            yield
        except RunFailed:
            raise
        except Exception as error:
            if isinstance(error, BadInput) and not self._rows:
                raise
            self.fail(variant, params, Failure.of(error), missing=missing)

    def failures(self) -> list[dict]:
        """Rows named `failed` that no later success has made good."""
        return [row for row in self._rows if row["name"] == FAILED]

    def done(self, variant: str, params: dict, names: Iterable[str] | None = None) -> bool:
        """Is this measured already? With `names`: every one of them; without: any measurement."""
        there = self._names.get((variant, canonical(params)), set())
        return bool(there) if names is None else set(names) <= there

    def rows(self) -> list[dict]:
        """All rows so far, those of the run that this one resumes included."""
        return [dict(row) for row in self._rows]

    def arrays(self, name: str, **arrays: np.ndarray) -> Path:
        """Write `name`.npz, whole or not at all; an earlier one is replaced."""
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"array file {name!r}: letters, digits, '.', '_' and '-' only")
        return save_whole(self.path / f"{name.removesuffix('.npz')}.npz", arrays)

    def curve(self, name: str, variant: str, position: np.ndarray, **rows: np.ndarray) -> Path:
        """Add one variant's curve to `name`.npz: `position` [P], `variants` [V], each row [V, P].

        The report draws `per_position` with rows nll_delta, low and high (nats per token). A
        variant that is there already is replaced, so a resumed run may call this again. Rows that
        those held lack, as an earlier version's do, are NaN for them.
        """
        target = self.path / f"{name}.npz"
        held = dict(np.load(target)) if target.exists() else {}
        if held and not np.array_equal(held["position"], position):
            raise ValueError(f"{name}: the positions of {variant!r} differ from those held")
        names = [str(v) for v in held.get("variants", [])]
        keep = [i for i, v in enumerate(names) if v != variant]
        unknown = np.full((len(names), len(position)), np.nan)
        stacked = {
            key: np.vstack([held.get(key, unknown)[keep], [row]]) if keep else np.asarray([row])
            for key, row in rows.items()
        }
        names = np.array([names[i] for i in keep] + [variant])
        return self.arrays(name, position=np.asarray(position), variants=names, **stacked)

    def history(self, step: int, values: dict[str, float]) -> None:
        """One point of a series that is no measurement; only the tracker keeps it."""
        self.tracker.history(step, values)

    def artifact(self, path: str | Path, kind: str) -> None:
        self.tracker.artifact(Path(path), kind)

    def refresh_environment(self) -> dict:
        """Write environment.json again, now that the device's library may be loaded."""
        self._device_known = True
        date = self.environment["date"]
        self.environment = self._write_environment(date=date)
        self.tracker.environment(self.environment)
        return self.environment

    def close(self, *, failed: bool = False) -> None:
        """End the run: hand the files to the tracker and let it finish. Harmless when repeated."""
        if self._file.closed:
            return
        self._file.close()
        if left := [row for row in self._earlier_failures if row in self._rows]:
            self.tracker.log(left)
        self.tracker.artifact(self.path, "results")
        self.tracker.finish(failed=failed)
        self._release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(failed=kind is not None)

    def _release(self) -> None:
        if self._owner is not None:
            self._owner.release()

    def _replace(self, rows: list[dict]) -> None:
        """Make `rows` the whole file, at once or not at all."""
        partial = self._measurements.with_suffix(".partial")
        partial.write_text("".join(encode(row) + "\n" for row in rows), encoding="utf-8")
        self._file.close()
        os.replace(partial, self._measurements)
        self._file = self._measurements.open("ab", buffering=0)
        self._rows = rows

    def _note(self, rows: list[dict]) -> None:
        """What `done` knows: measurements of a whole variant, not of one document."""
        for row in rows:
            if row["name"] == FAILED or row.get("step") is not None:
                continue
            self._names.setdefault(identity(row)[:2], set()).add(row["name"])

    def _recover(self) -> list[dict]:
        """Rows of an earlier run; the file is cut to whole lines and ends with a newline."""
        self._torn = None
        if not self._measurements.exists():
            return []
        rows, size = read_rows(self._measurements)
        self._torn = torn_batch(rows, self._measurements.read_bytes()[size:])
        rows = standing(rows)  # a kill may have come before the file was written anew
        with self._measurements.open("r+b") as file:
            file.truncate(size)
            file.seek(max(size - 1, 0))
            if size and file.read(1) != b"\n":
                file.write(b"\n")
        return rows

    def _write_environment(self, **known) -> dict:
        environment = {**collect(self.config.get("device")), **known}
        if self._earlier:
            environment["earlier"] = self._earlier
        text = json.dumps(plain(environment), indent=2, ensure_ascii=False)
        (self.path / "environment.json").write_text(text + "\n", encoding="utf-8")
        return environment


def save_whole(target: Path, arrays: dict[str, np.ndarray]) -> Path:
    """Write an `.npz`, whole or not at all; its folder is made, an earlier file replaced."""
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(partial, target)
    return target


def _check(path: Path, config: dict, resume: bool) -> None:
    """Refuse what this run may not write into. Hydra's own files (.hydra, logs) do not count."""
    held = [p.name for p in path.iterdir() if not p.name.startswith(".") and p.suffix != ".log"]
    if held and not resume:
        remedy = "is not empty; choose another folder, or resume=true to go on with the run in it"
        raise BadInput("hydra.run.dir", path, remedy)
    before = path / "config.yaml"
    if held and before.exists():
        _same_config(path, yaml.safe_load(before.read_text(encoding="utf-8")) or {}, config)


def _same_config(path: Path, before: dict, now: dict) -> None:
    differ = [
        key for key in sorted({*before, *now} - set(MAY_CHANGE)) if before.get(key) != now.get(key)
    ]
    if differ:
        remedy = f"the run in {path} began with another {', '.join(differ)}; use a new folder"
        raise BadInput("resume", "true", remedy)


def _earlier(path: Path) -> list[dict]:
    """What the rows that are kept were measured with: one entry for each earlier start."""
    try:
        last = json.loads((path / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    facts = {key: last.get(key) for key in ("date", "commit", "dirty", "device")}
    return [*last.get("earlier", []), facts]
