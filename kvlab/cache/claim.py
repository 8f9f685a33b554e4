"""What a sequence of one layer group claims, and axis prefix=none: it holds its blocks alone."""

from __future__ import annotations

import weakref

from kvlab.blocks import Chain
from kvlab.core import BlockId, SeqId
from kvlab.source import Extent


class Claim:
    """What one sequence has of the shared blocks, and what is set aside for it.

    chain     its tokens, as far as they are known
    kept      pinned blocks behind a gap: they take their place when the gap has been computed
    reserved  blocks allocated ahead
    guarded   pinned while a sequence is opened, or making room might take what it begins with
    coming    host keys of blocks on their way back, by logical index
    prompt    whole blocks of the prompt, which becomes known in one go; 0 without a prompt
    settled   leading whole blocks that are known or refused
    clean     leading tokens computed with no hole before them
    """

    __slots__ = (
        "chain", "kept", "guarded", "reserved", "reserving", "coming", "prompt", "settled",
        "clean",
    )  # fmt: skip

    def __init__(self, chain: Chain | None, prompt: int = 0, clean: int = 0):
        self.chain, self.prompt, self.clean = chain, prompt, clean
        self.kept: dict[int, BlockId] = {}
        self.guarded: list[BlockId] = []
        self.reserved: list[BlockId] = []
        self.coming: dict[int, int] = {}
        self.reserving, self.settled = False, 0


class Alone:
    """Axis prefix=none: a block belongs to its sequence and leaves with it.

    group: the `LayerGroup` whose sequences these are.
    """

    hold = False  # whether running sequences keep their blocks

    def __init__(self, group):
        # weakly: a cache that is let go gives its bytes back at once, not at the next collection
        self.group, self.ledger = weakref.proxy(group), group.ledger
        self.claims: dict[SeqId, Claim] = {}

    # ---- a sequence comes and goes

    def found(self, chain: Chain | None) -> list[BlockId | None]:
        """Block of each whole block of the chain, None where it is not held."""
        return []

    def open(self, seq: SeqId, chain: Chain | None, hit: int) -> list[BlockId]:
        """The first `hit` whole blocks of the chain, which `found` has seen."""
        self.claims[seq] = Claim(chain)
        return []

    def reach(self, chain: Chain | None) -> int:
        """Leading whole blocks of the chain that are on the device or in host memory."""
        return 0

    def bring(self, seq: SeqId, first: int, stop: int) -> None:
        """Append logical blocks [first, stop), known here or there; their room is reserved."""

    def reserve(self, seq: SeqId, first: int, stop: int) -> None:
        """Set blocks aside for logical blocks [first, stop). Raises `OutOfBlocks`."""
        claim = self.claims[seq]
        missing = [i for i in range(first, stop) if i not in claim.kept]
        claim.reserved = self.group.allocate(seq, len(missing), self.coming(seq, missing))
        claim.reserving = stop > first

    def fork(self, parent: SeqId, child: SeqId, chain: Chain | None) -> None:
        """chain: a copy of the parent's, the same for all layer groups."""
        source = self.claims[parent]
        claim = self.claims[child] = Claim(chain, source.prompt, source.clean)
        claim.settled = source.settled

    def crop(self, seq: SeqId, length: int, exact: bool) -> None:
        """Tokens from `length` on are forgotten; a cut block opened again, `exact` or rounded."""

    def leave(self, seq: SeqId) -> None:
        """A sequence is about to be closed; its blocks are still in the table."""

    def close(self, seq: SeqId) -> None:
        """Give back what was set aside; the blocks of the table are gone already."""
        claim = self.claims.pop(seq)
        self.ledger.unpin(list(claim.kept.values())[::-1])
        self.ledger.free(claim.reserved)

    def opened(self, seq: SeqId) -> None:
        """All that a sequence begins with is in its table."""

    def ended(self) -> None:
        """A sequence was closed."""

    # ---- a step

    def wanted(self, seq: SeqId, first: int, stop: int, whole: int) -> list[int]:
        """Which of the logical blocks [first, stop) have to be allocated.

        whole: blocks below it are sealed within the step, so a kept one can take its place.
        """
        claim = self.claims[seq]
        own = [i for i in range(first, stop) if i >= whole or i not in claim.kept]
        return own[len(claim.reserved) :]

    def coming(self, seq: SeqId, logical: list[int]) -> list[int]:
        """Contents that these logical blocks will hold, the last first, as far as known."""
        return []

    def take(
        self, seq: SeqId, first: int, stop: int, whole: int
    ) -> tuple[list[BlockId], frozenset[BlockId]]:
        """Blocks for logical [first, stop), and which of them are kept ones, sealed already."""
        claim = self.claims[seq]
        adopted = {i: claim.kept[i] for i in range(first, min(stop, whole)) if i in claim.kept}
        short = self.wanted(seq, first, stop, whole)
        own = claim.reserved + self.group.allocate(seq, len(short), self.coming(seq, short))
        count = stop - first - len(adopted)
        claim.reserved = own[count:]
        rest = iter(own[:count])
        ids = [adopted[i] if i in adopted else next(rest) for i in range(first, stop)]
        return ids, frozenset(adopted.values())

    def give_back(self, seq: SeqId, ids: list[BlockId]) -> None:
        """Blocks that `take` gave and a failed step did not need."""
        claim = self.claims[seq]
        if claim.reserving:
            claim.reserved = ids + claim.reserved
        else:
            self.ledger.free(ids)

    def sealed(self, e: Extent) -> None:
        """The step's full blocks are read-only from now on and in the table."""
        first = e.past // self.group.block_size
        self.ledger.seal(e.sealing, depth=range(first, first + len(e.sealing)))

    def end_step(self) -> None:
        """All sequences of a step are done."""
        self.ledger.tick()

    # ---- blocks

    def owns(self, block: BlockId) -> bool:
        """Whether a block outlives the sequences that use it."""
        return False

    @property
    def known(self) -> set[BlockId]:
        """Blocks that can be found."""
        return set()

    def make_host_room(self, count: int) -> bool:
        """Whether `count` blocks that leave can be kept; `OutOfHost` where they must be."""
        self.group.away.shelf.require(count)
        return True

    def spilled(self, keys: dict[BlockId, int]) -> None:
        """Where in host memory the blocks that `gone` named are, if they are."""

    @property
    def waiting(self) -> list[int]:
        """Host keys of known blocks."""
        return []

    def forget_host(self) -> None:
        """Forget known blocks in host memory."""

    def gone(self, victims: list[BlockId]) -> None:
        """The policy chose these blocks."""

    def extra(self) -> set[BlockId]:
        """Held blocks that may be in no table."""
        ahead = {b for c in self.claims.values() for b in c.reserved}
        return ahead | {b for c in self.claims.values() for b in c.kept.values()}

    @property
    def reserved_count(self) -> int:
        return sum(len(c.reserved) for c in self.claims.values())
