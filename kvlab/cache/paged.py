"""The cache: the axes put together, one step at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from kvlab.blocks import BlockLedger
from kvlab.cache.choosing import ChoosingGroup
from kvlab.cache.copies import Copies
from kvlab.cache.facts import NO_FACTS, ModelFacts
from kvlab.cache.group import LayerGroup
from kvlab.cache.running import Running
from kvlab.cache.sequences import Sequences
from kvlab.cache.spec import CacheSpec, compute_dtype
from kvlab.cache.stats import CacheStats, counted
from kvlab.core import BadInput, CacheGeometry, KvlabError, SeqId
from kvlab.pool import FINE_SLAB_TOKENS, SLAB_TOKENS, BlockPool, Meter, Workspace
from kvlab.source import Extent


class PagedCache(Copies, Sequences):
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
        self.groups, self._place = self._layer_groups()
        self._opened = 0  # sequences so far: the next name
        self.under_way: Running | None = None
        self._tokens: dict[SeqId, int] = {}
        self._start_sharing(facts)

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
        pool = BlockPool(
            g, spec.format, self.device, self.dtype, spec.kernels, self.workspace, self.meter,
            FINE_SLAB_TOKENS if spec.by_token else SLAB_TOKENS,
        )
        kind = ChoosingGroup if spec.by_token else LayerGroup
        return kind(ledger, pool, spec, self.inv_freq)

    # ---- one step

    def begin(self, seqs: list[SeqId], counts: list[int]) -> None:
        """Find room for `counts[i]` new tokens of `seqs[i]`, evicting where the policy may.

        Raises `OutOfBlocks`; lengths and contents are then as before, but for evicted blocks.
        """
        self._check_step(seqs, counts)
        if self.spec.by_token:
            self._foresee(dict(zip(seqs, counts)))
        for group in self.groups:  # all rows at once, or an early row would evict in vain
            wanted = [(seq, group.needs(seq, n)) for seq, n in zip(seqs, counts, strict=True)]
            coming = [c for seq, blocks in wanted for c in group.share.coming(seq, blocks)]
            group.make_room(sum(len(blocks) for _, blocks in wanted), coming)
        step: list[list[Extent]] = []
        try:
            for seq, count in zip(seqs, counts, strict=True):
                step.append([])
                for group in self.groups:
                    step[-1].append(group.begin(seq, count))
        except BaseException:  # the allocator's errors, too
            self._undo(step)
            raise
        for e in (e for extents in step for e in extents):
            e.alone = len(seqs) == 1
        decodes = self.can_decode(counts) and not self._looks(seqs)
        if decodes:
            for number, group in enumerate(self.groups):
                group.sources.prepare([extents[number] for extents in step])
        self.under_way = Running(self.groups, self._place, step, decodes)

    def _check_step(self, seqs: list[SeqId], counts: list[int]) -> None:
        if self.under_way is not None:
            raise KvlabError("the previous step was neither committed nor aborted")
        if len(seqs) != len(counts) or any(n < 0 for n in counts):
            raise BadInput("counts", counts, f"must be {len(seqs)} numbers of tokens, 0 or more")
        for seq in seqs:
            self.length(seq)
        if len(set(seqs)) < len(seqs):
            raise BadInput("seqs", seqs, "must name each sequence once; fork what comes twice")

    @property
    def running(self) -> Running:
        """The step under way."""
        if self.under_way is None:
            raise KvlabError("no step is under way; begin one first")
        return self.under_way

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
        return self.running.attend(layer, q, k, v, scale=scale, window=window, sinks=sinks)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Take over k, v [B, H, T, D] of a step without attending: to fill a cache from elsewhere.

        In place of `attend`, once for every layer in order; policies hear of no attention.
        """
        self.running.store(layer, k, v)

    def commit(self) -> None:
        """Close the step: full blocks are sealed for good, lengths advance."""
        rows = self.running.rows
        self._note_holes(rows)
        for extents in rows:
            for group, e in zip(self.groups, extents):
                group.commit(e)
            self._tokens[extents[0].seq] += extents[0].count
        for group in self.groups:
            group.end_step()
        singles = all(extents[0].single for extents in rows)
        self.under_way = None
        if self.spec.by_token:
            self._repack(singles)
        else:
            self._trim()

    def abort(self) -> None:
        """Undo a step that did not reach `commit`; the cache is as before `begin`."""
        if self.under_way is not None:
            self._undo(self.under_way.rows)
            self.under_way = None

    def _undo(self, step: list[list[Extent]]) -> None:
        for extents in step:
            for group, e in zip(self.groups, extents):
                group.abort(e)

    def _trim(self) -> None:
        """Bring a cache with a relative budget back to its share of the tokens seen."""
        if self.spec.budget_percent is None:
            return
        size = self.geometry.block_size
        seen = [sum(-(-group.pool.shape.seen(n) // size) for n in self._tokens.values())
                for group in self.groups]  # fmt: skip
        for group, share in zip(self.groups, self.spec.kept(self._parts, seen)):
            keep = max(1, int(share - group.summaries.blocks))
            short = (group.ledger.held_count - keep) / group.summaries.gain
            over = min(math.ceil(short), group.ledger.evictable_count)
            if over > 0:
                group.evict(over)

    # ---- tokens that are chosen

    def _foresee(self, counts: dict[SeqId, int]) -> None:
        """Tell the groups what their sequences will have seen after this step, and may hold."""
        seen = {seq: n + counts.get(seq, 0) for seq, n in self._tokens.items()}
        for group, keep in zip(self.groups, self._allowed(seen)):
            group.seen, group.keep = seen, keep

    def _kept(self, seqs: Iterable[SeqId]) -> list[dict[SeqId, int]]:
        """Tokens that each of `seqs` may hold now, by layer group."""
        return [{seq: keep[seq] for seq in seqs} for keep in self._allowed(self._tokens)]

    def _allowed(self, seen: dict[SeqId, int]) -> list[dict[SeqId, int]]:
        """Of the tokens seen, those that may be held: a part of the group's budget in proportion.
        """
        if self.spec.budget_percent is not None:
            count = len(self.groups)
            kept = {seq: self.spec.kept(self._parts, [n] * count) for seq, n in seen.items()}
            return [{seq: int(by[i]) for seq, by in kept.items()} for i in range(count)]
        total = max(1, sum(seen.values()))
        rooms = [blocks * self.geometry.block_size for blocks in self._capacities]
        return [{seq: room * n // total if total > room else n for seq, n in seen.items()}
                for room in rooms]  # fmt: skip

    def _looks(self, seqs: list[SeqId]) -> bool:
        """Whether this step of single tokens is scored: then it is read piece by piece."""
        if not self.spec.by_token:
            return False
        looks = [group.chooser.look(group.tables, keep)
                 for group, keep in zip(self.groups, self._kept(seqs))]  # all hear of it
        return any(looks)

    def _repack(self, singles: bool) -> None:
        """Bring the sequences back to their budget; decoded tokens may exceed it for a while."""
        for group, kept in zip(self.groups, self._kept(self._tokens)):
            for seq, keep in kept.items():
                group.chooser.hear(seq)
                over = group.chooser.over(group.tables[seq], keep, slack=singles)
                if over:
                    group.repack(seq, over, self._tokens[seq])
            group.watch.abort()

    # ---- accounts

    def check(self) -> None:
        """Raise if ledger, tables and pool disagree; for tests and after trouble."""
        for group in self.groups:
            group.ledger.check()
            group.summaries.check()
            group.origins.check(self._tokens)
            held = {b for t in group.tables.values() for b in t.ids if b is not None}
            held |= group.share.extra()
            if len(held) != group.ledger.held_count:
                raise KvlabError(f"{len(held)} blocks in tables, {group.ledger.held_count} held")
            group.away.check(group.share.waiting)
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
        return counted(self, self._tokens.values(), self._allocated_bytes)
