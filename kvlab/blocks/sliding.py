"""What windows do to the blocks of a sequence: pins that move with its end, blocks let go.

Two windows meet here: the one of axis `window`, and the model's own (`Holding.reach`: which
tokens a query sees, as in `first_seen`), beyond which no query looks again. Functions over a
`Holding`.
"""

from __future__ import annotations

from kvlab.blocks.claim import Claim
from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.states import SEALED
from kvlab.core import BlockId, KvlabError, SeqId, first_seen
from kvlab.window import Range

SPARE = 32  # tokens kept behind the reach, for those who take back what they have just drafted


def slide(holding, seq: SeqId) -> None:
    """Move the windows' pins to the end of the sequence; free what it can never read again.

    Most steps move them within a block and change nothing: those do not look at the table, which
    grows with every block seen.
    """
    table, claim, window = holding.tables[seq], holding.claims[seq], holding.window
    first = max(0, first_seen(table.length, holding.reach) - SPARE)
    protected = _from(first, [*window.protected(table.length), *_residual(holding, table.length)])
    readable = _from(first, window.readable(table.length))
    spans = table.spans(protected), table.spans(readable)
    if claim.slid == (table.changes, spans):
        return
    if protected or claim.pinned:
        _pin(holding.ledger, claim, table.touched(protected))
    if readable != [(0, table.length)]:
        _free_unreadable(holding, seq, table.touched(readable))
        blocks = first // holding.block_size
        claim.let_go = max(claim.let_go, blocks * holding.block_size)
        holding.storage.leave_behind(seq, blocks)
    claim.slid = table.changes, spans


def _residual(holding, length: int) -> list[Range]:
    """The tokens that are read as computed, as a window has them."""
    if not holding.residual:
        return []
    return [(max(0, length // holding.block_size * holding.block_size - holding.residual), length)]


def _from(first: int, ranges: list[Range]) -> list[Range]:
    """Those parts of token `ranges` that do not lie before `first`."""
    return [(max(begin, first), end) for begin, end in ranges if end > first] if first else ranges


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
    holding.storage.prune()
    holding.room.evictions += len(gone)


def check_back(holding, seq: SeqId, length: int) -> None:
    """Raises `KvlabError` if behind `length` tokens the next one would see what was let go."""
    claim = holding.claims[seq]
    if length and claim.let_go and first_seen(length, holding.reach) < claim.let_go:
        raise KvlabError(
            f"cannot crop to {length} tokens: the model's sliding window of {abs(holding.reach)} "
            f"would reach back to the first {claim.let_go}, which it had left behind"
        )
    if not length:
        claim.let_go = 0


def check_reach(holding, seq: SeqId, past: int, window: int | None) -> None:
    """Raises `KvlabError` if a token behind `past` others would see what was let go."""
    gone = holding.claims[seq].let_go
    if gone and first_seen(past, window) < gone:
        raise KvlabError(
            f"this forward asks a layer for more than the sliding window of {abs(holding.reach)} "
            f"tokens that its model has, and the first {gone} tokens were let go"
        )
