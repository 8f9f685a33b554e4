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
from kvlab.cache.repack import by_head, still_apart
from kvlab.core import BadInput, BlockId, SeqId
from kvlab.source import Ask, Extent


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
        blocks = min(sealed, max(0, self.keep[seq] - fill) // size)
        if count < 2 or blocks == sealed or self.storage.chooser.choice == "all":
            return super().step(seq, count)
        new, old = self.ledger.allocate(blocks + (fill > 0), seq), table.length % size
        step = self.record(seq, table.length, old, count, table.ids[-1] if old else None, new, [],
                           new[-1] if fill else None, fill, chosen=new[:blocks])  # fmt: skip
        return self.backed(step)

    def commit(self, step, publish=True):
        if step.chosen is None:
            super().commit(step, publish)
            return
        table, size = self.tables[step.seq], self.block_size
        old, length = list(table.ids), table.length + step.count
        table.ids[:] = step.new
        table.length = len(step.chosen) * size + step.rest_count
        table.changes += 1
        self.ledger.seal(step.chosen, depth=range(len(step.chosen)))
        self.room.evictions += (length - table.length) // size
        self.storage.chooser.chose(step, length - table.length, self.seen[step.seq])
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
        held = self.sealed(step)
        first = held[0] in self.pool.apart.rows if held else self.chooser.whole(step.seq)
        self.pool.commit(step.chosen, first)
        step.sealing_ids = self.pool.ids(step.chosen)
        step.held_ids = self.pool.ids(held)

    def sealed(self, step: Extent) -> list[BlockId]:
        """The sequence's sealed blocks before the step."""
        return self.tables[step.seq].ids[: step.past // self.pool.block_size]

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
        self.watch.seq = e.seq
        if e.chosen is None:
            return super().attend(ask)
        out, lse = self.over_sources(ask).result()
        self._choose(ask, lse)
        return out

    def hear(self, ask: Ask, part) -> None:
        """All tokens are scored anew in `_choose`, if the step chooses."""
        if ask.extent.chosen is None:
            super().hear(ask, part)

    def check_window(self, window: int) -> None:
        raise BadInput("cache.evict", "token", f"a layer of this model looks back {window} tokens,"
                       " and a head's own tokens stand side by side; cache.evict=block")

    def _choose(self, ask: Ask, lse: Tensor) -> None:
        """Score all tokens that this layer has, and store those that stay."""
        layer, e = ask.layer, ask.extent
        k, v = self.sources.tail.joined(layer, e, ask.k, ask.v)
        held = self.storage.sealed(e)
        if held:
            k, v = map(torch.cat, zip(self.pool.read(layer, held, e.held_ids), (k, v)))
        tokens = len(k) - e.rest_count
        row = self.watch.row(e.seq, layer, k, v, tokens, ask.q, lse, ask.scale)
        index = self.chooser.stay(e, row, len(e.chosen) * self.block_size)
        if e.chosen:
            kept = (by_head(x, index) for x in (k, v))
            count = still_apart(self.pool, layer, held, index)
            self.pool.seal(layer, e.chosen, *kept, e.sealing_ids, count)
        if e.rest is not None:
            self.pool.write(layer, e.rest, 0, k[tokens:], v[tokens:])

    def store(self, ask: Ask) -> None:
        """Tokens that came without queries: the newest stay, as nothing is known of them."""
        if ask.extent.chosen is None:
            super().store(ask)
        else:
            self._choose(ask, None)

