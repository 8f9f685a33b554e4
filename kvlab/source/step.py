"""What one step does to one sequence, and the pieces in which the past is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kvlab.core import BlockId, SeqId


class Piece(NamedTuple):
    """Sealed blocks that are read at a time.

    start   position of the first token
    blocks  their ids, in order
    gap     tokens evicted between these and the end of the past
    ids     the blocks for the kernels, see `BlockPool.ids`
    """

    start: int
    blocks: list[BlockId]
    gap: int = 0
    ids: Tensor | None = None


@dataclass(slots=True)
class Extent:
    """What one step does to one sequence; computed once, used by every layer.

        past    tokens before the step: [0, past)
        fill    of them in the open tail block: [past - fill, past)
        count   new tokens: [past, past + count)
        sealing blocks that are full after the step, the old tail first if it is among them
        rest    open block after the step, holding the last `rest_count` tokens; None if none
        adopted blocks of `sealing` that hold these very tokens already: they are not written
        saw_all whether its tokens saw all tokens before them, in every layer of the model
        pieces  how the past is read, for each sliding window that a layer of the model has
        away    the same of what lies in host memory, with keys instead of block ids
        alone   whether no other sequence is read in between, from layer to layer
        chosen  blocks for the tokens that stay, each head's own; None where all of them do
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
    saw_all: bool = True
    sealing_ids: Tensor | None = None
    pieces: dict[int | None, list[Piece]] = field(default_factory=dict)
    away: dict[int | None, list[Piece]] = field(default_factory=dict)
    alone: bool = False
    chosen: list[BlockId] | None = None
    held_ids: Tensor | None = None

    @property
    def single(self) -> bool:
        """A decode step: its token goes to an open block, which is sealed in `commit` if full."""
        return self.count == 1

    @property
    def stored(self) -> list[BlockId]:
        """Blocks that the step seals."""
        return [b for b in self.sealing if b not in self.adopted]

    def without_adopted(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens [n*S, H, D] of `sealing`, those of `stored`."""
        if not self.adopted:
            return k, v
        keep = [i for i, block in enumerate(self.sealing) if block not in self.adopted]
        size = k.shape[0] // len(self.sealing)
        return tuple(x.unflatten(0, (-1, size))[keep].flatten(0, 1) for x in (k, v))

    @property
    def writing(self) -> BlockId:
        """The open block that a single token goes to."""
        return self.tail if self.fill else self.new[0]
