"""What the kept tokens of a cut block read when they were first reopened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.blocks import BlockTable
from kvlab.core import KvlabError, SeqId
from kvlab.pool import BlockPool
from kvlab.source import Host

MOST = 4  # of one sequence; the block that was reopened longest ago loses its origin


class Origin(NamedTuple):
    """The first `tokens` tokens of a logical block, in the open place that the pool calls `id`."""

    id: int
    tokens: int


class Origins:
    """Origins of one layer group, by sequence and logical block.

    A sealed block that is cut, filled with other tokens and sealed again has its kept tokens
    rounded anew, to steps that the others chose. Cut once more, they come from here and not from
    there: they are rounded once, however often what follows them changes. In the compute dtype,
    in open places of the pool, which counts them; never written again, so forks share them.

    Where every element is rounded by itself (dense formats) a block reads the same each time, and
    nothing is kept.
    """

    def __init__(self, pool: BlockPool):
        self.pool, self.needed = pool, not pool.dense
        self.held: dict[SeqId, dict[int, Origin]] = {}
        self._users: Counter[int] = Counter()

    # ---- the life of a sequence

    def open(self, seq: SeqId) -> None:
        self.held[seq] = {}

    def close(self, seq: SeqId) -> None:
        for origin in self.held.pop(seq).values():
            self._leave(origin)

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """`child` has what its parent has; nothing is copied."""
        self.held[child] = dict(self.held[parent])
        self._users.update(origin.id for origin in self.held[child].values())

    def crop(self, seq: SeqId, whole: int, fill: int) -> None:
        """Only `whole` blocks and `fill` tokens of `seq` stay."""
        held = self.held[seq]
        for index in [i for i in held if i >= whole + bool(fill)]:
            self._leave(held.pop(index))
        if whole in held:
            id, tokens = held[whole]
            held[whole] = Origin(id, min(tokens, fill))

    def prune(self, tables: dict[SeqId, BlockTable], away: Host) -> None:
        """Drop those of blocks that are gone from device and host: they can never be cut again."""
        for seq, held in self.held.items() if self._users else ():
            for index in list(held):
                if tables[seq].ids[index] is None and away.key(seq, index) is None:
                    self._leave(held.pop(index))

    # ---- contents

    def contents(
        self, seq: SeqId, index: int, fill: int, read: Callable[[int], tuple[Tensor, Tensor]]
    ) -> list[list[Tensor]]:
        """Keys and values [fill, H, D] of each layer of a block about to be reopened, copies.

        From here as far as they are here; the rest from `read`, what the sealed block reads in a
        layer.
        """
        origin = self.held[seq].get(index)
        return [self._layer(n, origin, fill, read) for n in range(self.pool.geometry.layers)]

    def _layer(self, layer: int, origin: Origin | None, fill: int, read) -> list[Tensor]:
        if origin is None:
            return [x[:fill].clone() for x in read(layer)]
        first = self.pool.read_open(layer, *origin)
        if origin.tokens == fill:
            return [x.clone() for x in first]
        return [torch.cat([x, y[origin.tokens : fill]]) for x, y in zip(first, read(layer))]

    def keep(self, seq: SeqId, index: int, contents: list[list[Tensor]]) -> None:
        """Remember `contents` as the first tokens of block `index`, which reads them now."""
        held, tokens = self.held[seq], contents[0][0].shape[0]
        old = held.pop(index, None)
        if old is not None and old.tokens == tokens:
            held[index] = old  # the latest again
            return
        if self.needed:
            id = self.pool.new_place()
            self.pool.open_block(id, contents)
            held[index] = Origin(id, tokens)
            self._users[id] += 1
        for gone in ([old] if old else []) + [held.pop(i) for i in list(held)[:-MOST]]:
            self._leave(gone)

    def _leave(self, origin: Origin) -> None:
        self._users[origin.id] -= 1
        if not self._users[origin.id]:
            del self._users[origin.id]
            self.pool.close_block(origin.id)

    # ---- accounts

    @property
    def nbytes(self) -> int:
        """Of all sequences; what forks share counts once. The pool's bytes have it in them."""
        return len(self._users) * self.pool.open.slab_bytes

    def check(self, lengths: dict[SeqId, int]) -> None:
        """Raise unless every origin has its users, and lies within its sequence's tokens."""
        held = [o.id for origins in self.held.values() for o in origins.values()]
        if Counter(held) != self._users:
            raise KvlabError(f"origins {held} are held, {dict(self._users)} counted")
        size = self.pool.block_size
        for seq, origins in self.held.items():
            for index, origin in origins.items():
                if not 0 < origin.tokens <= min(size, lengths[seq] - index * size):
                    raise KvlabError(f"block {index} of sequence {seq}, {lengths[seq]} tokens, "
                                     f"has an origin of {origin.tokens} tokens")
