"""Flat accounting: every block of a trace on its own, in file order, through ledger and policy."""

from __future__ import annotations

import numpy as np

from kvlab.blocks import BlockLedger
from kvlab.core import BlockId
from kvlab.sim.outcome import HIT, MISS, Outcome
from kvlab.sim.trace import Trace


class Flat:
    """Runs pieces of a trace; state stays between them, so that a stream is one run.

    Runs of hits and runs of misses go to the ledger in one call each: a million accesses a second
    leave no time for more calls. Nothing asks the policy anything between the accesses of a run.
    """

    def __init__(self, ledger: BlockLedger):
        self.ledger = ledger
        self.where: dict[int, BlockId] = {}

    def run(self, piece: Trace) -> Outcome:
        """A run of misses ends before a block that is resident as the run begins, or comes twice:
        the run itself may evict it."""
        find, touch = self.where.get, self.ledger.touch
        runs: list[int] = []  # lengths, those of hits negative
        evicted: list[int] = []
        hits: list[BlockId] = []
        fresh: dict[int, None] = {}
        for content in piece.ids.tolist():
            block = find(content)
            if block is None and content not in fresh:
                if hits:
                    touch(hits)
                    runs.append(-len(hits))
                    hits = []
                fresh[content] = None
                continue
            if fresh:
                runs.append(len(fresh))
                evicted += self._enter(fresh)
                fresh = {}
                block = find(content)
                if block is None:
                    fresh[content] = None
                    continue
            hits.append(block)
        touch(hits)
        evicted += self._enter(fresh)
        return _outcome([*runs, -len(hits), len(fresh)], evicted)

    def _enter(self, fresh: dict[int, None]) -> list[int]:
        """Admit contents that missed; the contents that left for them, in order."""
        where = self.where
        blocks, gone = self.ledger.admit(list(fresh))
        where.update(zip(fresh, blocks))
        for content in gone:
            del where[content]
        return gone

    def more(self) -> dict:
        return {}


def _outcome(runs: list[int], evicted: list[int]) -> Outcome:
    """Once the cache is full each miss evicts one block, so the last misses are theirs."""
    lengths = np.array(runs, dtype=np.int64)
    code = np.repeat(np.where(lengths > 0, MISS, HIT).astype(np.uint8), np.abs(lengths))
    missed = np.flatnonzero(code == MISS)
    at = missed[len(missed) - len(evicted) :]
    return Outcome(code, np.array(evicted, dtype=np.int64), at)
