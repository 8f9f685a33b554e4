"""What one step does to one sequence, and what a sequence begins with: plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvlab.core import BlockId, SeqId


@dataclass(slots=True)
class Step:
    """What one step does to one sequence, in one layer group. Undone by `Holding.abort`, until
    `Holding.commit` makes it part of the sequence.

        past    tokens before the step: [0, past)
        fill    of them in the open tail block: [past - fill, past)
        count   new tokens: [past, past + count)
        sealing blocks that are full after the step, the old tail first if it is among them
        rest    open block after the step, holding the last `rest_count` tokens; None if none
        adopted blocks of `sealing` that hold these very tokens already: they are not written
        ahead   blocks that were set aside for the sequence before, the first of its own
        saw_all whether its tokens saw all tokens before them, in every layer of the model
    """

    seq: SeqId
    past: int
    fill: int
    count: int
    tail: BlockId | None
    new: list[BlockId]
    sealing: list[BlockId]
    rest: BlockId | None
    rest_count: int
    adopted: frozenset[BlockId] = frozenset()
    ahead: int = 0
    saw_all: bool = True

    @property
    def single(self) -> bool:
        """A decode step: its token goes to an open block, which is sealed in `commit` if full."""
        return self.count == 1

    @property
    def stored(self) -> list[BlockId]:
        """Blocks that the step seals."""
        if not self.adopted:
            return self.sealing
        return [b for b in self.sealing if b not in self.adopted]

    @property
    def own(self) -> list[BlockId]:
        """Blocks that were allocated for the step."""
        return [b for b in self.new if b not in self.adopted] if self.adopted else self.new

    @property
    def writing(self) -> BlockId:
        """The open block that a single token goes to."""
        return self.tail if self.fill else self.new[0]


class Opened(NamedTuple):
    """What a sequence begins with, by whole blocks of its prompt.

    near: leading blocks that were held on the device; hit: leading blocks that it begins with, the
    rest of them from the host. found: block of each whole block, None where the device has none.
    away: indices of blocks that the host tier had, in the run that leads and behind it.
    evicted: contents that left the device for its room, in order.
    """

    near: int
    hit: int
    found: list[BlockId | None]
    away: list[int]
    evicted: list[int]
