"""The newest whole blocks of each sequence as they were computed, beside what is stored of them."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from kvlab.core import KvlabError, SeqId
from kvlab.pool import BlockPool
from kvlab.source import Extent


class Recent:
    """The residual of one layer group, by sequence and logical block.

    A block is sealed when it is full, as ever, but read as it was computed until
    `format.residual` newer tokens are there: what a token looks at most lies just before it, and
    prefill in chunks hides that (KIVI's residual length, https://arxiv.org/abs/2402.02750, which
    quantizes later instead). So known prefixes, the host and a step that is undone find sealed
    blocks as they do without; the price is that newest tokens are held twice.

    The copies are open places of the pool, in the compute dtype, which counts them: the place in
    which decoded tokens were collected stays, one for a block of a chunk is taken with the step.
    They are never written again, so forks share them. They are what the sequence itself computed:
    blocks that it found known are read as stored.

    most: blocks of a sequence, none in the null member. held: names of places by logical block,
    the last of which ends where the open tail begins.
    """

    def __init__(self, pool: BlockPool):
        self.pool, self.size = pool, pool.block_size
        self.most = pool.format.residual // pool.block_size
        self.held: dict[SeqId, dict[int, int]] = {}
        self._coming: dict[SeqId, list[int]] = {}  # of a step under way
        self._users: Counter[int] = Counter()

    # ---- the life of a sequence

    def open(self, seq: SeqId) -> None:
        self.held[seq] = {}

    def close(self, seq: SeqId) -> None:
        self._leave(self.held.pop(seq).values())

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """`child` has what its parent has; nothing is copied."""
        self.held[child] = dict(self.held[parent])
        self._users.update(self.held[child].values())

    def forget(self, seq: SeqId, first: int, stop: int | None = None) -> None:
        """Blocks [first, stop) of `seq`, or all from `first` on, are read as stored, if at all."""
        held = self.held[seq]
        gone = [i for i in held if i >= first and (stop is None or i < stop)]
        self._leave([held.pop(i) for i in gone])

    def lift(self, seq: SeqId, index: int, fill: int) -> list[list[Tensor]] | None:
        """Keys and values [fill, H, D] of each layer of a block about to be opened again, copies;
        it is forgotten here. None where it is read as stored."""
        if index not in self.held[seq]:
            return None
        layers = range(self.pool.geometry.layers)
        place = self.held[seq][index]
        contents = [[x.clone() for x in self.pool.read_open(n, place, fill)] for n in layers]
        self.forget(seq, index)
        return contents

    # ---- a step

    def places(self, seq: SeqId) -> list[int]:
        """Places of the blocks that a step reads as computed, in order."""
        return list(self.held[seq].values())

    def begin(self, step: Extent, blocks: int) -> None:
        """Take places for the newest of the `blocks` that a chunk seals."""
        names = self._coming[step.seq] = []
        for _ in range(min(self.most, blocks)):
            names.append(self.pool.new_place())
            self.pool.open_block(names[-1])

    def coming(self, step: Extent) -> list[int]:
        """The places that `begin` took, which the layers of the step fill."""
        return self._coming.get(step.seq, [])

    def write(self, layers: int | slice, step: Extent, k: Tensor, v: Tensor) -> None:
        """Keep the newest of the blocks k, v [n * S, H, D] that a layer seals; of several layers,
        with these in front."""
        names = self.coming(step)
        for name, end in zip(reversed(names), range(k.shape[-3], 0, -self.size)):
            here = slice(end - self.size, end)
            self.pool.write(layers, name, 0, k[..., here, :, :], v[..., here, :, :])

    def commit(self, step: Extent) -> None:
        """The step's blocks are in the table; the open place of a single token's full one stays."""
        if step.single:
            names = [self.pool.keep_place(block) for block in step.sealing]
        else:
            names = self._coming.pop(step.seq, [])
        self._newest(step.seq, names, step.past // self.size + len(step.sealing))

    def chose(self, step: Extent, blocks: int) -> None:
        """The same where tokens were chosen, and `blocks` are left in the table."""
        self.forget(step.seq, 0)
        self._newest(step.seq, self._coming.pop(step.seq, []), blocks)

    def repacked(self, seq: SeqId, left: int) -> None:
        """Of the whole blocks of a table `left` are left, the newest tokens at their end."""
        names = self.places(seq)[-left:] if left else []
        self._users.update(names)
        self.forget(seq, 0)
        self.held[seq] = dict(zip(range(left - len(names), left), names))

    def abort(self, step: Extent) -> None:
        for name in self._coming.pop(step.seq, []):
            self.pool.close_block(name)

    def _newest(self, seq: SeqId, names: list[int], stop: int) -> None:
        self.held[seq].update(zip(range(stop - len(names), stop), names))
        self._users.update(names)
        self.forget(seq, 0, stop - self.most)

    def _leave(self, names) -> None:
        for name in names:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                self.pool.close_block(name)

    # ---- accounts

    @property
    def nbytes(self) -> int:
        """Of all sequences; what forks share counts once. The pool's bytes have it in them."""
        return len(self._users) * self.pool.open.slab_bytes

    @property
    def tokens(self) -> int:
        """Of all sequences, what forks share once for each."""
        return sum(map(len, self.held.values())) * self.size

    def check(self, tables: dict) -> None:
        """Raise unless every place has its users, and each sequence's are the last it has."""
        held = [name for places in self.held.values() for name in places.values()]
        if Counter(held) != self._users or self._coming:
            raise KvlabError(f"places {held} are held, {dict(self._users)} counted, "
                             f"{self._coming} on their way")
        for seq, places in self.held.items():
            stop = tables[seq].length // self.size
            if list(places) != list(range(stop - len(places), stop)) or len(places) > self.most:
                raise KvlabError(f"sequence {seq} of {stop} whole blocks has copies of "
                                 f"{list(places)}, and {self.most} at most")


def patch(pool: BlockPool, layer: int | slice, places: list[int], k: Tensor, v: Tensor) -> None:
    """Put what is in open `places` at the end of what a table's whole blocks read, k and v
    [n * S, H, D]; of several layers, with these in front."""
    size = pool.block_size
    for place, end in zip(reversed(places), range(k.shape[-3], 0, -size)):
        for x, kept in zip((k, v), pool.read_open(layer, place, size)):
            x[..., end - size : end, :, :] = kept
