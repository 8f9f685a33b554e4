"""Recorded verbs of a ledger, run again: the proof that two runs make the same choices.

events = []
ledger = BlockLedger(capacity, policy, events=events.append)
...                                     # a live run
replay(events, BlockLedger(capacity, fresh_policy))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvlab.blocks.ledger import BlockLedger
from kvlab.core import BlockId


class Difference(NamedTuple):
    """Where a replay first parted from the recording."""

    event: int  # index of the event
    verb: str
    recorded: list[BlockId]
    replayed: list[BlockId]


def victims(events: Iterable[tuple]) -> list[BlockId]:
    """All blocks that the policy chose in a recording, in order."""
    return [id for event in events if event[0] in ("reclaim", "begin") for id in event[-1]]


def replay(events: Iterable[tuple], ledger: BlockLedger) -> Difference | None:
    """Repeat recorded verbs on a fresh ledger; None if it gives out and evicts the same blocks.

    Stops at the first difference, since later ids mean other blocks from there on.
    """
    for index, (verb, *arguments) in enumerate(events):
        recorded, replayed = _repeat(ledger, verb, arguments)
        if recorded != replayed:
            return Difference(index, verb, recorded, replayed)
    return None


def _repeat(ledger, verb, arguments):
    """Blocks that a verb returned in the recording, and now."""
    if verb == "allocate":
        ids, owner = arguments
        return ids, ledger.allocate(len(ids), owner)
    if verb == "reclaim":
        count, coming, ids = arguments
        return ids, ledger.reclaim(count, coming)
    if verb == "begin":
        moment, ids = arguments
        return ids, ledger.begin(moment)
    if verb == "admit":
        contents, ids = arguments
        return ids, ledger.admit(contents)[0]
    if verb == "seal":
        ids, *facts = zip(*arguments[0]) if arguments[0] else ((),)
        ledger.seal(ids, *facts)
    else:
        getattr(ledger, verb)(*arguments)
    return [], []
