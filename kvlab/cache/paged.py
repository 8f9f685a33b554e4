"""The cache: the axes put together, one step at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from kvlab.blocks import BlockLedger
from kvlab.cache.group import Extent, LayerGroup
from kvlab.cache.spec import CacheSpec, compute_dtype
from kvlab.cache.stats import CacheStats
from kvlab.core import CacheGeometry, KvlabError, SeqId
from kvlab.pool import BlockPool


class PagedCache:
    """A KV cache in blocks, composed from independent axes.

    geometry: the model's shape with the block size.
    spec: the axes.
    device, dtype: where blocks live, and what the model computes in.

    A step is `begin(seqs, counts)`, `attend(...)` once for every layer in order, `commit()`.
    `begin` raises `OutOfBlocks` before anything has changed; `abort` undoes a step that failed
    between layers.
    """

    def __init__(
        self, geometry: CacheGeometry, spec: CacheSpec | None = None, *,
        device="cpu", dtype: torch.dtype = torch.float32,
    ):
        self.geometry = geometry
        self.spec = (spec or CacheSpec(block_size=geometry.block_size)).checked_for(geometry)
        self.device, self.dtype = torch.device(device), compute_dtype(dtype)
        self.groups = [self._group(geometry)]
        self._names = itertools.count()
        self._step: list[Extent] | None = None
        self._tokens: dict[SeqId, int] = {}

    def _group(self, g: CacheGeometry) -> LayerGroup:
        ledger = BlockLedger(self.spec.capacity_blocks(g), self.spec.policy())
        pool = BlockPool(g, self.spec.format, self.device, self.dtype)
        return LayerGroup(ledger, pool, self.spec.window, self.spec.workspace_tokens)

    # ---- sequences

    def open(self) -> SeqId:
        """A new, empty sequence."""
        seq = next(self._names)
        for group in self.groups:
            group.open(seq)
        self._tokens[seq] = 0
        return seq

    def close(self, seq: SeqId) -> None:
        """Forget `seq` and give its blocks back."""
        for group in self.groups:
            group.close(seq)
        del self._tokens[seq]

    def fork(self, seq: SeqId) -> SeqId:
        """A second sequence with the same past: sealed blocks shared, the open tail copied."""
        child = next(self._names)
        for group in self.groups:
            group.fork(seq, child)
        self._tokens[child] = self._tokens[seq]
        return child

    def truncate(self, seq: SeqId, length: int) -> None:
        """Forget the tokens of `seq` from `length` on."""
        if not 0 <= length <= self._tokens[seq]:
            raise KvlabError(f"cannot crop {self._tokens[seq]} tokens to {length}")
        for group in self.groups:
            group.crop(seq, length)
        self._tokens[seq] = length

    def length(self, seq: SeqId) -> int:
        """Tokens of `seq` seen so far, evicted ones included."""
        return self._tokens[seq]

    # ---- one step

    def begin(self, seqs: list[SeqId], counts: list[int]) -> None:
        """Find room for `counts[i]` new tokens of `seqs[i]`, evicting where the policy may.

        Raises `OutOfBlocks`; lengths and contents are then as before, but for evicted blocks.
        """
        if self._step is not None:
            raise KvlabError("the previous step was neither committed nor aborted")
        for group in self.groups:  # all rows at once, or an early row would evict in vain
            group.make_room(sum(map(group.needs, seqs, counts)))
        step: list[list[Extent]] = []
        try:
            for seq, count in zip(seqs, counts, strict=True):
                step.append([])
                for group in self.groups:
                    step[-1].append(group.begin(seq, count))
        except KvlabError:
            self._undo(step)
            raise
        self._step = step

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        """q [B, Hq, T, D], k and v [B, H, T, D], rows left-padded -> [B, T, Hq, D] in q's dtype.

        Padding positions of the result are zero.
        """
        group, local = self.groups[0], layer
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
        for row, extents in enumerate(self._step):
            e = extents[0]
            if e.count:
                new = slice(q.shape[2] - e.count, None)
                keys, values = (x[row, :, new].transpose(0, 1) for x in (k, v))
                part = group.attend(local, e, q[row, :, new], keys, values, scale, window)
                out[row, new] = part.transpose(0, 1).to(out.dtype)
        return out

    def commit(self) -> None:
        """Close the step: full blocks are sealed for good, lengths advance."""
        for extents in self._step:
            for group, e in zip(self.groups, extents):
                group.commit(e)
            self._tokens[extents[0].seq] += extents[0].count
        for group in self.groups:
            group.end_step()
        self._step = None
        self._trim()

    def abort(self) -> None:
        """Undo a step that did not reach `commit`; the cache is as before `begin`."""
        if self._step is not None:
            self._undo(self._step)
            self._step = None

    def _undo(self, step: list[list[Extent]]) -> None:
        for extents in step:
            for group, e in zip(self.groups, extents):
                group.abort(e)

    def _trim(self) -> None:
        """Bring a cache with a relative budget back to its share of the tokens seen."""
        if self.spec.budget_percent is None:
            return
        seen = sum(-(-n // self.geometry.block_size) for n in self._tokens.values())
        keep = max(1, int(seen * self.spec.budget_percent / 100))
        for group in self.groups:
            over = min(group.ledger.held_count - keep, group.ledger.evictable_count)
            if over > 0:
                group.evict(over)

    # ---- accounts

    def check(self) -> None:
        """Raise if ledger, tables and pool disagree; for tests and after trouble."""
        for group in self.groups:
            group.ledger.check()
            held = {b for t in group.tables.values() for b in t.ids if b is not None}
            if len(held) != group.ledger.held_count:
                raise KvlabError(f"{len(held)} blocks in tables, {group.ledger.held_count} held")

    def stats(self) -> CacheStats:
        """Counts and bytes now; see `CacheStats` for what each byte count means."""
        g, group = self.geometry, self.groups[0]
        tokens = sum(self._tokens.values())
        size, ledger = g.block_size, group.ledger
        open_tokens = sum(t.length % size for t in group.tables.values())
        sealed = ledger.held_count - sum(bool(t.length % size) for t in group.tables.values())
        resident = sealed * size + open_tokens
        bits = self.spec.format.payload_bits
        logical = sealed * self.spec.format.block_bytes(g) + (
            open_tokens * g.elements_per_token * self.dtype.itemsize
        )
        allocated = sum(group.pool.nbytes for group in self.groups)
        return CacheStats(
            tokens=tokens, resident_tokens=resident, blocks=ledger.held_count,
            evictions=sum(group.evictions for group in self.groups),
            nominal_bytes=int(tokens * g.elements_per_token * bits / 8),
            logical_bytes=logical, allocated_bytes=allocated, host_bytes=0,
            bits_per_element=8 * allocated / max(1, resident * g.elements_per_token),
        )
