"""Live runs with all events of their ledger, and the same again without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from torch import Tensor

from kvlab.blocks import BlockLedger, chained_hashes, replay, victims
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Measurement
from kvlab.model import LoadedModel, PagedCache, forward_chunk
from kvlab.policy import EvictionPolicy, asked, by_name
from kvlab.serve import Limits, Loop, Request, Served, StepClock, as_trace
from kvlab.sim import CostModel, SimResult, Trace, simulate
from kvlab.sim.outcome import HIT

AT_ONCE = CostModel(1e12, 1e12, chunk_tokens=None)  # each request is done before the next one comes
HITS = "hr"  # audit codes that the simulator counts as hits: the last token is computed anyway


class Recording(NamedTuple):
    """A live run: the ledger's events, what was served, and what the simulator needs to repeat it.

    names: chained hashes of each prompt's whole blocks; empty for a text without requests.
    """

    policy: str
    capacity: int
    events: list[tuple]
    served: list[Served]
    requests: list[Request]
    names: list[list[int]]
    block_size: int
    shape: object

    @property
    def evictions(self) -> int:
        return len(victims(self.events))

    def hits(self) -> np.ndarray:
        """Blocks of each request that were found, int64 [R]; they lead its prompt."""
        return np.array([sum(map(s.codes.count, HITS)) for s in self.served], dtype=np.int64)

    def coming(self) -> list[list[int]]:
        """Contents of the requests that fit, in order: the future that Belady is told."""
        return servable(self.requests, self.names, self.block_size, self.capacity)

    def contents(self) -> list[int]:
        """Contents of all victims, in order."""
        return contents(self.events)


class Decision(NamedTuple):
    """One eviction that differs: its number, and what left in the live run and in the other."""

    number: int
    live: object
    other: object

    def __str__(self):
        return f"eviction {self.number:,}: live {self.live}, replayed {self.other}"


def contents(events: Sequence[tuple]) -> list[int]:
    """Content of each victim of a recording, in order."""
    held, gone = {}, []
    for verb, *arguments in events:
        if verb == "seal":
            held.update((row[0], row[1]) for row in arguments[0])
        elif verb == "reclaim":
            gone += [held[block] for block in arguments[-1]]
    return gone


def record(
    loaded: LoadedModel, spec: CacheSpec, requests: list[Request], policy: str,
    limits: Limits | None = None, clock=None,
) -> Recording:
    """Serve `requests` live, one at a time unless `limits` say more, and keep all events."""
    empty = PagedCache.for_model(loaded.model, spec)
    names = [chained_hashes(empty.identity, spec.block_size, r.prompt) for r in requests]
    coming = servable(requests, names, spec.block_size, only_ledger(empty).capacity)
    cache = PagedCache.for_model(loaded.model, replace(spec, policy=fresh(policy, coming)))
    ledger, events = only_ledger(cache), []
    ledger.events = events.append
    clock = clock or StepClock()
    served = Loop(loaded, cache, limits or Limits(running=1), clock).run(requests)
    cache.check()
    return Recording(policy, ledger.capacity, events, served, requests, names,
                     spec.block_size, cache.shape)  # fmt: skip


def only_ledger(cache: PagedCache) -> BlockLedger:
    """The ledger of a cache whose layers share their blocks. Raises `BadInput` for another: each
    of its ledgers decides for itself, and a simulation is of one."""
    if len(cache.groups) > 1:
        raise BadInput("cache.groups", cache.spec.groups, f"makes {len(cache.groups)} groups of "
                       "layers of this model, and one ledger is compared with its simulation; "
                       "cache.groups=all, and a model whose layers are alike")
    return cache.groups[0].ledger


def servable(requests: list[Request], names: list, size: int, capacity: int) -> list[list[int]]:
    """Of `names`, those of requests that fit into the cache: only they are ever served."""
    tokens = (len(r.prompt) + r.output_tokens - 1 for r in requests)
    return [chain for chain, count in zip(names, tokens) if -(-count // size) <= capacity]


def fresh(policy: str, names: list[list[int]]) -> EvictionPolicy:
    """A new policy; one that needs the future gets the `names` of each request to come."""
    return by_name(policy, **({"future": names, "by_request": True} if foresees(policy) else {}))


def foresees(policy: str) -> bool:
    """Whether a policy, by name or dotted path, is made with the future of a trace."""
    return asked(policy).foresees


def replayed(recording: Recording, policy: str) -> Decision | None:
    """Repeat the recording on a fresh ledger under `policy`; the first eviction that differs."""
    ledger = BlockLedger(recording.capacity, fresh(policy, recording.coming()))
    found = replay(recording.events, ledger)
    if found is None:
        return None
    before = len(victims(recording.events[: found.event]))
    pairs = zip_longest(found.recorded, found.replayed)
    at, pair = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
    return Decision(before + at, *pair)


class Simulated(NamedTuple):
    """The same requests through `kvlab.sim`: its result, hits of each request, victims in order."""

    result: SimResult
    hits: np.ndarray
    contents: list[int]


def simulated(recording: Recording) -> Simulated:
    """Simulate the requests, knowing nothing of the live run but its capacity."""
    trace = as_trace(recording.requests, recording.names, recording.block_size)
    dense: dict[int, int] = {}
    for name in (n for chain in recording.names for n in chain):
        dense.setdefault(name, len(dense))
    policy = fresh(recording.policy, [[dense[n] for n in c] for c in recording.coming()])
    events, hits = [], []

    def note(piece: Trace, outcome) -> None:
        hits.append(np.bincount(piece.request_of, outcome.code >= HIT, minlength=len(piece)))

    result = simulate(
        trace, policy, recording.capacity, service=AT_ONCE, shape=recording.shape,
        events=events.append, outcomes=note, window_seconds=None,
    )
    names = list(dense)
    return Simulated(
        result, np.concatenate(hits).astype(np.int64), [names[i] for i in contents(events)]
    )


def differing(live: Sequence, other: Sequence) -> list[Decision]:
    """Decisions that are not the same, one by one; empty when two runs agree."""
    pairs = enumerate(zip_longest(live, other))
    return [Decision(number, a, b) for number, (a, b) in pairs if a != b]


def agreement(live: Recording, other: Simulated) -> Iterator[Measurement]:
    """What both runs hit, and in how much they differ: in nothing when they agree."""
    accesses, requests = other.result.block_accesses, len(live.requests)
    decisions = len(differing(live.contents(), other.contents))
    unlike = int(np.count_nonzero(live.hits() != other.hits))
    percent = 100 * int(live.hits().sum()) / max(1, accesses)
    for name, value, unit, better, count in (
        ("block_hit_percent", percent, "%", "higher", accesses),
        ("simulated_block_hit_percent", other.result.block_hit_percent, "%", "higher", accesses),
        ("requests_with_other_hits", unlike, "requests", "lower", requests),
        ("simulated_differing_decisions", decisions, "decisions", "lower", live.evictions),
    ):
        yield Measurement(name, value, unit, better, count=count)


def record_text(
    loaded: LoadedModel, spec: CacheSpec, ids: Tensor, policy: str, chunk_tokens: int
) -> Recording:
    """Read one text, `ids` [T], through a cache too small for it; the policy hears its attention.
    """
    cache = PagedCache.for_model(loaded.model, replace(spec, policy=fresh(policy, [])))
    ledger, events = only_ledger(cache), []
    if ledger.capacity is None:
        raise BadInput("cache.budget_blocks", None, "a text needs a budget that it does not fit in")
    ledger.events = events.append
    for start in range(0, len(ids), chunk_tokens):
        forward_chunk(loaded.model, ids[None, start : start + chunk_tokens], cache, last=True)
    cache.check()
    cache.reset()
    return Recording(policy, ledger.capacity, events, [], [], [], spec.block_size, cache.shape)
