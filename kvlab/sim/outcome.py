"""What happened to each access, and the sums over it: the same for every way to run a trace."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvlab.sim.sizes import ModelShape
from kvlab.sim.trace import Trace

# Codes of an access. Those from HIT on are hits, by tier.
MISS, BROKEN_CHAIN, PARTIAL, REFUSED, HIT, HOST_HIT, DEEP_HIT = range(7)
SHARE = 1 << 32  # a whole, in the units of `hit_shares`: whole numbers sum alike in any pieces


class Outcome(NamedTuple):
    """One piece of a trace, run: code uint8 [A] of each access; evicted block ids int64 [E] in
    order, and the access of the piece during which each left, int64 [E]. ran: the piece in the
    order in which it ran, where that is another one (a closed loop)."""

    code: np.ndarray
    evicted: np.ndarray
    evicted_at: np.ndarray
    ran: Trace | None = None


class Told(NamedTuple):
    """Of one piece, what counts: accesses by code [7], misses of blocks that were never asked for,
    requests refused, evictions that were thrash; hits and accesses of each request [R]; and for
    each run of hits its first token and the token behind its last."""

    codes: np.ndarray
    compulsory: int
    refused: int
    thrashed: int
    hits: np.ndarray
    blocks: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Tally:
    """Sums of a run, piece by piece, in memory that the length of the trace does not change but
    for 8 bytes a distinct block.

    window_seconds: an evicted block wanted again within it was thrash; None leaves that out.
    Rates are of what `Definitions` count; evictions, thrash and time are of the whole run.
    """

    def __init__(self, shape: ModelShape, window_seconds: float | None = 60.0):
        self.shape, self.window_ms = shape, window_seconds and 1e3 * window_seconds
        self.requests = self.refused = self.accesses = self.tokens = 0
        self.hits = self.host_hits = self.deep_hits = self.token_hits = 0
        self.evictions = self.thrashed = 0
        self.flops = self.flops_saved = 0.0
        self.any_hit = self.hit_shares = 0
        self.misses = dict.fromkeys(
            ("compulsory", "capacity", "partial_block", "broken_chain", "refused"), 0
        )
        self.first_ms = self.last_ms = None
        self._seen = _Seen()
        self._gone = np.empty(0, dtype=np.int64), np.empty(0)  # evicted ids and times, recent

    def add(self, piece: Trace, outcome: Outcome) -> None:
        counted = piece.columns.get("counted", np.ones(len(piece), dtype=bool))
        self.requests += int(np.count_nonzero(counted))
        ends, heads = piece.counted_tokens
        self.tokens += int(ends.sum() + heads.sum())
        flops = self.shape.prefill_flops
        self.flops += float((flops(ends) - flops(-heads)).sum())
        self.evictions += len(outcome.evicted)
        if len(piece):
            self.first_ms = piece.arrival_ms[0] if self.first_ms is None else self.first_ms
            self.last_ms = piece.arrival_ms[-1]
        told = self._count(piece, outcome)
        self.accesses += int(told.blocks.sum())
        self._add_hits(told)
        self._add_misses(told)
        if self.window_ms is not None:
            self.thrashed += told.thrashed

    def _add_hits(self, told: Told) -> None:
        self.hits += int(told.hits.sum())
        self.host_hits += int(told.codes[HOST_HIT])
        self.deep_hits += int(told.codes[DEEP_HIT])
        self.any_hit += int(np.count_nonzero(told.hits))
        shares = np.rint(SHARE * told.hits / np.maximum(told.blocks, 1))
        self.hit_shares += int(shares.astype(np.int64).sum())
        self.token_hits += int((told.ends - told.begins).sum())
        flops = self.shape.prefill_flops
        self.flops_saved += float((flops(told.ends) - flops(told.begins)).sum())

    def _add_misses(self, told: Told) -> None:
        self.misses["compulsory"] += told.compulsory
        self.misses["capacity"] += int(told.codes[MISS]) - told.compulsory
        self.misses["partial_block"] += int(told.codes[PARTIAL])
        self.misses["broken_chain"] += int(told.codes[BROKEN_CHAIN])
        self.misses["refused"] += int(told.codes[REFUSED])
        self.refused += told.refused

    def _count(self, piece: Trace, outcome: Outcome) -> Told:
        code = outcome.code
        mask = np.ones(piece.accesses, dtype=bool) if piece.counted is None else piece.counted
        hit = np.flatnonzero((code >= HIT) & mask)
        request = piece.request_of
        follows = (np.diff(hit, prepend=-2) == 1) & (np.diff(request[hit], prepend=-1) == 0)
        starts = np.flatnonzero(~follows)
        last = hit[np.append(starts[1:], len(hit)) - 1] if len(hit) else hit
        first_seen = self._seen.first(piece)
        return Told(
            codes=np.bincount(code[mask], minlength=DEEP_HIT + 1),
            compulsory=int(np.count_nonzero(first_seen & (code == MISS) & mask)),
            refused=len(np.unique(request[(code == REFUSED) & mask])),
            thrashed=0 if self.window_ms is None else self._thrashed(piece, outcome),
            hits=np.bincount(request[hit], minlength=len(piece)),
            blocks=np.bincount(request[mask], minlength=len(piece)),
            begins=piece.depth[hit[starts]] * piece.block_size,
            ends=piece.depth[last] * piece.block_size + piece.block_tokens[last],
        )

    def _thrashed(self, piece: Trace, outcome: Outcome) -> int:
        """Count misses whose block was evicted less than a window before.

        Evictions and misses of a block alternate, so in the order of (block, time) the event
        before such a miss is its eviction. Events are sorted as one integer each: block, place of
        the event in time, and whether it is a miss.
        """
        miss = np.flatnonzero(outcome.code == MISS)
        old_ids, old_ms = self._gone
        ms = np.concatenate([old_ms, piece.arrival_ms[piece.request_of]])
        gone_ids = np.concatenate([old_ids, outcome.evicted])
        gone_at = np.concatenate([np.arange(len(old_ids)), outcome.evicted_at + len(old_ids)])
        block = _small(np.concatenate([gone_ids, piece.ids[miss]]))
        event = np.concatenate([2 * gone_at, 2 * (miss + len(old_ids)) + 1])
        events = np.sort(block << 32 | event)
        before, after = events[:-1], events[1:]
        back = np.flatnonzero((before >> 32 == after >> 32) & (before & 1 == 0) & (after & 1 == 1))
        at = (events & 0xFFFFFFFF) >> 1
        absent = ms[at[back + 1]] - ms[at[back]]
        recent = ms[gone_at] >= (self.last_ms or 0) - self.window_ms
        self._gone = gone_ids[recent], ms[gone_at[recent]]
        return int(np.count_nonzero(absent <= self.window_ms))


def _small(ids: np.ndarray) -> np.ndarray:
    """Ids that fit in 31 bits: themselves, or renumbered."""
    if len(ids) and (ids.min() < 0 or ids.max() >= 1 << 31):
        return np.unique(ids, return_inverse=True)[1]
    return ids


class _Seen:
    """Which block ids came before: sorted runs, merged when alike in size, 8 bytes an id."""

    def __init__(self):
        self._runs: list[np.ndarray] = []

    def first(self, piece: Trace) -> np.ndarray:
        """Mask [A] of accesses to blocks that no access came to before; remembers them."""
        first = piece.previous < 0
        if self._runs:
            at = np.flatnonzero(first)
            for run in self._runs:
                place = np.minimum(np.searchsorted(run, piece.ids[at]), len(run) - 1)
                at = at[run[place] != piece.ids[at]]
            first = np.zeros_like(first)
            first[at] = True
        if first.any():
            self._runs.append(np.sort(piece.ids[first]))
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs[-2:] = [np.sort(np.concatenate(self._runs[-2:]), kind="stable")]
        return first
