"""What one step does to one sequence, and the pieces in which the past is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from kvlab.blocks import Step
from kvlab.core import BlockId


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
class Extent(Step):
    """The same with tensors; computed once, used by every layer.

        pieces  how the past is read, for each sliding window that a layer of the model has
        away    the same of what lies in host memory, with keys instead of block ids
        alone   whether no other sequence is read in between, from layer to layer
        chosen  blocks for the tokens that stay, each head's own; None where all of them do
        keep    of them for a head, on average; old: the sealed blocks before such a step
        waiting layers of such a step that attended, and are chosen among together
        recent  places of the newest whole blocks before the step, which are read as computed
    """

    sealing_ids: Tensor | None = None
    pieces: dict[int | None, list[Piece]] = field(default_factory=dict)
    away: dict[int | None, list[Piece]] = field(default_factory=dict)
    alone: bool = False
    chosen: list[BlockId] | None = None
    keep: int = 0
    old: list[BlockId] = field(default_factory=list)
    held_ids: Tensor | None = None
    waiting: object = None
    recent: list[int] = field(default_factory=list)

    def stored_blocks(self, size: int) -> int:
        """Leading whole blocks of `size` tokens that are read as stored."""
        return self.past // size - len(self.recent)

    def without_adopted(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens [n*S, H, D] of `sealing`, those of `stored`."""
        if not self.adopted:
            return k, v
        keep = [i for i, block in enumerate(self.sealing) if block not in self.adopted]
        size = k.shape[0] // len(self.sealing)
        return tuple(x.unflatten(0, (-1, size))[keep].flatten(0, 1) for x in (k, v))
