"""A layer group: the layers that share block ids. How a step attends to what they hold."""

from __future__ import annotations

from torch import Tensor

from kvlab.blocks import SEALED, Holding, check_reach
from kvlab.cache.bytes import GroupBytes
from kvlab.core import SeqId
from kvlab.kernel.attend_sdpa import ONE_CALL
from kvlab.kernel.step_ref import Past
from kvlab.pool import away
from kvlab.source import Ask, Extent, Part, Sum, Token, merged, over_all


class LayerGroup:
    """held: which blocks its sequences hold; storage: the bytes behind them."""

    def __init__(self, held: Holding, storage: GroupBytes):
        self.held, self.storage = held, storage
        self.ledger, self.tables, self.block_size = held.ledger, held.tables, held.block_size
        self.pool, self.sources, self.watch = storage.pool, storage.sources, storage.watch
        self.chooser, self.origins = storage.chooser, storage.origins
        self.recent = storage.recent
        self.away, self.summaries = storage.host.tables, storage.entries

    # ---- one step

    def attend(self, ask: Ask) -> Tensor:
        """Attention of the step's queries over all sources, fp32 [Hq, T, Dv]; stores k and v."""
        check_reach(self.held, ask.extent.seq, ask.extent.past, ask.window)
        if self._side_by_side(ask):
            return self._attend_once(ask)
        total = self.over_sources(ask)
        self.store(ask)
        out, lse = total.result()
        self.watch.layer(lse)
        self.sources.observe(ask, lse)
        return out

    def _side_by_side(self, ask: Ask) -> bool:
        """Whether all that a short chunk sees may lie side by side in the workspace, to be attended
        to at once and sealed from there: the host takes longer than the device for each launch."""
        e, sealed = ask.extent, self.sources.sealed
        if self.pool.fused is None or not self.sources.plain:
            return False
        if self.watch.active or ask.window is not None:
            return False
        if e.single or e.count > ONE_CALL or sealed.window.rerotate:
            return False
        blocks = sum(len(piece.blocks) for piece in sealed.pieces(e))
        opened = len(e.recent) + -(-(e.fill + e.count) // self.block_size)
        return blocks + opened <= sealed.segment_blocks

    def _attend_once(self, ask: Ask) -> Tensor:
        layer, e, pool = ask.layer, ask.extent, self.pool
        pieces = self.sources.sealed.pieces(e)
        held = sum(len(piece.blocks) for piece in pieces) * self.block_size
        tail = self.sources.tail.before(layer, e)
        own = held + (len(tail[0]) if tail else 0)
        tokens = own + e.count
        k, v = pool.workspace.take(tokens, pool.shape, pool.dtype, pool.device)
        if held:
            pool.read_layers(layer, pieces[0].blocks, pieces[0].ids, k[None, :held], v[None, :held])
        for x, new, before in zip((k, v), (ask.k, ask.v), tail or (None, None)):
            x[own:] = new
            if before is not None:
                x[held:own] = before
        out, _ = over_all(ask, k, v, pool.fused)
        if e.sealing:
            self._seal(layer, e, k[own - e.fill :], v[own - e.fill :])
        else:
            self.store(ask)
        return out

    def over_sources(self, ask: Ask) -> Sum:
        """The running result of all that there is to read; policies hear of sealed blocks."""
        total = Sum(self.pool.fused, ask.sinks)
        for source in self.sources.readers:
            for part in source.parts(ask):
                self.hear(ask, part)
                total.add(part.attend(ask))
        return total

    def hear(self, ask: Ask, part: Part) -> None:
        if part.blocks:
            q = ask.q if part.queries is None else part.queries
            self.watch.segment(part.blocks, q, part.keys, part.values, ask.scale)

    def look(self, ask: Ask) -> Tensor:
        """The same for queries of padding, `ask.before`: nothing is stored, no policy hears."""
        total = Sum(None, ask.sinks)
        for source in self.sources.readers:
            for part in source.parts(ask):
                total.add(part.attend(ask))
        return total.result()[0]

    def decode(
        self, layer: int, extents: list[Extent], q: Tensor, k: Tensor, v: Tensor, scale: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """A layer of a step of single tokens, through the kernels: q [B, Hq, D], k and v [B, H, D]
        -> [B, Hq, D]. Stores k and v; policies and sources hear of it."""
        sources, new = self.sources, (k, v)
        tables = sources.sealed.decoding
        if sources.past is not sources.sealed:  # whose kernel stores the token on its way
            sources.tail.append(layer, k, v, tables)
            new = None
        watch = self.watch if self.watch.active else None
        ask = Token(layer, extents, q, scale, tables, watch, new)
        reads = [read for source in sources.decoders for read in source.decode(ask)]
        out, lse = merged(reads, self.sources.observed, sinks)
        for read in reads:
            self.watch.decoded(ask.tables, read.mass)
        if self.sources.observed:
            for row in range(len(ask.extents)):
                self.sources.observe(ask.row(row), lse[row, :, None])
        return out

    def check_window(self, window: int) -> None:
        """Raises `BadInput` where what is held cannot be read through a model's own window."""

    @property
    def plain(self) -> bool:
        """Whether a step of single tokens reads blocks and tails alone, and nobody listens."""
        return self.sources.plain and not (self.watch.active and self.watch.scorer.decodes)

    @property
    def packs(self) -> bool:
        """Whether prompts that begin together may be attended to in one call: nobody listens, and
        what is stored is blocks and tails."""
        pool, heard = self.pool, self.watch.active or self.sources.hears
        odd = pool.by_head or pool.apart.tokens or pool.shape.softcap or pool.shape.window
        unlike = pool.shape.k_width != pool.shape.v_width
        return not (heard or odd or unlike)

    def past(self, scale: float) -> Past | None:
        """What a kernel over all layers reads of a step of single tokens, after `prepare`; None
        where attention reads more than blocks and tails, or somebody listens to it."""
        pool = self.pool
        if not self.plain or pool.apart.tokens or pool.by_head or self.recent.most:
            return None
        planes = ([store.layer(i) for i in range(pool.geometry.layers)]
                  for store in (pool.sealed, pool.open))
        t = self.sources.sealed.decoding
        return Past(*planes, pool.format, t.table, t.n_blocks, t.open_slot, t.open_now, scale)

    def store(self, ask: Ask) -> None:
        """Keep the step's own tokens: full blocks of a chunk are sealed, the rest stays open."""
        layer, e = ask.layer, ask.extent
        if not e.sealing or e.single:
            self.pool.write(layer, e.writing if e.single else e.rest, e.fill, ask.k, ask.v)
            return
        k, v = self.sources.tail.joined(layer, e, ask.k, ask.v)
        if ask.q is not None:
            self.watch.sealing(e.sealing, ask.q, k, v, ask.scale)
        self._seal(layer, e, k, v)

    def _seal(self, layer: int, e: Extent, k: Tensor, v: Tensor) -> None:
        """Seal what a chunk fills and keep the rest; k, v [n, H, D]: open tail and new tokens."""
        cut = len(e.sealing) * self.block_size
        self.sources.sealing(layer, e, k[:cut])
        if e.stored:
            new = e.without_adopted(k[:cut], v[:cut])
            self.pool.seal(layer, e.stored, *new, e.sealing_ids)
        self.recent.write(layer, e, k[:cut], v[:cut])
        if e.rest is not None:
            self.pool.write(layer, e.rest, 0, k[cut:], v[cut:])

    def end_step(self) -> None:
        """After all sequences of a step: what was attended to, and the policy's clock."""
        fresh, self.storage.fresh = self.storage.fresh, []
        wanted = self.sources.tell(self.watch)
        if wanted:
            self.held.room.recall(wanted)
        if self.watch.active:
            self.watch.commit([b for b in fresh if self.ledger.state(b) == SEALED])
        self.held.sharing.end_step()

    def repack(self, seq: SeqId, over: int, seen: int) -> None:
        """Give up `over` blocks' worth of the sealed tokens of `seq`, of the `seen` so far."""
        self.held.release(seq, self.chooser.run(seq, self.tables[seq], over, seen)[::-1])
        self.held.room.evictions += over

    # ---- accounts

    def forget_counts(self) -> None:
        """See `PagedCache.renew`."""
        self.held.room.evictions = 0
        if self.watch.active:
            self.watch.scorer.renew()

    @property
    def open_tokens(self) -> int:
        return sum(t.length % self.block_size for t in self.tables.values())

    @property
    def sealed_blocks(self) -> int:
        tails = sum(bool(t.length % self.block_size) for t in self.tables.values())
        return self.ledger.held_count - tails - self.held.reserved_count

    @property
    def read_tokens(self) -> int:
        """Tokens that a head reads for the next token of every sequence."""
        return sum(map(self.sources.past.reads, self.tables.values()))

    def check(self) -> None:
        """Raise if ledger, tables and sources disagree."""
        self.held.check()
        self.held.known.tier.check()
        self.summaries.check()
        self.away.check(self.held.known.tier.keys)
        self.recent.check(self.tables)
        self.pool.apart.check({*self.pool.sealed.live, *map(away, self.away.shelf.keys)})
