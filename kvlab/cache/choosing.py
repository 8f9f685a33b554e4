"""A layer group whose heads choose tokens: what leaves in a chunk is never stored.

A chunk that exceeds the budget is chosen from within the step. Layer after layer, the tokens held
before and the chunk's own are scored right after the layer's attention, and those that stay are
sealed into fresh blocks. So beside old and new kept tokens there is one layer's chunk, unquantized;
a token of the chunk is rounded once; and since the old blocks live until `commit`, a step can be
undone. Decoded tokens are stored as ever, and chosen among between steps (`cache/repack.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.blocks import Holding, slide
from kvlab.cache.bytes import GroupBytes
from kvlab.cache.group import LayerGroup
from kvlab.cache.lazy import window_share
from kvlab.core import BadInput, SeqId
from kvlab.source import Ask


class ChoosingHolding(Holding):
    """Which blocks such sequences hold. Where one choice is made for all layers, it waits for the
    last of them, and steps are as ever.

    seen: tokens of the sequences of a step, once it is over; keep: those that each may hold then.
    """

    seen: dict[SeqId, int] = {}
    keep: dict[SeqId, int] = {}

    def needs(self, seq, count):
        return ()  # the ledger is unbounded: the budget is kept by choosing

    def step(self, seq, count):
        table, size = self.tables[seq], self.block_size
        sealed, fill = divmod(table.length + count, size)
        whole, keep = table.length // size, max(0, self.keep[seq] - fill) // size
        blocks = self.storage.chooser.columns(table.ids[:whole], sealed - whole, keep)
        if count < 2 or blocks is None or self.storage.chooser.choice == "all":
            return super().step(seq, count)
        new, old = self.ledger.allocate(blocks + (fill > 0), seq), table.length % size
        step = self.record(seq, table.length, old, count, table.ids[-1] if old else None, new, [],
                           new[-1] if fill else None, fill, chosen=new[:blocks], keep=keep,
                           old=table.ids[:whole])  # fmt: skip
        return self.backed(step)

    def commit(self, step, publish=True):
        if step.chosen is None:
            super().commit(step, publish)
            return
        table, size, chooser = self.tables[step.seq], self.block_size, self.storage.chooser
        old, length = list(table.ids), table.length + step.count
        used = chooser.used(step)  # heads may do with fewer blocks than there could be
        self.ledger.free(step.chosen[used:])
        table.ids[:] = [*step.chosen[:used], *step.new[len(step.chosen) :]]
        table.length = used * size + step.rest_count
        table.changes += 1
        self.ledger.seal(step.chosen[:used], depth=range(used))
        gone = length // size - len(step.old) + chooser.held(step.old) - step.keep
        self.room.evictions += gone
        chooser.chose(step, length - table.length, self.seen[step.seq])
        self.release(step.seq, old[::-1])
        slide(self, step.seq)


class ChoosingBytes(GroupBytes):
    """What stands behind them."""

    def take(self, step):
        if step.chosen is None:
            super().take(step)
            return
        if step.rest is not None:
            self.pool.open_block(step.rest)
        old = step.old
        first = old[0] in self.pool.apart.rows if old else self.chooser.whole(step.seq)
        if not self.pool.by_head:  # else rows come with the choice
            self.pool.commit(step.chosen, first)
        step.sealing_ids = self.pool.ids(step.chosen)
        step.held_ids = self.pool.ids(old)

    def undo(self, step):
        if step.chosen is None:
            super().undo(step)
            return
        self.watch.abort()
        self.chooser.undo(step)
        self.pool.drop(step.new)


class ChoosingGroup(LayerGroup):
    """How such a group attends."""

    def attend(self, ask: Ask) -> Tensor:
        e = ask.extent
        out, lse = self.over_sources(ask).result()
        repeated = self.watch.scorer.span is not None  # by queries that are no prompt's
        if self.chooser.budget.looks and not e.single and not repeated:
            self._look_around(ask, lse)
        if e.chosen is not None:
            self._choose(ask, lse)
            return out
        if not e.single or self.watch.looking:
            tokens = (e.past + e.count) // self.block_size * self.block_size
            k, v, there = self._all(ask)
            seen = self.held.seen[e.seq]
            scored = len(k) if self.watch.all else tokens
            scores = self.watch.scores(ask, lse, k, v, scored, seen, there)
            self.watch.note(e.seq, scores, e.count, len(k) - tokens, seen)
        self.store(ask)
        return out

    def _look_around(self, ask: Ask, lse: Tensor) -> None:
        k, _, _ = self._all(ask)
        how = {"scale": ask.scale, "softcap": ask.softcap}
        self.watch.notice(ask.extent.seq, window_share(ask.q, k, lse, self.chooser.window, **how))

    def hear(self, ask: Ask, part) -> None:
        """All tokens of a layer are scored at once, after its attention."""

    def check_window(self, window: int) -> None:
        raise BadInput("cache.evict", "token", f"a layer of this model looks back {window} tokens,"
                       " and a head's own tokens stand side by side; cache.evict=block")

    def _all(self, ask: Ask) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [n, H, D] of all tokens that this layer has, the step's own the last, and
        which of them each head has, bool [n, H] (None: all)."""
        layer, e = ask.layer, ask.extent
        k, v = self.sources.tail.joined(layer, e, ask.k, ask.v)
        held = self.tables[e.seq].ids[: e.past // self.block_size]
        if not held:
            return k, v, None
        ids = self.pool.ids(held) if e.held_ids is None else e.held_ids
        there = self.pool.present(layer, held)
        if there is not None:
            there = torch.cat((there, there.new_ones(len(k), there.shape[1])))
        return *map(torch.cat, zip(self.pool.read(layer, held, ids), (k, v))), there

    def _choose(self, ask: Ask, lse: Tensor | None) -> None:
        """Score all tokens that this layer has, and store those that stay."""
        layer, e = ask.layer, ask.extent
        k, v, there = self._all(ask)
        tokens = len(k) - e.rest_count
        new = None
        if lse is not None:
            scored, seen = len(k) if self.watch.all else tokens, self.held.seen[e.seq]
            new = self.watch.scores(ask, lse, k, v, scored, seen, there)
        row = self.watch.row(e.seq, layer, new, tokens, e.count, e.rest_count)
        kept = self.chooser.stay(e, row, e.keep)
        if e.chosen:
            self.chooser.seal(layer, e.old, e.chosen, (k, v), kept, e.sealing_ids)
        if e.rest is not None:
            self.pool.write(layer, e.rest, 0, k[tokens:], v[tokens:])

    def store(self, ask: Ask) -> None:
        """Tokens that came without queries: the newest stay, as nothing is known of them."""
        if ask.extent.chosen is None:
            super().store(ask)
        else:
            self._choose(ask, None)

    @property
    def sealed_blocks(self):
        if not self.pool.by_head:
            return super().sealed_blocks
        return self.pool.sealed.live_rows / self.pool.count
