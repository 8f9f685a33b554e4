"""Who may write into a folder: one process at a time.

Ownership is a lock that the system takes back when its process ends, however it ends: a killed run
can be resumed at once. What a refused run takes away again is what it made itself, by name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from kvlab.core import BadInput

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

LOCK = ".lock"
OWN = (  # what a run, its trackers and Hydra put into a folder before there is a number
    "config.yaml", "environment.json", "measurements.jsonl", "measurements.partial", "track.jsonl",
    "study.journal", "scores", "wandb", ".hydra", "multirun.yaml", LOCK,
)  # fmt: skip
_TRIES = 100  # a folder may be removed by its owner between our making and our locking it


class Busy(BadInput):
    """Another run is at work in the folder."""

    def __init__(self, path: Path, more: str = ""):
        remedy = f"another run is at work in it; wait for its end or choose another folder{more}"
        super().__init__("hydra.run.dir", path, remedy)


class Owner:
    """A folder that only this process may write into, until `release` or `clear`.

    made: folders that came with the ownership, innermost first; before: names that stood there.
    """

    def __init__(self, path: Path, lock: IO, made: Iterable[Path] = ()):
        self.path, self.made = path, tuple(made)
        self._lock: IO | None = lock
        self.before = {entry.name for entry in path.iterdir()} - {LOCK}

    def release(self) -> None:
        """Let others in. Harmless when repeated."""
        if self._lock is None:
            return
        for name in (LOCK, Path(self._lock.name).name):  # while it is held: `_take` looks for that
            (self.path / name).unlink(missing_ok=True)
        self._lock.close()
        self._lock = None

    def clear(self, also: Iterable[str] = ()) -> None:
        """Remove what a run makes (`also`: more names) and was not there, then folders made."""
        logs = {entry.name for entry in self.path.glob("*.log")}
        for name in {*OWN, *also, *logs} - self.before - {LOCK, ""}:
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        self.release()
        _remove_empty(self.made)

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_) -> None:
        self.release()


def own(path: Path) -> Owner:
    """Make the folder where it is missing, and own it. Raises `Busy` where another process does."""
    made: list[Path] = []
    for _ in range(_TRIES):
        try:
            made = _make(path) + made
            lock = _take(path / LOCK)
        except FileNotFoundError:  # a refused run took away what it had made
            continue
        except NotADirectoryError:
            raise BadInput("hydra.run.dir", path, "is a file; name a folder") from None
        except Busy:
            _remove_empty(made)
            raise
        if lock is not None:
            return Owner(path, lock, dict.fromkeys(made))
    raise Busy(path)


def _make(path: Path) -> list[Path]:
    """Folders of `path` that this call made, innermost first; another run may make some of them."""
    made = []
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        made.insert(0, folder)
    return made


def _take(file: Path) -> IO | None:
    """The lock, open; None where its file was removed meanwhile: then it locks nothing."""
    if fcntl is None:
        return _make_lock(file)
    lock = file.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise Busy(file.parent) from None
    except OSError:  # a file system without locks
        lock.close()
        return _make_lock(file.with_name(f"{LOCK}.made"))
    if file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
        return lock
    lock.close()
    return None


def _make_lock(file: Path) -> IO:
    """Without locks of the system the making of a file is the exclusive act; a kill leaves it."""
    try:
        return file.open("x")
    except FileExistsError:
        raise Busy(file.parent, f"; if it was killed, remove {file}") from None


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:  # someone else is in it, or has removed it
            return
