"""Flat accounting: every block of a trace on its own, in file order, through ledger and policy."""

from __future__ import annotations

import numpy as np

from kvlab.blocks import BlockLedger
from kvlab.core import BlockId
from kvlab.sim.outcome import HIT, MISS, Outcome
from kvlab.sim.trace import Trace


class TraceLedger(BlockLedger):
    """A ledger with one more verb, for the loop in which every miss takes the victim's place."""

    def renew(self, content: int) -> tuple[BlockId, int]:
        """reclaim(1), free, allocate(1) and seal(content) in one, for a ledger that is full.

        Returns the block and the content that it gave up. The freed id is the only one, so it is
        the one that `allocate` gives; the events are those of the four verbs.
        """
        id = self.policy.pop()
        meta = self._metas[id]
        old, meta.content = meta.content, content
        self.now = meta.born = meta.last = self.now + 1
        meta.hits, meta.score = 0, 0.0
        self.policy.add(meta)
        if self.events:
            row = (id, content, meta.depth, meta.level, meta.cost, meta.size)
            for event in (("reclaim", 1, [id]), ("free", [id]), ("allocate", [id])):
                self.events(event)
            self.events(("seal", [row]))
        return id, old


class Flat:
    """Runs pieces of a trace; state stays between them, so that a stream is one run."""

    def __init__(self, ledger: TraceLedger):
        self.ledger = ledger
        self.where: dict[int, BlockId] = {}

    def run(self, piece: Trace) -> Outcome:
        """Touch every id in file order. Hits are told to the policy before the next miss: nothing
        asks it anything in between."""
        ledger, where = self.ledger, self.where
        find, renew, touch = where.get, ledger.renew, ledger.touch
        room = ledger.free_count
        hits, missed, evicted = [], [], []
        for at, content in enumerate(piece.ids.tolist()):
            block = find(content)
            if block is not None:
                hits.append(block)
                continue
            missed.append(at)
            if hits:
                touch(hits)
                hits = []
            if room:
                room -= 1
                where[content] = self._fill(content)
            else:
                where[content], old = renew(content)
                del where[old]
                evicted.append(old)
        touch(hits)
        return self._outcome(piece, missed, evicted)

    def _fill(self, content: int) -> BlockId:
        ids = self.ledger.allocate(1)
        self.ledger.seal(ids, (content,))
        return ids[0]

    @staticmethod
    def _outcome(piece: Trace, missed: list[int], evicted: list[int]) -> Outcome:
        """Once the cache is full each miss evicts one block, so the last misses are theirs."""
        code = np.full(piece.accesses, HIT, dtype=np.uint8)
        missed = np.array(missed, dtype=np.int64)
        code[missed] = MISS
        at = missed[len(missed) - len(evicted) :]
        return Outcome(code, np.array(evicted, dtype=np.int64), at)
