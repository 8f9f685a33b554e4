"""A new leader is told of the blocks that are there, the least recent first. Bound to its verbs."""

from __future__ import annotations

from kvlab.policy import USES_TOLD
from kvlab.sim.compiled import verbs as p  # those of policies are given by `bind`
from kvlab.sim.compiled.state import NOW


def refill(s, blocks, hits, last):
    """blocks [N], their touches since they came, and the steps of the last ones."""
    now = s.book[NOW]
    for i in range(len(blocks)):
        s.book[NOW] = last[i]
        if p.COUNTS:
            p.admit(s, blocks[i], -1, hits[i])
        else:
            p.add(s, blocks[i], -1)
            for _ in range(min(hits[i], USES_TOLD)):
                p.touch(s, blocks[i], -1)
    s.book[NOW] = now
