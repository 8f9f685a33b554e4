"""The run folder before anything is in it: may it be made, and whose is it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvlab.core import BadInput
from kvlab.track.owner import Busy, Owner, own


class Place(NamedTuple):
    """A folder that can be made. by_clock: the time of day named it, another name is as good."""

    path: Path
    by_clock: bool = False

    @classmethod
    def at(cls, path: Path, named: str = "") -> Place:
        """`named`: the path as it was configured. Raises `BadInput` where no folder can be made."""
        path = Path(os.path.abspath(path))
        there = next(p for p in (path, *path.parents) if p.exists())
        if not there.is_dir():
            raise BadInput("hydra.run.dir", path, f"{there} is a file; name a folder")
        if not os.access(there, os.W_OK):
            raise BadInput("hydra.run.dir", path, f"{there} cannot be written to")
        return cls(path, "${now:" in named and "%S" in named)

    def own(self, resume: bool = False) -> Owner:
        """The folder, owned; one named by the clock gets a number where another run was there.

        Raises `Busy` where another run is at work in it.
        """
        if not self.by_clock:
            return own(self.path)
        path, number = self.path, 1
        while True:
            with suppress(Busy):
                owner = own(path)
                if not owner.before:  # perhaps made by a run that then came second: now it is ours
                    owner.made = tuple(dict.fromkeys((path, *owner.made)))
                if resume or not owner.before:
                    return owner
                owner.release()
            number += 1
            path = self.path.with_name(f"{self.path.name}-{number}")
