"""Requests that are over before the next one comes: all that a ledger does for one, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvlab.blocks.ledger import BlockLedger
from kvlab.blocks.states import SEALED
from kvlab.core import BlockId, OutOfBlocks


class Facts(NamedTuple):
    """Of blocks to be sealed, one value a block of each; the deepest first."""

    names: Sequence[int]
    depths: Sequence[int]
    parents: Sequence[int | None]
    costs: Sequence[float]


class Passed(NamedTuple):
    """Blocks that are new, the deepest first; the contents of those that left, whose ids are taken
    again: blocks leave only where all free ones are wanted."""

    new: list[BlockId]
    gone: list[int]


def passes(ledger: BlockLedger, used: Sequence[BlockId]) -> bool:
    """Whether `pass_by` is for this ledger and these blocks: nobody records its verbs, and nobody
    else has a pin on them."""
    metas = ledger.register.metas
    return not (ledger.events or ledger.weighed or sum([metas[id].pins for id in used]))


def pass_by(
    ledger: BlockLedger, used: Sequence[BlockId], facts: Facts, coming: Sequence[int]
) -> Passed:
    """`pin` the sealed blocks `used`, head first, `reclaim` and `free` what is short, `allocate`
    and `seal` blocks of `facts`, `touch` and `unpin` those used, tail first, and `tick`.

    The policy hears what it would hear of these verbs, in the same order; what no policy sees
    between them (pins, states, owners) is left out. coming: as in `reclaim`, of all new blocks.
    Raises `OutOfBlocks`, nothing being done.
    """
    policy, register, count = ledger.policy, ledger.register, len(facts.names)
    metas = register.metas
    held = [metas[id] for id in used]
    policy.hold_all(held)
    try:
        free = ledger.free_count
        short = 0 if free is None else max(0, count - free)
        if short > len(policy):
            raise OutOfBlocks(count, free, ledger.capacity)
        victims = policy.pop_all(short, coming[-short:]) if short else []
    except BaseException:
        policy.release_all(held)
        raise
    gone = [metas[id].content for id in victims]
    new = register.exchange(victims, count)
    now = _seal([metas[id] for id in new], facts, policy, ledger.now)
    held.reverse()
    for meta in held:
        now += 1
        meta.last = now
        meta.hits += 1
    policy.touch_all(held)
    policy.release_all(held)
    ledger.now = now + 1
    policy.tick(now + 1)
    return Passed(new, gone)


def _seal(metas, facts: Facts, policy, now: int) -> int:
    rows = zip(metas, facts.names, facts.depths, facts.parents, facts.costs)
    for meta, meta.content, meta.depth, meta.parent, meta.cost in rows:
        now += 1
        meta.born = meta.last = now
        meta.hits, meta.score, meta.state, meta.owner = 0, 0.0, SEALED, None
    policy.add_all(metas)
    return now
