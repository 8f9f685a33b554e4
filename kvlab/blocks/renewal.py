"""What becomes of known blocks when the model that computed them is no longer the same.

These are methods of `Shared`, in a file of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvlab.blocks.chain import Chain
from kvlab.blocks.prefix import PrefixIndex
from kvlab.blocks.reasons import Reasons
from kvlab.core import SeqId


def renew(shared, index: PrefixIndex, chains: Mapping[SeqId, Chain]) -> None:
    """What is known is found no more; running sequences go on as `chains`, and alone."""
    shared.tier.clear()
    for seq in shared.claims:
        cut_off(shared, seq, chains[seq])
    shared.orphans |= shared.index.blocks
    shared.index = index
    shared.reasons = Reasons(shared.reasons.most)
    shared.sweep()


def cut_off(shared, seq: SeqId, chain: Chain) -> None:
    """A sequence goes on as `chain`, without the known blocks behind what it has computed."""
    claim = shared.claims[seq]
    shared.ledger.unpin(list(claim.kept.values())[::-1])
    claim.kept, claim.chain, claim.prompt = {}, chain, 0
