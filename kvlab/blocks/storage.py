"""What stands behind block ids: the port through which the request protocol moves bytes."""

from __future__ import annotations

from kvlab.blocks.step import Step
from kvlab.blocks.table import BlockTable
from kvlab.core import BlockId, SeqId

Holes = list[tuple[SeqId, list[int]]]  # logical indices of each sequence


class NoStorage:
    """Nothing: ids alone, as the simulator has them. The null member, and the contract.

    A subclass with bytes answers these calls; it holds no reference to who calls it, but the block
    tables of the sequences, which the caller keeps. Where not said otherwise a call does not fail.
    Host keys are the storage's own; each has holders, and lives until its last holder lets it go.
    """

    opens_single = False  # whether a single token goes to an open block, never to a known one
    exact = True  # whether a sealed block can be opened again without rounding

    def __init__(self):
        self.tables: dict[SeqId, BlockTable] = {}

    # ---- a step

    def take(self, step: Step) -> None:
        """All memory that the step's blocks need. May raise what the allocator raises; `undo`
        follows then."""

    def undo(self, step: Step) -> None:
        """The step is none; its own blocks are freed after this."""

    def seal(self, step: Step) -> None:
        """The step's full blocks are read-only from now on, and in the sequence's table."""

    # ---- sequences

    def open(self, seq: SeqId) -> None:
        """A sequence without tokens."""

    def close(self, seq: SeqId) -> None:
        """Its blocks are freed before this."""

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """`child`, open already, has what its parent has; sealed blocks are shared."""

    def place(self, seq: SeqId, length: int) -> int:
        """Where in the table the first `length` tokens of a sequence end. Raises `KvlabError` where
        some of them were given up and others not."""
        return length

    def crop(self, seq: SeqId, whole: int, fill: int) -> None:
        """Only `whole` blocks and `fill` tokens of the next one stay."""

    def copy_tail(self, tail: BlockId, block: BlockId, fill: int) -> None:
        """The first `fill` tokens of an open block, in another. May raise; nothing changes then."""

    def lift(self, seq: SeqId, index: int, block: BlockId | None, fill: int) -> object:
        """The first `fill` tokens of a sealed block that is to be opened again: copies.

        block: where it is on the device; None: it lies on the host as the sequence's own, which
        is forgotten there.
        """

    def put_down(self, seq: SeqId, index: int, block: BlockId, contents: object) -> None:
        """What `lift` gave, as the first tokens of an open block."""

    # ---- blocks that leave and come back

    def require(self, count: int) -> None:
        """Take the host memory that `count` more blocks need. Raises where there is none, before
        anything has changed."""

    def spill(self, blocks: list[BlockId], holes: Holes) -> list[int]:
        """Copy sealed or leaving blocks to the host; a key for each, held by the caller, or no
        keys at all where there is no host.

        holes: where sequences lose these blocks, which their tables still name.
        """
        return []

    def fetch(self, keys: list[int], blocks: list[BlockId]) -> None:
        """Copy back into open blocks, every bit as it was; the keys stay."""

    def let_go(self, keys: list[int]) -> None:
        """One holder less for each key."""

    def has(self, seq: SeqId, index: int) -> bool:
        """Whether what is a hole in the sequence's table can be read on the host."""
        return False

    def recall(self, wanted: list[tuple[SeqId, int]], blocks: list[BlockId]) -> None:
        """Blocks (sequence, index) that `has` are on the device again, in these open blocks."""

    def drop(self, blocks: list[BlockId]) -> None:
        """These blocks are free: their bytes go, and their ids will mean other contents."""

    def expire(self, seq: SeqId, indices: list[int], blocks: list[BlockId]) -> None:
        """These blocks of a sequence are about to leave for good, by its window."""

    def leave_behind(self, seq: SeqId, blocks: int) -> None:
        """The first `blocks` blocks of a sequence are never read again, wherever they are."""

    def prune(self) -> None:
        """Blocks have left: what belonged to nothing else can go."""
