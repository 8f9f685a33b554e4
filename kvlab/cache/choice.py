"""What a decoded token reads: chosen anew in every layer, by each key/value head for itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.cache.digests import Digests, NoDigests
from kvlab.cache.past import Sum
from kvlab.cache.step import Extent
from kvlab.cache.tables import room_for, upload
from kvlab.core import SeqId
from kvlab.kernel import attend_sdpa, select_ref
from kvlab.kernel.select_ref import HOLE
from kvlab.pool import BlockPool


class Candidates:
    """The sealed blocks of a batch in logical order, on the device: written in place.

    where   int32 [B, N]: device block, hole, or host key, as `select_ref.HOLE` says
    rows    int32 [B, N]: their digests
    counts  int32 [B]
    hits    int32 [B, N]: heads of all layers that chose a block in this step
    """

    def __init__(self, rows: int, blocks: int, device):
        shape = (4, rows, blocks)
        self.where, self.rows, self.hits, _ = torch.zeros(
            shape, dtype=torch.int32, device=device
        )
        self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self._held = [np.zeros((2, 0), dtype=np.int32) for _ in range(rows)]
        self._seen: list[tuple | None] = [None] * rows

    def fits(self, rows: int, blocks: int) -> bool:
        return self.where.shape[0] == rows and blocks <= self.where.shape[1]

    def refresh(self, row: int, state: tuple, where: list[int], digests: list[int]) -> None:
        """Take over one sequence; `state` tells whether anything has changed."""
        if self._seen[row] == state:
            return
        self._seen[row], old = state, self._held[row]
        new = np.array([where, digests], dtype=np.int32)
        same = min(old.shape[1], new.shape[1])
        changed = np.flatnonzero((old[:, :same] != new[:, :same]).any(0))
        begin = int(changed[0]) if len(changed) else same  # mostly, one block is added
        if begin < new.shape[1]:
            for host, device in zip(new, (self.where, self.rows)):
                upload(np.ascontiguousarray(host[begin:]), device[row, begin : new.shape[1]])
        self._held[row] = new


class NoChoice:
    """Everything is read."""

    def applies(self, e: Extent, window: int | None) -> bool:
        """Whether this step reads a choice of the past in a layer with this sliding window."""
        return False

    def heard(self) -> dict[SeqId, list[int]]:
        """Heads that chose each block of a sequence since the last call, by logical index."""
        return {}


class Choice(NoChoice):
    """Digests -> scores -> tables of the chosen blocks -> attention over them.

    A chunk reads everything; so does a single token in a layer with a sliding window of its own.
    """

    def __init__(self, digests: Digests):
        self.digests, self.pool, self.retrieval = digests, digests.pool, digests.retrieval
        self.keep, self.first, self.last = self.retrieval.blocks(self.pool.geometry.block_size)
        self.candidates: Candidates | None = None
        self._hits: dict[SeqId, Tensor] = {}

    def applies(self, e: Extent, window: int | None) -> bool:
        return e.single and window is None and e.past // self.pool.geometry.block_size > self.keep

    # ---- plain torch, one sequence at a time

    def attend(
        self, layer: int, e: Extent, table: BlockTable, q: Tensor, scale: float,
        window: int | None, total: Sum,
    ) -> None:
        """Add the attention of q [Hq, 1, D] over the chosen sealed blocks to `total`."""
        index = self.chosen(layer, e, table, q)
        wanted, at = index.unique(return_inverse=True)
        blocks = [table.ids[i] for i in wanted.tolist()]
        heads = torch.arange(len(index), device=q.device)[:, None]
        keys, values = (
            x.unflatten(0, (len(blocks), -1))[at, :, heads].flatten(1, 2).transpose(0, 1)
            for x in self.pool.read(layer, blocks)
        )
        total.add(attend_sdpa.attend(q, keys, values, scale=scale))

    def chosen(self, layer: int, e: Extent, table: BlockTable, q: Tensor) -> Tensor:
        """Logical indices [H, n] of the blocks that each head reads, ascending."""
        sealed = e.past // table.block_size
        held = [HOLE if b is None else i for i, b in enumerate(table.ids[:sealed])]
        rows = [row or 0 for row in self.digests.rows[e.seq][:sealed]]
        where, rows = torch.tensor([[held], [rows]], dtype=torch.int32, device=q.device)
        count = torch.tensor([sealed], device=q.device)
        planes = self.digests.store.layer(layer)
        scores = select_ref.score(q[None, :, 0], planes, rows, count, group=self.retrieval.group)
        hits = self._hits_of(e.seq, sealed, q.device)
        got = select_ref.choose(
            self.joined(scores), where, count, keep=self.keep, first=self.first, last=self.last,
            hits=hits[None],
        )
        return got.device[0, :, : int(got.n_device[0, 0])].long()

    def joined(self, scores: Tensor) -> Tensor:
        """Scores [B, H, N] for heads that choose together: those of the head that wants most."""
        if self.retrieval.per_head:
            return scores
        return scores.amax(1, keepdim=True).expand(scores.shape)

    def _hits_of(self, seq: SeqId, blocks: int, device) -> Tensor:
        if seq not in self._hits or len(self._hits[seq]) != blocks:
            self._hits[seq] = torch.zeros(blocks, dtype=torch.int32, device=device)
        return self._hits[seq]

    def heard(self) -> dict[SeqId, list[int]]:
        hits, self._hits = self._hits, {}
        return {seq: counts.tolist() for seq, counts in hits.items()}


def choice_for(digests: NoDigests) -> NoChoice:
    """The choice that goes with these digests, or the one that leaves nothing out."""
    return Choice(digests) if isinstance(digests, Digests) else NoChoice()
