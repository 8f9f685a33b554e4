"""The cache: the axes put together, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kvlab.blocks import Prefixes, Sequences
from kvlab.cache.copies import Copies
from kvlab.cache.facts import NO_FACTS, ModelFacts
from kvlab.cache.known import Known
from kvlab.cache.layers import Layers
from kvlab.cache.lineage import Lineage
from kvlab.cache.reach import Reach
from kvlab.cache.requests import Requests
from kvlab.cache.running import Running
from kvlab.cache.shares import Shares
from kvlab.cache.spec import CacheSpec
from kvlab.cache.stats import CacheStats, counted
from kvlab.core import CacheGeometry, KvlabError, SeqId
from kvlab.source import Extent


class PagedCache(Copies, Reach):
    """A KV cache in blocks, composed from independent axes.

    geometry: the model's shape with the block size.
    spec: the axes.
    device, dtype: where blocks live, and what the model computes in.
    inv_freq: the model's rotary frequencies [D / 2], for windows that rotate keys anew.
    facts: which model this is, for prefixes that are shared and stored.

    A step is `begin(seqs, counts)`, `attend(...)` once for every layer in order, `commit()`.
    `begin` raises `OutOfBlocks` before anything has changed; `abort` undoes a step that failed
    between layers.

    layers: what it is made of; requests: its sequences (`open`, `fork`, `truncate`, `close`, ...);
    known: prefixes beyond them (`cache_prefix`, `save`, ...); lineage: the model that fills it;
    shares: what its budget asks around a step. The parts' methods are reached from here.
    """

    parts = ("requests", "known", "lineage", "layers")

    def __init__(
        self, geometry: CacheGeometry, spec: CacheSpec | None = None, *,
        device="cpu", dtype: torch.dtype = torch.float32, inv_freq: Tensor | None = None,
        facts: ModelFacts = NO_FACTS,
    ):
        spec = spec or CacheSpec(block_size=geometry.block_size)
        self.layers = Layers(geometry, spec, device, dtype, inv_freq, facts)
        self.geometry, self.spec, self.groups = geometry, self.layers.spec, self.layers.groups
        self.dtype, self.device = self.layers.dtype, self.layers.device
        self._running: Running | None = None
        fused = all(group.pool.fused is not None for group in self.groups)
        self._fused = fused and not self.spec.window.rerotate
        held = [group.held for group in self.groups]
        self.sequences = Sequences(held, self.layers.identity)
        self.shares = Shares(self.layers, self.sequences)
        self.lineage = Lineage(
            self.sequences, Prefixes(self.sequences), facts, self.spec, self.dtype
        )
        self.requests = Requests(self.layers, self.lineage)
        self.known = Known(self.layers, self.requests, self.lineage)

    # ---- one step

    def begin(
        self, seqs: list[SeqId], counts: list[int], rows: int | None = None
    ) -> Running:
        """Find room for `counts[i]` new tokens of `seqs[i]`, evicting where the policy may.

        rows: of the tensors that will come, where they are more than the sequences: what the rest
        of them compute is of nobody, and a captured step serves any number of sequences.
        Raises `OutOfBlocks`; lengths and contents are then as before, but for evicted blocks.
        """
        if self.spec.by_token:
            self.shares.foresee(dict(zip(seqs, counts)))
        step = self.sequences.begin(seqs, counts)
        if self.shares.promises:
            self._promise_host(step)
        for extents in step if len(seqs) == 1 else ():
            for e in extents:
                e.alone = True
        looks = self.spec.by_token and self.shares.looks(seqs, counts)
        decodes = self.can_decode(counts) and not looks
        if decodes:
            for number, group in enumerate(self.groups):
                group.sources.prepare([extents[number] for extents in step], rows or len(seqs))
        self._running = Running(self.groups, self.layers.place, step, decodes)
        return self._running

    def _promise_host(self, step: list[list[Extent]]) -> None:
        try:
            self.shares.promise_host(step)
        except BaseException:  # what the host's allocator raises, too
            self.sequences.abort()
            raise

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
        return self._fused and set(counts) <= {1}

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
        running, self._running = self._running, None
        self.sequences.commit()
        for group in self.groups:
            group.end_step()
        if self.spec.by_token or self.shares.relative:
            self.shares.settle(singles=all(row[0].count < 2 for row in running.rows))

    # ---- a context, for a policy that waits until it is over

    @contextmanager
    def context(self) -> Iterator[None]:
        """Steps within are a context's; where nothing waits for its end, all steps are alike."""
        self.shares.filling = True
        try:
            yield
        finally:
            self.shares.filling = False

    @contextmanager
    def repeating(self, start: int, end: int) -> Iterator[None]:
        """Steps within repeat the tokens [start, end) of a context, for policy=kvzip to hear."""
        for group in self.groups:
            group.watch.scorer.span = start, end
        try:
            yield
        finally:
            for group in self.groups:
                group.watch.scorer.span = None

    def compress(self) -> None:
        """The context is over, and repeated: what waited for that leaves now."""
        self.shares.compress()

    def abort(self) -> None:
        """Undo a step that did not reach `commit`; the cache is as before `begin`."""
        self.sequences.abort()
        self._running = None

    # ---- accounts

    def check(self) -> None:
        """Raise if ledger, tables and pool disagree; for tests and after trouble."""
        for group in self.groups:
            group.check()
            group.origins.check(self.sequences.lengths)
        metered, allocated = self.layers.meter.now, self.layers.allocated_bytes
        if metered != allocated:
            raise KvlabError(f"{metered} bytes metered, {allocated} allocated")

    def renew(self) -> None:
        """A cache without sequences becomes what it was when it was made: counts and draws begin
        anew. What stays in place does (tables, buffers), and so do captured steps over it.

        For policies that keep nothing of blocks that are gone: those that choose tokens, and none.
        """
        for group in self.groups:
            group.forget_counts()
        self.reset_peak()

    def reset_peak(self) -> None:
        """Let `stats().peak_allocated_bytes` begin anew with what is held now."""
        self.layers.meter.reset_peak()

    def stats(self) -> CacheStats:
        """Counts and bytes now; see `CacheStats` for what each byte count means."""
        return counted(self.layers, self.sequences.lengths.values(), self.known.prefix_tokens)
