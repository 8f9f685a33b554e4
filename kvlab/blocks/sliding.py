"""What a window does to the blocks of a sequence: pins that move with its end, blocks let go."""

from __future__ import annotations

from kvlab.blocks.claim import Claim
from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.states import SEALED
from kvlab.core import BlockId, SeqId


def slide(holding, seq: SeqId) -> None:
    """Move the window's pins to the end of the sequence; free what it can never read again.

    Most steps move it within a block and change nothing: those do not look at the table, which
    grows with every block seen.
    """
    table, claim, window = holding.tables[seq], holding.claims[seq], holding.window
    protected, readable = window.protected(table.length), window.readable(table.length)
    spans = table.spans(protected), table.spans(readable)
    if claim.slid == (table.changes, spans):
        return
    if protected or claim.pinned:
        _pin(holding.ledger, claim, table.touched(protected))
    if readable != [(0, table.length)]:
        _free_unreadable(holding, seq, table.touched(readable))
    claim.slid = table.changes, spans


def _pin(ledger: BlockLedger, claim: Claim, safe: set[BlockId]) -> None:
    keep = {b for b in safe if ledger.state(b) == SEALED}
    ledger.pin(sorted(keep - claim.pinned))
    ledger.unpin(sorted(claim.pinned - keep))
    claim.pinned = keep


def _free_unreadable(holding, seq: SeqId, readable: set[BlockId]) -> None:
    table = holding.tables[seq]
    gone = [i for i, b in enumerate(table.ids) if b is not None and b not in readable]
    holding.storage.expire(seq, gone, [table.ids[i] for i in gone])
    holding.release(seq, [table.punch(i) for i in reversed(gone)])
    holding.storage.prune(holding.tables)
    holding.evictions += len(gone)
