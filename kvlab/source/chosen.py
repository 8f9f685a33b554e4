"""What a decoded token reads: chosen anew in every layer, by each key/value head for itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.core import SeqId
from kvlab.kernel import select_ref
from kvlab.kernel.select_ref import HOLE
from kvlab.source.base import Ask, Part, Read, Source, Token
from kvlab.source.digests import Digests
from kvlab.source.step import Extent
from kvlab.source.tables import room_for, upload


class Choice(Source):
    """Digests -> scores -> tables of the chosen blocks -> attention over them.

    It stands for the sealed blocks on the device and on the host, and reads them through their own
    sources: all of them for a chunk, and for a single token in a layer with a sliding window.
    candidates: what lies on the device; another object, another graph.
    """

    obstacle = ""

    def __init__(self, digests: Digests):
        self.digests, self.retrieval = digests, digests.retrieval
        self.host, self.sealed = digests.host, digests.host.sealed
        self.pool, self.tables = digests.pool, digests.tables
        self.block_size = self.pool.geometry.block_size
        self.keep, self.first, self.last = self.retrieval.blocks(self.block_size)
        self.candidates: Candidates | None = None
        self._hits: dict[SeqId, Tensor] = {}  # since policies last heard; int32 [blocks or more]
        self._steps = 0

    def applies(self, ask: Ask) -> bool:
        """Whether this step reads a choice of the past."""
        plain = ask.extent.single and ask.window is None and ask.before is None
        return plain and ask.extent.past // self.block_size > self.keep

    def joined(self, scores: Tensor) -> Tensor:
        """Scores [B, H, N] for heads that choose together: those of the head that wants most."""
        if self.retrieval.per_head:
            return scores
        return scores.amax(1, keepdim=True).expand(scores.shape)

    @property
    def budget(self) -> dict:
        return {"keep": self.keep, "first": self.first, "last": self.last}

    # ---- plain torch, one sequence at a time

    def parts(self, ask: Ask) -> Iterator[Part]:
        if self.applies(ask):
            yield from self._chosen_part(ask)
        else:
            yield from self.host.parts(ask)
            yield from self.sealed.parts(ask)

    def _chosen_part(self, ask: Ask) -> Iterator[Part]:
        e = ask.extent
        places = self.host.tables.places(e.seq, self.tables[e.seq], e.past // self.block_size)
        if all(place == HOLE for place in places):
            return  # a short window or a small budget kept no sealed block
        index = self.chosen(ask.layer, e, places, ask.q)
        wanted, at = index.unique(return_inverse=True)
        contents = self._read(ask.layer, [places[i] for i in wanted.tolist()])
        heads = torch.arange(len(index), device=ask.q.device)[:, None]
        yield Part(*(x[at, :, heads].flatten(1, 2).transpose(0, 1) for x in contents))

    def _read(self, layer: int, places: list[int]) -> Iterator[Tensor]:
        """Keys and values [n, S, H, D] of blocks, wherever they lie."""
        near = [i for i, place in enumerate(places) if place >= 0]
        far = [i for i, place in enumerate(places) if place < 0]
        parts = []
        if near:  # a copy: the next read may take the same workspace
            parts.append([x.clone() for x in self.pool.read(layer, [places[i] for i in near])])
        if far:
            parts.append(self.host.shelf.read(layer, [-2 - places[i] for i in far]))
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

    def prepare(self, extents: list[Extent], rows: int) -> None:
        count, longest = len(extents), max(e.past // self.block_size for e in extents)
        if self.candidates is None or not self.candidates.fits(count, longest):
            self.candidates = Candidates(count, room_for(longest), self.pool.device)
            self._hits = {}
        if list(self._hits) != [e.seq for e in extents]:
            self._forget()
        self._hits = {e.seq: self.candidates.hits[row] for row, e in enumerate(extents)}
        for row, e in enumerate(extents):
            table, away = self.tables[e.seq], self.host.tables.of[e.seq]
            rows = self.digests.rows[e.seq]
            state = e.seq, table.changes, away.changes, len(rows)
            if self.candidates.stale(row, state):
                places = self.host.tables.places(e.seq, table, len(rows))
                self.candidates.refresh(row, state, places, rows)
        counts = np.array([e.past // self.block_size for e in extents], dtype=np.int32)
        upload(counts, self.candidates.counts)

    def in_place(self) -> list:
        return [self.candidates]

    def decode(self, ask: Token) -> list[Read]:
        pool, c = self.pool, self.candidates
        scores = pool.fused.score(
            ask.q, self.digests.store.layer(ask.layer), c.rows, c.counts,
            group=self.retrieval.group,
        )
        got = pool.fused.choose(self.joined(scores), c.where, c.counts, hits=c.hits, **self.budget)
        near = self.sealed.decode_over(ask, got.device, got.n_device)
        if not self.host.shelf.keeps:
            return [near]
        return [self.host.decode_over(ask, got.host, got.n_host), near]

    # ---- after a step

    def tell(self, watch) -> list[tuple[SeqId, int]]:
        """The share of heads that chose a block stands for its attention."""
        self._steps += bool(self._hits)
        if not self._hits or self._steps % self.retrieval.listen:
            return []
        g, wanted = self.pool.geometry, []
        heard, self._hits = self._hits, {}
        for seq, hits in heard.items():
            if seq not in self.tables:  # closed since
                continue
            table = self.tables[seq]
            counts = hits.cpu().numpy()[: table.length // self.block_size]
            places = np.array(self.host.tables.places(seq, table, len(counts)), dtype=np.int64)
            near = np.flatnonzero(places >= 0)
            shares = counts[near] / (g.kv_heads * g.layers * self.retrieval.listen)
            watch.shares(places[near].tolist(), shares.tolist())
            hot = swaps(counts, places, self.retrieval.fetches)
            wanted += [(seq, index) for index in hot.tolist()]
            hits.zero_()
        return wanted

    def abort(self, e: Extent) -> None:
        self._forget()

    def _forget(self) -> None:
        """What a step that failed has chosen."""
        for hits in self._hits.values():
            hits.zero_()
        self._hits = {}

    # ---- accounts

    @property
    def workspace_nbytes(self) -> int:
        return 0 if self.candidates is None else self.candidates.nbytes

    def reads(self, table: BlockTable) -> int:
        """Tokens that a head reads of the past for the next token."""
        sealed, fill = divmod(table.length, self.block_size)
        return min(sealed, self.keep) * self.block_size + fill


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

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.where, self.rows, self.hits, self.counts))

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
