"""What a decoded token reads: chosen anew in every layer, by each key/value head for itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.cache.digests import Digests, NoDigests
from kvlab.cache.step import Extent
from kvlab.cache.sum import Sum
from kvlab.cache.tables import DecodeTables, room_for, upload
from kvlab.cache.watch import Watch
from kvlab.core import SeqId
from kvlab.kernel import attend_sdpa, select_ref
from kvlab.kernel.select_ref import HOLE


class NoChoice:
    """Everything is read."""

    selects = False
    candidates: Candidates | None = None  # what lies on the device; another object, another graph
    keep = sys.maxsize  # sealed blocks that a head reads

    def applies(self, e: Extent, window: int | None) -> bool:
        """Whether this step reads a choice of the past in a layer with this sliding window."""
        return False

    def prepare(self, extents: list[Extent], tables: dict[SeqId, BlockTable]) -> None:
        """Before a step through the kernels: bring what lies on the device up to date."""

    def tell(self, watch: Watch, tables: dict[SeqId, BlockTable]) -> list[tuple[SeqId, int]]:
        """End a step: the share of heads that chose a block stands for its attention.

        Returns the host blocks (sequence, index) that should come back to the device.
        """
        return []

    def abort(self) -> None:
        """Forget what a step that failed has chosen."""

    def read_tokens(self, tables: dict[SeqId, BlockTable]) -> int:
        """Tokens that a head reads for the next token of every sequence."""
        return sum(self._reads(table) for table in tables.values())

    def _reads(self, table: BlockTable) -> int:
        sealed, fill = divmod(table.length, table.block_size)
        held = sealed - table.ids[:sealed].count(None)
        return min(held, self.keep) * table.block_size + fill


class Choice(NoChoice):
    """Digests -> scores -> tables of the chosen blocks -> attention over them.

    A chunk reads everything; so does a single token in a layer with a sliding window of its own.
    """

    selects = True

    def __init__(self, digests: Digests):
        self.digests, self.retrieval = digests, digests.retrieval
        self.pool, self.away = digests.pool, digests.away
        self.block_size = self.pool.geometry.block_size
        self.keep, self.first, self.last = self.retrieval.blocks(self.block_size)
        self._hits: dict[SeqId, Tensor] = {}  # since policies last heard; int32 [blocks or more]
        self._steps = 0

    def applies(self, e: Extent, window: int | None) -> bool:
        return e.single and window is None and e.past // self.block_size > self.keep

    def joined(self, scores: Tensor) -> Tensor:
        """Scores [B, H, N] for heads that choose together: those of the head that wants most."""
        if self.retrieval.per_head:
            return scores
        return scores.amax(1, keepdim=True).expand(scores.shape)

    @property
    def budget(self) -> dict:
        return {"keep": self.keep, "first": self.first, "last": self.last}

    # ---- plain torch, one sequence at a time

    def attend(
        self, layer: int, e: Extent, table: BlockTable, q: Tensor, scale: float,
        window: int | None, total: Sum,
    ) -> None:
        """Add the attention of q [Hq, 1, D] over the chosen sealed blocks to `total`."""
        places = self.away.places(e.seq, table, e.past // self.block_size)
        if all(place == HOLE for place in places):
            return  # a short window or a small budget kept no sealed block
        index = self.chosen(layer, e, places, q)
        wanted, at = index.unique(return_inverse=True)
        contents = self._read(layer, [places[i] for i in wanted.tolist()])
        heads = torch.arange(len(index), device=q.device)[:, None]
        keys, values = (x[at, :, heads].flatten(1, 2).transpose(0, 1) for x in contents)
        total.add(attend_sdpa.attend(q, keys, values, scale=scale))

    def _read(self, layer: int, places: list[int]) -> Iterator[Tensor]:
        """Keys and values [n, S, H, D] of blocks, wherever they lie."""
        near = [i for i, place in enumerate(places) if place >= 0]
        far = [i for i, place in enumerate(places) if place < 0]
        parts = []
        if near:  # a copy: the next read may take the same workspace
            parts.append([x.clone() for x in self.pool.read(layer, [places[i] for i in near])])
        if far:
            parts.append(self.away.shelf.read(layer, [-2 - places[i] for i in far]))
        order = torch.tensor(near + far, device=self.pool.device).argsort()
        for pair in zip(*parts):
            yield torch.cat(pair).unflatten(0, (-1, self.block_size))[order]

    def chosen(self, layer: int, e: Extent, places: list[int], q: Tensor) -> Tensor:
        """Logical indices [H, n] of the blocks that each head reads, ascending."""
        sealed = len(places)
        held = [place if place == HOLE else i for i, place in enumerate(places)]
        where = torch.tensor([held], dtype=torch.int32, device=q.device)
        count = torch.tensor([sealed], device=q.device)
        there = [i for i in held if i != HOLE]
        digests = self.digests.read(layer, e.seq, there)
        scores = q.new_full((1, digests.shape[1], sealed), -torch.inf, dtype=torch.float32)
        scores[0][:, there] = select_ref.bound(q[:, 0], digests, self.retrieval.group)
        hits = self._counter(e.seq, sealed)
        got = select_ref.choose(
            self.joined(scores), where, count, hits=hits[None, :sealed], **self.budget
        )
        return got.device[0, :, : int(got.n_device[0, 0])].long()

    def _counter(self, seq: SeqId, blocks: int) -> Tensor:
        old = self._hits.get(seq)
        if old is None or len(old) < blocks:
            self._hits[seq] = torch.zeros(room_for(blocks), dtype=torch.int32,
                                          device=self.pool.device)  # fmt: skip
            if old is not None:
                self._hits[seq][: len(old)] = old
        return self._hits[seq]

    # ---- kernels, one token in every row of a batch

    def prepare(self, extents: list[Extent], tables: dict[SeqId, BlockTable]) -> None:
        count, longest = len(extents), max(e.past // self.block_size for e in extents)
        if self.candidates is None or not self.candidates.fits(count, longest):
            self.candidates = Candidates(count, room_for(longest), self.pool.device)
            self._hits = {}
        if list(self._hits) != [e.seq for e in extents]:
            self.abort()
        self._hits = {e.seq: self.candidates.hits[row] for row, e in enumerate(extents)}
        for row, e in enumerate(extents):
            table, away = tables[e.seq], self.away.tables[e.seq]
            rows = self.digests.rows[e.seq]
            state = e.seq, table.changes, away.changes, len(rows)
            if self.candidates.stale(row, state):
                places = self.away.places(e.seq, table, len(rows))
                self.candidates.refresh(row, state, places, rows)
        counts = np.array([e.past // self.block_size for e in extents], dtype=np.int32)
        upload(counts, self.candidates.counts)

    def decode(
        self, layer: int, q: Tensor, tails, t: DecodeTables, scale: float
    ) -> Tensor:
        """Attention of q [B, Hq, D] over the chosen blocks and the open tails, [B, Hq, D].

        Waits for nothing and depends on nothing but tensors that stay in place.
        """
        pool, c = self.pool, self.candidates
        scores = pool.fused.score(
            q, self.digests.store.layer(layer), c.rows, c.counts, group=self.retrieval.group
        )
        got = pool.fused.choose(self.joined(scores), c.where, c.counts, hits=c.hits, **self.budget)
        out, lse = pool.fused.paged_decode(
            q, pool.sealed.layer(layer), pool.format, got.device, got.n_device, tails,
            t.open_slot, t.open_now, scale=scale,
        )
        host = got.host, got.n_host
        return self.away.decode(layer, q, out, lse, None, scale, host)

    # ---- after a step

    def tell(self, watch: Watch, tables: dict[SeqId, BlockTable]) -> list[tuple[SeqId, int]]:
        self._steps += bool(self._hits)
        if not self._hits or self._steps % self.retrieval.listen:
            return []
        g, wanted = self.pool.geometry, []
        heard, self._hits = self._hits, {}
        for seq, hits in heard.items():
            if seq not in tables:  # closed since
                continue
            counts = hits.cpu().numpy()[: tables[seq].length // self.block_size]
            places = np.array(self.away.places(seq, tables[seq], len(counts)), dtype=np.int64)
            near = np.flatnonzero(places >= 0)
            shares = counts[near] / (g.kv_heads * g.layers * self.retrieval.listen)
            watch.shares(places[near].tolist(), shares.tolist())
            hot = swaps(counts, places, self.retrieval.fetches)
            wanted += [(seq, index) for index in hot.tolist()]
            hits.zero_()
        return wanted

    def abort(self) -> None:
        for hits in self._hits.values():
            hits.zero_()
        self._hits = {}

    def _reads(self, table: BlockTable) -> int:
        sealed, fill = divmod(table.length, table.block_size)
        return min(sealed, self.keep) * table.block_size + fill


def swaps(counts: np.ndarray, places: np.ndarray, most: int) -> np.ndarray:
    """Indices of host blocks, at most `most`, each chosen twice as often as the device block that
    would leave for it, if the least chosen one leaves: a margin, since both ways cost a copy."""
    far, near = np.flatnonzero(places < HOLE), np.flatnonzero(places >= 0)
    far = far[np.argsort(-counts[far], kind="stable")][:most]
    cold = np.sort(counts[near])[: len(far)]
    far = far[: len(cold)]
    return far[counts[far] > 2 * cold]


class Candidates:
    """The sealed blocks of a batch in logical order, on the device: written in place.

    where   int32 [B, N]: device block, hole, or host key, as `select_ref.HOLE` says
    rows    int32 [B, N]: their digests
    counts  int32 [B]
    hits    int32 [B, N]: heads of all layers that chose a block since policies last heard
    """

    def __init__(self, rows: int, blocks: int, device):
        with torch.inference_mode(False):
            tables = torch.zeros(3, rows, blocks, dtype=torch.int32, device=device)
            self.counts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.where, self.rows, self.hits = tables
        self._held = [np.zeros((2, 0), dtype=np.int32) for _ in range(rows)]
        self._seen: list[tuple | None] = [None] * rows

    def fits(self, rows: int, blocks: int) -> bool:
        return self.where.shape[0] == rows and blocks <= self.where.shape[1]

    def stale(self, row: int, state: tuple) -> bool:
        """Whether a row was last refreshed in another state of its sequence."""
        return self._seen[row] != state

    def refresh(
        self, row: int, state: tuple, places: list[int], digests: list[int | None]
    ) -> None:
        """Take over one sequence as it is before the step."""
        self._seen[row], old = state, self._held[row]
        new = np.array([places, [HOLE if d is None else d for d in digests]], dtype=np.int32)
        same = min(old.shape[1], new.shape[1])
        changed = np.flatnonzero((old[:, :same] != new[:, :same]).any(0))
        begin = int(changed[0]) if len(changed) else same  # mostly, one block is added
        if begin < new.shape[1]:
            for host, device in zip(new, (self.where, self.rows)):
                upload(np.ascontiguousarray(host[begin:]), device[row, begin : new.shape[1]])
        self._held[row] = new


def choice_for(digests: NoDigests) -> NoChoice:
    """The choice that goes with these digests, or the one that leaves nothing out."""
    return Choice(digests) if isinstance(digests, Digests) else NoChoice()
