"""What becomes of known blocks when the model that computed them is no longer the same."""

from __future__ import annotations

from collections.abc import Mapping

from kvlab.blocks import Chain, PrefixIndex
from kvlab.cache.claim import Alone
from kvlab.core import BlockId, SeqId


class CutOff(Chain):
    """The tokens of a sequence that may not be known to others: none are, ever.

    outdated: since it began under another identity.
    """

    __slots__ = ("outdated",)

    def __init__(self, block_size: int, outdated: bool = False):
        super().__init__("", block_size)
        self.outdated = outdated

    def copy(self):
        return CutOff(self.block_size, self.outdated)

    def tell(self, at, token_ids):
        """What two models or unknown inputs computed is the prefix of no other."""


class Renewable(Alone):
    """The part of axis prefix=hash that lets an identity end.

    orphans: blocks known under an earlier identity that running sequences still read. Nothing
    finds them, and they are freed when the last of these sequences lets them go.
    """

    def __init__(self, group, identity: str):
        super().__init__(group)
        self.orphans: set[BlockId] = set()
        self.begin_anew(identity)

    def begin_anew(self, identity: str) -> None:
        """An index that knows nothing."""
        self.index = PrefixIndex(identity, self.group.block_size)
        self._last: tuple = (None, [])  # the latest lookup and what it was made from
        self.left: dict[int, None] = {}  # contents that were evicted, the latest last
        self.refused: dict[int, None] = {}  # contents computed behind a hole

    def renew(self, identity: str, chains: Mapping[SeqId, Chain]) -> None:
        """What is known is found no more; running sequences go on as `chains`, and alone."""
        self.forget_host()
        for seq in self.claims:
            self.cut_off(seq, chains[seq])
        self.orphans |= self.index.blocks
        self.begin_anew(identity)
        self.sweep()

    def cut_off(self, seq: SeqId, chain: Chain) -> None:
        """A sequence goes on as `chain`, without the known blocks behind what it has computed."""
        claim = self.claims[seq]
        self.ledger.unpin(list(claim.kept.values())[::-1])
        claim.kept, claim.chain, claim.prompt = {}, chain, 0

    def sweep(self) -> None:
        """Free the orphans that nobody reads any more."""
        if self.orphans:
            idle = self.group.idle(self.orphans)
            self.orphans.difference_update(idle)
            self.group.free(idle)

    def gone(self, victims):
        self.orphans.difference_update(victims)

    def ended(self):
        self.sweep()

    def end_step(self):
        super().end_step()
        self.sweep()

    def extra(self):
        return super().extra() | self.index.blocks | self.orphans
