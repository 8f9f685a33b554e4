"""A layer group whose heads choose tokens: what leaves in a chunk is never stored.

A chunk that exceeds the budget is chosen from within the step. Some layers at a time
(`cache/together.py`), the tokens held before and the chunk's own are scored once the layers have
attended, and those that stay are sealed into fresh blocks. So beside old and new kept tokens there
are those layers' chunks, unquantized; a token of the chunk is rounded once; and since the old
blocks live until `commit`, a step can be undone. Decoded tokens are stored as ever, and chosen
among between steps (`cache/repack.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.blocks import Holding, slide
from kvlab.cache.bytes import GroupBytes
from kvlab.cache.group import LayerGroup
from kvlab.cache.lazy import window_share
from kvlab.cache.recent import patch
from kvlab.cache.together import Together, seal_layers
from kvlab.core import BadInput, SeqId
from kvlab.source import Ask, over_all


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
        self.storage.recent.chose(step, used)
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
        step.recent = self.recent.places(step.seq)
        self.recent.begin(step, len(step.chosen))
        step.sealing_ids = self.pool.ids(step.chosen)
        step.held_ids = self.pool.ids(old)

    def undo(self, step):
        if step.chosen is None:
            super().undo(step)
            return
        self.watch.abort()
        self.chooser.undo(step)
        self.recent.abort(step)
        self.pool.drop(step.new)


class ChoosingGroup(LayerGroup):
    """How such a group attends."""

    def attend(self, ask: Ask) -> Tensor:
        e = ask.extent
        if e.chosen is not None:
            return self._attend_to_choose(ask)
        out, lse = self.over_sources(ask).result()
        self._look_around(ask, lse)
        if not e.single or self.watch.looking:
            tokens = (e.past + e.count) // self.block_size * self.block_size
            k, v, there = self._all(ask)
            seen = self.held.seen[e.seq]
            scored = len(k) if self.watch.all else tokens
            scores = self.watch.scores(ask, lse, k, v, scored, seen, there)
            self.watch.note(e.seq, scores, e.count, len(k) - tokens, seen)
        self.store(ask)
        return out

    def _attend_to_choose(self, ask: Ask) -> Tensor:
        """A layer of a chunk that is chosen from; the last of some that wait chooses for them."""
        some = self._waiting(ask)
        k, v = some.add(ask)
        if self.pool.by_head or self.sources.readers != [self.sources.sealed, self.sources.tail]:
            out, lse = self.over_sources(ask).result()
        else:
            out, lse = over_all(ask, k, v, self.pool.fused)
        self._look_around(ask, lse, k)
        some.note(ask, lse, self._present(ask, len(k)))
        if some.full:
            self.choose(ask, some)
        return out

    def _waiting(self, ask: Ask) -> Together:
        e = ask.extent
        if e.waiting is None:
            e.waiting = Together(self.pool, ask, self.watch.scorer.reads)
        return e.waiting

    def _look_around(self, ask: Ask, lse: Tensor, k: Tensor | None = None) -> None:
        repeats = self.watch.scorer.span is not None  # queries that are no prompt's
        if not self.chooser.budget.looks or ask.extent.single or repeats:
            return
        k = self._all(ask)[0] if k is None else k
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
        e = ask.extent
        k, v = self.sources.tail.joined(ask.layer, e, ask.k, ask.v)
        held = self.tables[e.seq].ids[: e.past // self.block_size]
        if not held:
            return k, v, None
        ids = self.pool.ids(held) if e.held_ids is None else e.held_ids
        stored = self.pool.read(ask.layer, held, ids)
        patch(self.pool, ask.layer, e.recent, *stored)
        k, v = map(torch.cat, zip(stored, (k, v)))
        return k, v, self._present(ask, len(k))

    def _present(self, ask: Ask, tokens: int) -> Tensor | None:
        held = self.tables[ask.extent.seq].ids[: ask.extent.past // self.block_size]
        there = self.pool.present(ask.layer, held) if self.pool.by_head and held else None
        if there is None:
            return None
        return torch.cat((there, there.new_ones(tokens - len(there), there.shape[1])))

    def choose(self, ask: Ask, some: Together) -> None:
        """Score all tokens that some layers have, and store those that stay."""
        e, layers, e.waiting = ask.extent, slice(some.first, some.stop), None
        tokens, seen = some.n - e.rest_count, self.held.seen[e.seq]
        new = None
        if some.queries:
            new = self.watch.scores_of(some, some.n if self.watch.all else tokens, seen)
        row = self.watch.row(e.seq, layers, new, tokens, e.count, e.rest_count)
        kept = self.chooser.stay(e, row, e.keep)
        if e.chosen:
            seal_layers(self.pool, some.first, e.old, e.chosen, some.k, some.v, kept,
                        e.sealing_ids)  # fmt: skip
            pair = (x[:, :tokens] for x in (some.k, some.v))  # of which every head keeps the newest
            self.recent.write(layers, e, *pair)
        if e.rest is not None:
            self.pool.write(layers, e.rest, 0, some.k[:, tokens:], some.v[:, tokens:])

    def store(self, ask: Ask) -> None:
        """Tokens that came without queries: the newest stay, as nothing is known of them."""
        if ask.extent.chosen is None:
            super().store(ask)
            return
        some = self._waiting(ask)
        some.add(ask)
        if some.full:
            self.choose(ask, some)

    @property
    def sealed_blocks(self):
        if not self.pool.by_head:
            return super().sealed_blocks
        return self.pool.sealed.live_rows / self.pool.count
