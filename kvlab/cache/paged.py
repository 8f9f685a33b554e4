"""The cache: the axes put together, one step at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kvlab.blocks import (
    BlockLedger,
    Holding,
    Prefixes,
    PrefixIndex,
    Sequences,
    Serving,
    Shared,
)
from kvlab.cache.bytes import GroupBytes
from kvlab.cache.choosing import ChoosingBytes, ChoosingGroup, ChoosingHolding
from kvlab.cache.copies import Copies
from kvlab.cache.division import blocks_kept, tokens_allowed
from kvlab.cache.facts import NO_FACTS, ModelFacts
from kvlab.cache.group import LayerGroup
from kvlab.cache.requests import Requests
from kvlab.cache.running import Running
from kvlab.cache.spec import CacheSpec, compute_dtype
from kvlab.cache.stats import CacheStats, counted
from kvlab.core import CacheGeometry, KvlabError, SeqId
from kvlab.pool import FINE_SLAB_TOKENS, SLAB_TOKENS, BlockPool, HeadPool, Meter, Workspace
from kvlab.sim.service import recompute_cost
from kvlab.sim.sizes import ModelShape
from kvlab.source import Extent


class PagedCache(Copies, Requests):
    """A KV cache in blocks, composed from independent axes.

    geometry: the model's shape with the block size.
    spec: the axes.
    device, dtype: where blocks live, and what the model computes in.
    inv_freq: the model's rotary frequencies [D / 2], for windows that rotate keys anew.
    facts: which model this is, for prefixes that are shared and stored.

    A step is `begin(seqs, counts)`, `attend(...)` once for every layer in order, `commit()`.
    `begin` raises `OutOfBlocks` before anything has changed; `abort` undoes a step that failed
    between layers.
    """

    def __init__(
        self, geometry: CacheGeometry, spec: CacheSpec | None = None, *,
        device="cpu", dtype: torch.dtype = torch.float32, inv_freq: Tensor | None = None,
        facts: ModelFacts = NO_FACTS,
    ):
        self.geometry, self.inv_freq = geometry, inv_freq
        self.spec = (spec or CacheSpec(block_size=geometry.block_size)).checked_for(geometry)
        self.device, self.dtype = torch.device(device), compute_dtype(dtype)
        self.spec.check_positions(inv_freq)
        self.workspace, self.meter = Workspace(), Meter()
        self.facts, self.shape = facts, ModelShape.of(geometry, facts.parameters)
        self.groups, self._place = self._layer_groups()
        self._running: Running | None = None
        held = [group.held for group in self.groups]
        self.sequences = Sequences(held, self._named(facts.identity))
        self.prefixes, self.audits, self._late = Prefixes(self.sequences), {}, []

    def _layer_groups(self) -> tuple[list[LayerGroup], list[tuple[int, int]]]:
        """The groups, and for each layer the number of its group and its place in there."""
        g, parts = self.geometry, self.spec.layer_groups(self.geometry)
        self._parts, self._capacities = parts, self.spec.capacities(g)
        groups = [self._group(g.part(part), n) for part, n in zip(parts, self._capacities)]
        place = {layer: (number, i) for number, part in enumerate(parts)
                 for i, layer in enumerate(part)}  # fmt: skip
        return groups, [place[layer] for layer in range(g.layers)]

    def _group(self, g: CacheGeometry, capacity: int | None) -> LayerGroup:
        spec = self.spec
        # Where tokens are chosen, it is after the step: the ledger has room for the step itself.
        capacity = None if spec.by_token else capacity
        ledger = BlockLedger(capacity, spec.policy())
        kind = HeadPool if spec.budget.by_head else BlockPool
        pool = kind(
            g, spec.format, self.device, self.dtype, spec.kernels, self.workspace, self.meter,
            FINE_SLAB_TOKENS if spec.by_token else SLAB_TOKENS,
        )
        given = ledger, pool, spec, self.inv_freq
        if spec.by_token:
            storage = ChoosingBytes(*given)
            held = ChoosingHolding(ledger, g.block_size, storage, spec.window, Extent)
            return ChoosingGroup(held, storage)
        storage = GroupBytes(*given)
        return LayerGroup(self._held(ledger, storage), storage)

    def _held(self, ledger: BlockLedger, storage: GroupBytes) -> Holding:
        """How a group holds its blocks: the member of axis prefix at work."""
        spec, size = self.spec, self.geometry.block_size
        given = ledger, size, storage, spec.window, Extent
        if not spec.prefix.shares:
            return Holding(*given, storage.pool.shape.window)
        if spec.prefix.hold:  # a block is used when a request begins with it
            storage.watch.touches = False
            storage.watch.active &= ledger.policy.scored
        kind = Serving if spec.prefix.hold else Shared
        return kind(
            *given, index=PrefixIndex(self._named(self.facts.identity), size),
            tier=spec.offload.tier(storage), cost=recompute_cost(self.shape, size),
            outputs=spec.prefix.outputs, reads_part=spec.retrieval.selects,
        )

    # ---- one step

    def begin(self, seqs: list[SeqId], counts: list[int]) -> None:
        """Find room for `counts[i]` new tokens of `seqs[i]`, evicting where the policy may.

        Raises `OutOfBlocks`; lengths and contents are then as before, but for evicted blocks.
        """
        if self.spec.by_token:
            self._foresee(dict(zip(seqs, counts)))
        step = self.sequences.begin(seqs, counts)
        try:
            self._promise_host(step)
        except BaseException:  # what the host's allocator raises, too
            self.sequences.abort()
            raise
        for e in (e for extents in step for e in extents):
            e.alone = len(seqs) == 1
        looks = all(n == 1 for n in counts) and self._looks(seqs)
        decodes = self.can_decode(counts) and not looks
        if decodes:
            for number, group in enumerate(self.groups):
                group.sources.prepare([extents[number] for extents in step])
        self._running = Running(self.groups, self._place, step, decodes)

    @property
    def running(self) -> Running:
        """The step under way. Raises `KvlabError` where there is none."""
        self.sequences.running()
        return self._running

    @property
    def capturable(self) -> bool:
        """Whether decode steps may be captured."""
        return all(group.sources.capturable for group in self.groups)

    def can_decode(self, counts: list[int]) -> bool:
        """Whether a step of these counts may run through the decode kernel."""
        fused = all(group.pool.fused is not None for group in self.groups)
        return fused and not self.spec.window.rerotate and all(n == 1 for n in counts)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float,
        window: int | None = None, sinks: Tensor | None = None,
    ) -> Tensor:
        """q [B, Hq, T, Dk], k [B, H, T, Dk] and v [B, H, T, Dv], rows left-padded ->
        [B, T, Hq, Dv] in q's dtype.

        Padding positions of the result are zero. window: the model's own sliding window; sinks:
        logits [Hq] that every query weighs beside those of the keys.
        """
        how = {"scale": scale, "window": window, "sinks": sinks}
        return self.running.attend(layer, q, k, v, **how)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take over k, v [B, H, T, D] of a step without attending: to fill a cache from elsewhere.

        In place of `attend`, once for every layer in order; policies hear of no attention.
        """
        self.running.store(layer, k, v)

    def commit(self) -> None:
        """Close the step: full blocks are sealed for good, lengths advance."""
        singles = all(row[0].single for row in self.sequences.running())
        self.sequences.commit()
        self._running = None
        for group in self.groups:
            group.end_step()
        if self.spec.by_token:
            self._repack(singles)
        else:
            self._trim()

    def abort(self) -> None:
        """Undo a step that did not reach `commit`; the cache is as before `begin`."""
        self.sequences.abort()
        self._running = None

    def _trim(self) -> None:
        """Bring a cache with a relative budget back to its share of the tokens seen."""
        if self.spec.budget_percent is None:
            return
        shapes = [group.pool.shape for group in self.groups]
        shares = blocks_kept(self.spec, self._parts, shapes, self.sequences.lengths.values())
        for group, share in zip(self.groups, shares):
            keep = max(1, int(share - group.summaries.blocks))
            short = (group.ledger.held_count - keep) / group.summaries.gain
            over = min(math.ceil(short), group.ledger.evictable_count)
            if over > 0:
                group.held.evict(over)

    def _promise_host(self, step: list[list[Extent]]) -> None:
        """Have the host memory that a relative budget may need behind this step, before it runs.

        Raises `OutOfHost`: then, the step would stand.
        """
        if self.spec.budget_percent is None or not self.spec.offload.keeps:
            return
        lengths = dict(self.sequences.lengths)
        for row in step:
            lengths[row[0].seq] += row[0].count
        shapes, others = [group.pool.shape for group in self.groups], {}
        shares = blocks_kept(self.spec, self._parts, shapes, lengths.values())
        for number, (group, share) in enumerate(zip(self.groups, shares)):
            sealing = sum(len(row[number].sealing) for row in step)
            over = min(group.ledger.held_count - max(1, int(share)),
                       group.ledger.evictable_count + sealing)
            if over > 0 and self.spec.prefix.shares:
                group.held.host_room(over)  # known contents there may go for it
            elif over > 0:
                group.sources.host.shelf.require_beside(over, others)

    # ---- tokens that are chosen

    def _foresee(self, counts: dict[SeqId, int]) -> None:
        """Tell the groups what their sequences will have seen after this step, and may hold."""
        seen = {seq: n + counts.get(seq, 0) for seq, n in self.sequences.lengths.items()}
        for group, keep in zip(self.groups, self._allowed(seen)):
            group.held.seen, group.held.keep = seen, keep

    def _kept(self, seqs: Iterable[SeqId]) -> list[dict[SeqId, int]]:
        """Tokens that each of `seqs` may hold now, by layer group."""
        return [{seq: keep[seq] for seq in seqs} for keep in self._allowed(self.sequences.lengths)]

    def _allowed(self, seen: dict[SeqId, int]) -> list[dict[SeqId, int]]:
        """Of the tokens seen, those that each group may hold."""
        return tokens_allowed(self.spec, self._parts, self._capacities, seen)

    def _looks(self, seqs: list[SeqId]) -> bool:
        """Whether this step of single tokens is scored: then it is read piece by piece."""
        if not self.spec.by_token:
            return False
        looks = [group.chooser.look(group.tables, keep)
                 for group, keep in zip(self.groups, self._kept(seqs))]  # all hear of it
        return any(looks)

    def _repack(self, singles: bool) -> None:
        """Bring the sequences back to their budget; decoded tokens may exceed it for a while."""
        for group, kept in zip(self.groups, self._kept(self.sequences.lengths)):
            for seq, keep in kept.items():
                group.chooser.hear(seq)
                over = group.chooser.over(group.tables[seq], keep, slack=singles)
                if over:
                    group.repack(seq, over, self.sequences.lengths[seq])
            group.watch.abort()

    # ---- accounts

    def check(self) -> None:
        """Raise if ledger, tables and pool disagree; for tests and after trouble."""
        for group in self.groups:
            group.check()
            group.origins.check(self.sequences.lengths)
        if self.meter.now != self._allocated_bytes:
            raise KvlabError(f"{self.meter.now} bytes metered, {self._allocated_bytes} allocated")

    def reset_peak(self) -> None:
        """Let `stats().peak_allocated_bytes` begin anew with what is held now."""
        self.meter.reset_peak()

    @property
    def _allocated_bytes(self) -> int:
        return sum(group.sources.nbytes + group.watch.nbytes for group in self.groups)

    def stats(self) -> CacheStats:
        """Counts and bytes now; see `CacheStats` for what each byte count means."""
        return counted(self, self.sequences.lengths.values(), self._allocated_bytes)
