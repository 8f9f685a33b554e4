"""Axis prefix=none at work: what a sequence computes is its own and leaves with it."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.blocks.ground import Ground
from kvlab.blocks.known import NothingKnown
from kvlab.blocks.room import Exit, Room
from kvlab.blocks.step import Step
from kvlab.core import SeqId


class Alone:
    """What a member of axis prefix says to the life of a sequence; this one says nothing.

    known: what can be found. room: who makes room, and how blocks leave for it.
    """

    hold = False  # whether running sequences keep their blocks
    shares = False

    def __init__(self, ground: Ground):
        self.ground, self.known = ground, NothingKnown()
        self.room = Room(ground, Exit(ground))

    # ---- a sequence comes

    def enter(self, seq: SeqId, near: int) -> None:
        """It starts with the first `near` whole blocks of its chain, which are held. What was found
        is safe until `settle`, at least."""

    def claim_away(self, seq: SeqId, first: int, count: int) -> None:
        """`count` blocks from logical block `first` on are about to be set aside for it."""

    def bring(self, seq: SeqId, first: int, stop: int) -> None:
        """Append logical blocks [first, stop), known here or there; their room is reserved."""

    def settle(self, seq: SeqId) -> None:
        """All that a sequence begins with is in its table."""

    def coming(self, seq: SeqId, logical: Sequence[int]) -> list[int]:
        """Contents that these logical blocks will hold, the last first, as far as known."""
        return []

    # ---- it computes

    def sealed(self, step: Step, publish: bool) -> None:
        """The step's full blocks are read-only from now on and in the table."""
        if step.sealing:
            first = step.past // self.ground.block_size
            self.ground.ledger.seal(step.sealing, depth=range(first, first + len(step.sealing)))

    def publish(self, seq: SeqId) -> None:
        """Make known what a sequence holds and nobody knows."""

    def end_step(self) -> None:
        """All sequences of a step are done."""
        self.ground.ledger.tick()

    # ---- it shrinks, goes

    def forget_tokens(self, seq: SeqId, length: int, exact: bool) -> None:
        """Tokens from `length` on are forgotten; a cut block opened again, `exact` or rounded."""

    def leave(self, seq: SeqId, done: bool) -> None:
        """A sequence is about to be closed; its blocks are still in the table."""

    def left(self) -> None:
        """A sequence that ran is closed."""
