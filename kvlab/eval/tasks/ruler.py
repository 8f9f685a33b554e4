"""RULER's thirteen tasks as one."""

from __future__ import annotations

import sys

from kvlab.eval.task import Task
from kvlab.eval.tasks.documents import Hotpot, Squad
from kvlab.eval.tasks.lists import CommonWords, FrequentWords, VariableTracking
from kvlab.eval.tasks.niah import NIAH
from kvlab.eval.tasks.protocol import Protocol

RULER = (*NIAH, VariableTracking, CommonWords, FrequentWords, Squad, Hotpot)


class Ruler(Task):
    """Each of the thirteen at each length. Its score is the mean of theirs, for which all are
    needed: qa_1 and qa_2 come from local files and are left out, with a line, where none is named.

    essays, squad, hotpotqa: see the tasks.
    """

    name = "ruler"

    def __init__(
        self, protocol: Protocol | None = None, essays: str | None = None,
        squad: str | None = None, hotpotqa: str | None = None,
    ):
        self.tasks = [c(protocol, essays=essays) for c in NIAH]
        self.tasks += [c(protocol) for c in (VariableTracking, CommonWords, FrequentWords)]
        self.left_out = []
        for cls, path in ((Squad, squad), (Hotpot, hotpotqa)):
            if path is None:
                self.left_out.append(f"{cls.name} ({cls.key} names no file)")
            else:
                self.tasks.append(cls(protocol, path))

    def parts(self, model) -> list[Task]:
        if self.left_out:
            print(f"ruler: left out are {', '.join(self.left_out)}", file=sys.stderr, flush=True)
        return [part for task in self.tasks for part in task.parts(model)]
