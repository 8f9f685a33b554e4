"""The offline optimum: a bound for hits, from the future of a trace. For the simulator only."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable

from kvlab.core import BadInput
from kvlab.policy.base import BlockMeta, PriorityPolicy

NEVER = 2**62


def told_wrongly(what: str, error: TypeError) -> BadInput:
    """A future that cannot be read."""
    return BadInput("policy.future", "...", f"must be the {what} of a trace, in order: {error}")


class Belady(PriorityPolicy):
    """The block whose next use is farthest in the future leaves.

    Belady 1966 (https://doi.org/10.1147/sj.52.0078). With blocks of one size and every miss
    admitted at its place in the order, no policy has more hits.
    future: all contents of the trace in the order of access; or, with `by_request`, the contents of
    each request.

    Flat (default): each `add` or `touch` is the next access of the trace, next uses are positions
    in it. By request: time is the number of `tick`s, one per request, and the next use of a block
    is the next request that has it. A parent is used whenever its child is, so farthest-first with
    the deeper of equals first evicts leaves only: with the running request pinned this is the bound
    that an engine can reach. Of blocks as deep that nobody wants again the least recent leaves.
    """

    name = "belady"
    foresees = bounds = True

    def __init__(self, future: Iterable | None = None, by_request: bool = False):
        super().__init__()
        if future is None:
            raise BadInput(
                "policy", self.name, "needs the future of a trace; only replays have one"
            )
        self.by_request = by_request
        self._now = 0  # position of the access or request under way
        self._uses: dict[int, array] = defaultdict(lambda: array("q"))  # last use first
        try:
            for position, contents in enumerate(future):
                for content in contents if by_request else (contents,):
                    self._uses[content].append(position)
        except TypeError as error:
            raise told_wrongly("lists of contents" if by_request else "contents", error) from error
        for uses in self._uses.values():
            uses.reverse()

    def next_use(self, content: int | None) -> int:
        """Position of the first use after now; NEVER if there is none."""
        uses = self._uses.get(content, ())
        while uses and uses[-1] <= self._now:
            uses.pop()
        return uses[-1] if uses else NEVER

    def priority(self, meta):
        return -self.next_use(meta.content), -meta.depth, meta.last

    def add(self, meta):
        super().add(meta)
        self._advance()

    def touch(self, meta):
        super().touch(meta)
        self._advance()

    def _advance(self):
        if not self.by_request:
            self._now += 1

    def rescore(self, meta: BlockMeta):
        """Nothing: scores say nothing about the future."""

    def tick(self, step):
        if self.by_request:
            self._now += 1
