"""The run folder before anything is in it: may it be made, and what to take away again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from kvlab.core import BadInput, KvlabError


class Place(NamedTuple):
    """A folder and those of its parents that do not exist yet, innermost first."""

    path: Path
    missing: tuple[Path, ...]

    @classmethod
    def at(cls, path: Path) -> Place:
        """Raises `BadInput` where no folder can be made."""
        path = Path(os.path.abspath(path))
        missing = [path, *path.parents]
        there = next(p for p in missing if p.exists())
        if not there.is_dir():
            raise BadInput("hydra.run.dir", path, f"{there} is a file; name a folder")
        if not os.access(there, os.W_OK):
            raise BadInput("hydra.run.dir", path, f"{there} cannot be written to")
        return cls(path, tuple(missing[: missing.index(there)]))

    @contextmanager
    def restored_on_refusal(self) -> Iterator[None]:
        """What stands in the folder now is all that stands there after a `KvlabError`."""
        before = set(self.path.iterdir()) if self.path.is_dir() else set()
        try:
            yield
        except KvlabError:
            self._clear(before)
            raise

    def _clear(self, keep: set[Path]) -> None:
        for entry in set(self.path.iterdir()) - keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for folder in self.missing:
            if any(folder.iterdir()):
                return
            folder.rmdir()
