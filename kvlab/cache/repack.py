"""Tokens chosen by layer and key/value head, gathered and sealed anew into dense blocks.

A block id names the same place in every layer and head, but after a repack not the same tokens:
slot j of a block holds in each head the token that this head kept as its j-th. All keep equally
many, so one table serves all of them, and every byte beyond the budget is given back at once.
Keys keep their original positions, as with any eviction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.blocks import BlockLedger, BlockTable
from kvlab.cache.heads import (
    Kept,
    adaptive,
    best_of_each,
    protect,
    protected_blocks,
)
from kvlab.cache.recent import Recent, patch
from kvlab.cache.scores import scorer_of
from kvlab.cache.standing import Standing
from kvlab.cache.together import seal_layers
from kvlab.cache.tokens import TokenWatch
from kvlab.cache.watch import Watch
from kvlab.core import BadInput, BlockId, KvlabError, SeqId
from kvlab.kernel import best_ref
from kvlab.pool import BlockPool
from kvlab.source import Extent

MARGIN = 8  # while decoding, a sequence may exceed its share by an eighth of it, or by 4 blocks


class NoRepack:
    """Blocks are chosen, if anything is."""

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """`child` has what its parent has."""

    def close(self, seq: SeqId) -> None:
        """Forget a sequence."""

    def crop(self, seq: SeqId, length: int) -> None:
        """The table of a sequence ends at `length` now."""

    def whole(self, seq: SeqId) -> bool:
        """Whether no token of a sequence was given up."""
        return True

    def place(self, seq: SeqId, length: int) -> int:
        """Where in the table the first `length` tokens of a sequence end. Raises `KvlabError` where
        some of them were given up and others not."""
        return length


class Past(NamedTuple):
    """What a sequence gave up: `seen` tokens at its last repack, `gone` of them."""

    seen: int
    gone: int


class Repack:
    """The choice of tokens for the sequences of one layer group, and its execution.

    watch: the scores; window, recent: what is always kept. choice: "head" chooses for each layer
    and key/value head, "layer" for each layer, "all" once for all.
    """

    def __init__(
        self, pool: BlockPool, ledger: BlockLedger, watch: TokenWatch, spec, recent: Recent
    ):
        self.pool, self.ledger, self.watch, self.window = pool, ledger, watch, spec.window
        self.recent = recent
        self.choice, self.size, self.budget = spec.choice, pool.block_size, spec.budget
        self.past: dict[SeqId, Past] = {}
        self._coming: dict[SeqId, list[Standing]] = {}  # of the layers of a step that have chosen
        self._plan: dict[SeqId, list[list[int]]] = {}  # blocks of each head after such a step

    # ---- the life of a sequence

    def fork(self, parent: SeqId, child: SeqId) -> None:
        self.watch.standings.fork(parent, child)
        if parent in self.past:
            self.past[child] = self.past[parent]

    def close(self, seq: SeqId) -> None:
        self.watch.standings.close(seq)
        self.past.pop(seq, None)

    def crop(self, seq: SeqId, length: int) -> None:
        """Forget how tokens of the table from `length` on stand."""
        seen = length + self.past.get(seq, (0, 0))[1]
        self.watch.standings.cut(seq, length // self.size * self.size, length, seen)
        if not length:
            self.past.pop(seq, None)
            self.watch.standings.over.discard(seq)
            self.watch.standings.lazy.pop(seq, None)

    def whole(self, seq: SeqId) -> bool:
        """See `NoRepack.whole`."""
        return seq not in self.past

    def place(self, seq: SeqId, length: int) -> int:
        """See `NoRepack.place`."""
        seen, gone = self.past.get(seq, (0, 0))
        if 0 < length < seen:
            raise KvlabError(f"cannot crop to {length} tokens: some of the first {seen} were given "
                             f"up, by each head its own; crop to at least {seen}, or to 0")
        return max(0, length - gone)

    # ---- a step

    def over(self, table: BlockTable, keep: int, slack: bool) -> int:
        """Blocks to give up for `keep` tokens to stay; 0 within the `slack` of decoding."""
        sealed, fill = divmod(table.length, self.size)
        excess = self.held(table.ids[:sealed]) - max(0, keep - fill) // self.size
        allowed = max(4, keep // self.size // MARGIN) if slack else 0
        return excess if excess > allowed else 0

    def held(self, blocks: list[BlockId]) -> int:
        """How many of `blocks` a head has, the mean of all, rounded up."""
        if not self.budget.by_head:
            return len(blocks)
        return -(-int(self.pool.held(blocks).sum()) // self.pool.count)

    def look(self, tables: dict[SeqId, BlockTable], keep: dict[SeqId, int]) -> bool:
        """Whether this step of single tokens is scored, for a repack will follow it."""
        ahead = self.watch.scorer.looks
        due = (n <= ahead or self.over(tables[seq], n - ahead, slack=True)
               for seq, n in keep.items())  # fmt: skip
        self.watch.looking = self.watch.scorer.decodes and any(due)
        return self.watch.looking

    def hear(self, seq: SeqId) -> None:
        """Take over what the step that ended tells of the sealed tokens of `seq`."""
        self.watch.stand(seq)

    def run(self, seq: SeqId, table: BlockTable, over: int, seen: int) -> list[BlockId]:
        """Keep all but `over` blocks' worth of the sealed tokens; returns the blocks to release.

        seen: tokens of the sequence, the given up ones included. An error of the allocator leaves
        everything as it was.
        """
        old = table.ids[: table.length // self.size]
        kept = self._chosen(seq, old, self.held(old) - over, table.length % self.size)
        new = self.ledger.allocate(kept.index.shape[-1] // self.size, owner=seq)
        try:
            self._gather(seq, old, new, kept)
        except BaseException:
            self.ledger.free(new)
            self.pool.drop(new)
            raise
        self.recent.repacked(seq, len(new))
        self.ledger.seal(new, depth=range(len(new)))
        table.ids[: len(old)] = new
        table.length -= (len(old) - len(new)) * self.size
        table.changes += 1
        self.watch.standings.choose(seq, kept, len(old) * self.size, self.size)
        gone = (len(old) - len(new)) * self.size
        self.past[seq] = Past(seen, self.past.get(seq, (0, 0))[1] + gone)
        return old

    def _chosen(self, seq: SeqId, blocks: list[BlockId], keep: int, fill: int) -> Kept:
        """The tokens that stay, `keep` blocks of a head on average, in the order of the table."""
        score = self.watch.standings.ranked(seq, len(blocks) * self.size)
        if not self.budget.by_head:
            return self._best(score, keep, fill)
        have = self.pool.held(blocks)
        return self._best(score, keep, fill, self._planned(have, keep, fill))

    def _planned(self, have, keep: int, fill: int) -> list[list[int]] | None:
        """Blocks of each head where the budget says so itself; have: what each has, [L, H]."""
        if self.budget.adapts:
            return None
        length = int(have.max()) * self.size + fill
        least = max(0, protected_blocks(self.window, length, self.size) - fill // self.size)
        return self.budget.blocks(have.tolist(), least, keep * have.size)

    def _best(
        self, score: Tensor, keep: int, fill: int, counts: list[list[int]] | None = None
    ) -> Kept:
        """score: fp32 [L, H, n] of the sealed tokens, of which a head keeps `keep` blocks, or as
        many as `counts` says; fill: tokens behind them that all stay."""
        if self.choice != "head":
            score = score.mean(1, keepdim=True).expand_as(score)
        if self.choice == "all":
            score = score.mean(0, keepdim=True).expand_as(score)
        score = score.clone()
        if self.budget.by_head:
            protect(score, self.window, fill)
            if counts is None:
                budget = self.budget
                counts = adaptive(score, keep, self.size, budget.floor, budget.across)
            return best_of_each(score, counts, self.size)
        most = torch.finfo(score.dtype).max if self.recent.most else torch.inf
        for begin, end in self.window.protected(score.shape[-1] + fill):
            score[..., begin:end] = most
        newest = min(keep, self.recent.most) * self.size  # the residual comes before a window
        score[..., score.shape[-1] - newest :] = torch.inf
        return Kept((self.pool.fused or best_ref).best_of(score, keep * self.size))

    # ---- within a step

    def columns(self, old: list[BlockId], new: int, keep: int) -> int | None:
        """Blocks to allocate for a step that seals `new` ones behind `old`, of which a head keeps
        `keep` on average; None where all of them stay."""
        sealed = len(old) + new
        if not self.budget.by_head:
            return None if keep >= sealed else keep
        if keep * self.pool.count >= int(self.pool.held(old).sum()) + new * self.pool.count:
            return None
        return min(sealed, keep * self.pool.places[1]) if self.budget.adapts else sealed

    def stay(self, e: Extent, row: Standing, keep: int) -> Kept:
        """Which tokens of some layers stay, `keep` blocks of a head on average; those of the open
        tail all do.

        row: how they stand. Once for all layers in order; `chose` or `undo` ends the step.
        """
        rows = self._coming.setdefault(e.seq, [])
        counts = None
        if self.budget.by_head and not self.budget.adapts:
            if not rows:
                old = self.pool.held(e.old)
                new = row.tokens // self.size - len(e.old)
                self._plan[e.seq] = self._planned(old + new, keep, e.rest_count)
            done = sum(len(r.score) for r in rows)
            counts = self._plan[e.seq][done : done + len(row.score)]
        kept = self._best(row.score, keep, e.rest_count, counts)
        rows.append(row.chosen(kept, self.size))
        return kept

    def used(self, e: Extent) -> int:
        """All layers have chosen: how many of `e.chosen` some head holds."""
        return max(row.tokens for row in self._coming[e.seq]) // self.size

    def chose(self, e: Extent, gone: int, seen: int) -> None:
        """All layers have chosen: `gone` tokens less in the table, of the `seen` so far."""
        rows, _ = self._coming.pop(e.seq), self._plan.pop(e.seq, None)
        rows = [row.padded(max(r.tokens for r in rows)) for row in rows]
        self.watch.chose(e.seq, rows, seen)
        self.past[e.seq] = Past(seen, self.past.get(e.seq, (0, 0))[1] + gone)

    def undo(self, e: Extent) -> None:
        self._coming.pop(e.seq, None)
        self._plan.pop(e.seq, None)

    def _gather(
        self, seq: SeqId, old: list[BlockId], new: list[BlockId], kept: Kept
    ) -> None:
        """Seal the tokens `kept` of the blocks `old` into the blocks `new`, layer by layer."""
        if not new:
            return
        pool = self.pool
        if not pool.by_head:  # else rows come with the choice
            pool.commit(new, first=old[0] in pool.apart.rows)
        read, written, newest = pool.ids(old), pool.ids(new), self.recent.places(seq)
        for layer in range(pool.geometry.layers):
            k, v = pool.read(layer, old, read)
            patch(pool, layer, newest, k, v)
            seal_layers(pool, layer, old, new, k[None], v[None], kept.layers(layer, 1), written)


def choosing(
    ledger: BlockLedger, pool: BlockPool, spec, rotary: Tensor | None, recent: Recent
) -> tuple[Watch | TokenWatch, NoRepack]:
    """Who hears of attention in a layer group, and who chooses tokens by it."""
    if spec.by_token:
        watch = TokenWatch(scorer_of(ledger.policy.by_token), pool)
        chooser = Repack(pool, ledger, watch, spec, recent)
    else:
        watch, chooser = Watch(ledger, pool.geometry.layers, pool.block_size), NoRepack()
    if watch.active:
        watch.scorer.rotary, watch.scorer.softcap = rotary, pool.shape.softcap
        if pool.shape.softcap is not None and not watch.scorer.caps:
            raise BadInput("policy", ledger.policy.name, "scores by logits without the soft cap of "
                           f"{pool.shape.softcap:g} that this model puts on them; policy=snapkv")
    return watch, chooser
