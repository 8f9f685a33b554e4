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

from kvlab.cache.group import LayerGroup
from kvlab.cache.repack import by_head
from kvlab.core import BadInput, BlockId, SeqId
from kvlab.source import Ask, Extent


class ChoosingGroup(LayerGroup):
    """See the module. Where one choice is made for all layers, it waits for the last of them."""

    def __init__(self, *given):
        super().__init__(*given)
        self.seen: dict[SeqId, int] = {}  # tokens of the sequences of this step, once it is over
        self.keep: dict[SeqId, int] = {}  # tokens that each of them may hold then

    def needs(self, seq: SeqId, count: int) -> list[int]:
        return []  # the ledger is unbounded: the budget is kept by choosing

    def begin(self, seq: SeqId, count: int) -> Extent:
        table, size = self.tables[seq], self.block_size
        sealed, fill = divmod(table.length + count, size)
        blocks = min(sealed, max(0, self.keep[seq] - fill) // size)
        if count < 2 or blocks == sealed or self.chooser.choice == "all":
            return super().begin(seq, count)
        new = self.ledger.allocate(blocks + (fill > 0), owner=seq)
        old = table.length % size
        e = Extent(seq, table.length, old, count, table.ids[-1] if old else None, new, [],
                   new[-1] if fill else None, fill, chosen=new[:blocks])  # fmt: skip
        try:
            if fill:
                self.pool.open_block(e.rest)
            self.pool.sealed.commit(e.chosen)
            e.sealing_ids = self.pool.ids(e.chosen)
            e.held_ids = self.pool.ids(self._sealed(e))
        except BaseException:  # the allocator's, too
            self.abort(e)
            raise
        return e

    def _sealed(self, e: Extent) -> list[BlockId]:
        return self.tables[e.seq].ids[: e.past // self.block_size]

    def attend(self, ask: Ask) -> Tensor:
        e = ask.extent
        self.watch.seq = e.seq
        if e.chosen is None:
            return super().attend(ask)
        out, lse = self.over_sources(ask).result()
        self._choose(ask, lse)
        return out

    def check_window(self, window: int) -> None:
        raise BadInput("cache.evict", "token", f"a layer of this model looks back {window} tokens,"
                       " and a head's own tokens stand side by side; cache.evict=block")

    def _choose(self, ask: Ask, lse: Tensor) -> None:
        """Score all tokens that this layer has, and store those that stay."""
        layer, e = ask.layer, ask.extent
        new = self.sources.tail.joined(layer, e, ask.k, ask.v)
        held = self._sealed(e)
        tokens = len(held) * self.block_size + len(new[0]) - e.rest_count
        if ask.q is not None:
            self.watch.tokens(ask.q, *new, ask.scale)
        index = self.chooser.stay(e, layer, lse, tokens, len(e.chosen) * self.block_size)
        if held:
            new = map(torch.cat, zip(self.pool.read(layer, held, e.held_ids), new))
        k, v = new
        if e.chosen:
            kept = (by_head(x, index) for x in (k, v))
            self.pool.seal(layer, e.chosen, *kept, e.sealing_ids)
        if e.rest is not None:
            self.pool.write(layer, e.rest, 0, k[tokens:], v[tokens:])

    def commit(self, e: Extent) -> None:
        if e.chosen is None:
            super().commit(e)
            return
        table, size = self.tables[e.seq], self.block_size
        old, length = list(table.ids), table.length
        table.ids[:] = e.new
        table.length = len(e.chosen) * size + e.rest_count
        table.changes += 1
        self.ledger.seal(e.chosen, depth=range(len(e.chosen)))
        self.evictions += (length + e.count - table.length) // size
        self.chooser.chose(e, length + e.count - table.length, self.seen[e.seq])
        self._release(e.seq, old[::-1])
        self._slide(e.seq)

    def abort(self, e: Extent) -> None:
        if e.chosen is None:
            super().abort(e)
            return
        self.watch.abort()
        self.chooser.undo(e)
        self.pool.drop(e.new)
        self.ledger.free(e.new)

    def store(self, ask: Ask) -> None:
        """Tokens that came without queries: the newest stay, as nothing is known of them."""
        if ask.extent.chosen is None:
            super().store(ask)
        else:
            self._choose(ask, None)

