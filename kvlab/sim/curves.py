"""One pass over a trace gives the prefix-correct LRU hit count at every capacity.

Prefix-correct LRU keeps a parent at least as recent as its child, so it evicts leaves first and is
a stack algorithm (Mattson et al. 1970): a block hits at capacity C exactly if its stack distance is
at most C. The blocks that a request r shares with an earlier request t as their last use are one
run, and they are the front of what t still has on the stack. So a Fenwick tree over *requests*, not
accesses, gives the distance of a whole run in one query. Valid at and above the longest request:
below it a request is refused, which no stack distance can tell.
"""

from __future__ import annotations

import numpy as np

from kvlab.core import BadInput
from kvlab.sim.trace import Trace


def hit_curve(trace: Trace, partial_blocks: str = "hit") -> tuple[np.ndarray, np.ndarray]:
    """(capacities in blocks, block hits), both int64; the last capacity holds every block.

    Equal to `simulate(trace, "lru", capacity)` at each capacity. Above the last the hits stay.
    """
    capacities, hits = weighted_curve(trace, np.ones(trace.accesses), partial_blocks)
    return capacities, hits.astype(np.int64)


def weighted_curve(trace: Trace, weights: np.ndarray, partial_blocks: str = "hit"):
    """(capacities, summed weight of what hits); weights [A]: tokens, FLOPs, ... of each access."""
    longest = int(np.diff(trace.first).max(initial=0))
    distance = stack_distances(trace)
    if trace.counted is not None:
        weights = weights * trace.counted
    if not_hittable(partial_blocks):
        weights = np.where(partial_access(trace), 0, weights)
    top = max(longest, int(distance.max(initial=0)))
    summed = np.cumsum(np.bincount(distance, weights=weights * (distance > 0), minlength=top + 1))
    return np.arange(longest, top + 1), summed[longest:]


def not_hittable(partial_blocks: str) -> bool:
    """True when a partial last block never hits; checks the setting."""
    if partial_blocks not in ("hit", "miss"):
        raise BadInput("partial_blocks", partial_blocks, "must be 'hit' or 'miss'")
    return partial_blocks == "miss"


def partial_access(trace: Trace) -> np.ndarray:
    """Mask [A] of the accesses to partial blocks."""
    last = trace.depth == np.diff(trace.first)[trace.request_of] - 1
    return last & trace.partial[trace.request_of]


def stack_distances(trace: Trace) -> np.ndarray:
    """Smallest capacity at which each access hits, 0 for the first access to a block; int64 [A]."""
    trace.check_prefix_chained()
    previous, request = trace.previous, trace.request_of
    source = np.where(previous >= 0, request[previous], -1)  # the request that used it last
    new_run = np.ones(trace.accesses, dtype=bool)
    new_run[1:] = (source[1:] != source[:-1]) | (request[1:] != request[:-1])
    begin = np.flatnonzero(new_run)
    length = np.diff(begin, append=trace.accesses)
    above = _blocks_above(
        request[begin].tolist(), source[begin].tolist(), length.tolist(), len(trace)
    )
    within = np.arange(trace.accesses) - np.repeat(begin, length)
    return np.where(
        previous >= 0, np.repeat(np.array(above, dtype=np.int64), length) + within + 1, 0
    )


def _blocks_above(request: list, source: list, length: list, requests: int) -> list[int]:
    """For each run, how many blocks are more recent than its first.

    `tree` counts, as a Fenwick tree, the blocks whose last use is each request; `held` all of them.
    A request's own blocks enter when the next one begins: until then they are above all it looks
    up, and what the next takes back at once (the root that all share) never has to enter.
    """
    tree, held, above = [0] * (requests + 1), 0, []
    recent, current, moved = -1, -1, 0
    for r, t, count in zip(request, source, length):
        if r != current:
            recent, current, pending, moved = current, r, moved, 0
            _add(tree, recent, pending - count if t == recent else pending)
        if t < 0:
            held += count
            above.append(held)
        elif t == recent:
            above.append(0)
        else:
            above.append(held - _upto(tree, t))
            _add(tree, t, -count)
        moved += count
    return above


def _add(tree: list[int], index: int, value: int) -> None:
    i, end = index + 1, len(tree)
    while 0 < i < end:
        tree[i] += value
        i += i & -i


def _upto(tree: list[int], index: int) -> int:
    total, i = 0, index + 1
    while i:
        total += tree[i]
        i &= i - 1
    return total
