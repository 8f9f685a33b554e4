"""Flat accounting: every block of a trace on its own, in file order, through ledger and policy."""

from __future__ import annotations

import numpy as np

from kvlab.blocks import BlockLedger
from kvlab.core import BlockId
from kvlab.sim.outcome import HIT, MISS, Outcome
from kvlab.sim.trace import Trace


class Flat:
    """Runs pieces of a trace; state stays between them, so that a stream is one run."""

    def __init__(self, ledger: BlockLedger):
        self.ledger = ledger
        self.where: dict[int, BlockId] = {}

    def run(self, piece: Trace) -> Outcome:
        """Runs of hits and runs of misses go to the ledger in one call each.

        A run of misses ends before a block that is resident when the run begins, or comes twice:
        the run itself may evict it.
        """
        where, touch, admit = self.where, self.ledger.touch, self.ledger.admit
        contents = piece.ids.tolist()
        missed, evicted = [], []
        at, end = 0, len(contents)
        while at < end:
            hits = []
            while at < end and (block := where.get(contents[at])) is not None:
                hits.append(block)
                at += 1
            if hits:
                touch(hits)
            fresh: dict[int, None] = {}
            begin = at
            while at < end and (content := contents[at]) not in where and content not in fresh:
                fresh[content] = None
                at += 1
            if fresh:
                missed.extend(range(begin, at))
                blocks, gone = admit(list(fresh))
                where.update(zip(fresh, blocks))
                for content in gone:
                    del where[content]
                evicted += gone
        return _outcome(piece, missed, evicted)

    def more(self) -> dict:
        return {}


def _outcome(piece: Trace, missed: list[int], evicted: list[int]) -> Outcome:
    """Once the cache is full each miss evicts one block, so the last misses are theirs."""
    code = np.full(piece.accesses, HIT, dtype=np.uint8)
    missed = np.array(missed, dtype=np.int64)
    code[missed] = MISS
    at = missed[len(missed) - len(evicted) :]
    return Outcome(code, np.array(evicted, dtype=np.int64), at)
