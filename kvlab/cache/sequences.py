"""The life of sequences: what `PagedCache` does between steps, in all layer groups or in none."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.cache.prefix import Prefixes
from kvlab.core import KvlabError, SeqId


class Sequences(Prefixes):
    """The part of `PagedCache` that opens, forks, cuts and closes sequences."""

    def open(
        self, token_ids: Sequence[int] = (), *, reserve: int = 0, most: int | None = None
    ) -> SeqId:
        """A new sequence; `length` tells how many of its tokens are there already.

        token_ids: what it will begin with. With prefix=hash it starts with the longest known run
        of whole blocks of them, but for the last token, which is always computed.
        reserve: tokens that it will reach; their blocks are set aside now, so that it cannot run
        out of blocks before. Raises `OutOfBlocks`; nothing but evictions has happened then.
        most: known blocks to start with, at most.
        """
        seq = self._new_name()
        self._tokens[seq] = self._open(seq, token_ids, reserve, most)
        return seq

    def close(self, seq: SeqId) -> None:
        """Forget `seq` and give its blocks back; a step that it takes part in is aborted."""
        self.close_all([seq])

    def close_all(self, seqs: Sequence[SeqId]) -> None:
        """The same for the sequences of a request: what the model of now computed may stay known.
        """
        for seq in seqs:
            self.length(seq)
        rows = () if self.under_way is None else self.under_way.rows
        taking = {extents[0].seq for extents in rows}
        if taking & set(seqs):
            self.abort()
        if seqs:
            self.recheck(here=False)
        self.catch_up()
        for seq in seqs:
            self._drop(seq)

    def _drop(self, seq: SeqId, done: bool = True) -> None:
        """done: what it computed may be made known; False for a sequence that never ran."""
        for group in self.groups:
            group.close(seq, done)
        del self._tokens[seq]
        self._chains.pop(seq, None)

    def length(self, seq: SeqId) -> int:
        """Tokens of `seq` seen so far, evicted ones included."""
        try:
            return self._tokens[seq]
        except KeyError:
            raise KvlabError(f"no sequence {seq} is open in this cache") from None

    def is_open(self, seq: SeqId) -> bool:
        return seq in self._tokens

    def _new_name(self) -> SeqId:
        self._opened += 1
        return self._opened - 1

    # ---- forks

    def fork(self, seq: SeqId) -> SeqId:
        """A second sequence with the same past: sealed blocks shared, the open tail copied."""
        return self.fork_all([seq])[0]

    def fork_all(self, parents: Sequence[SeqId]) -> list[SeqId]:
        """A fork of each of `parents`, one of which may come several times; all forks or none.

        Raises `OutOfBlocks` before anything has changed, and what the allocator or the host memory
        raises when nothing but evictions has happened.
        """
        self._between_steps("forked")
        tokens = [self.length(parent) for parent in parents]
        self.catch_up()
        tails = sum(n % self.geometry.block_size > 0 for n in tokens)
        for group in self.groups:
            group.short_of(tails)
        for group in self.groups:  # before blocks are pinned that could make room
            group.make_room(tails)
        children: list[SeqId] = []
        try:
            for parent in parents:
                children.append(self._fork(parent))
        except BaseException:
            for child in reversed(children):
                self._drop(child, done=False)
            raise
        return children

    def _fork(self, parent: SeqId) -> SeqId:
        child = self._new_name()
        chain = self._chains[parent].copy() if parent in self._chains else None
        forked = []
        try:
            for group in self.groups:
                group.fork(parent, child, chain)
                forked.append(group)
        except BaseException:
            for group in forked:
                group.close(child, done=False)
            raise
        self._tokens[child] = self._tokens[parent]
        if chain is not None:
            self._chains[child] = chain
        return child

    # ---- cuts

    def truncate(self, seq: SeqId, length: int) -> None:
        """Forget the tokens of `seq` from `length` on; all layers do, or an error says why not."""
        self.truncate_all({seq: length})

    def truncate_all(self, lengths: dict[SeqId, int]) -> None:
        """The same for several sequences; what one of them cannot do is done to none."""
        self._between_steps("cropped")
        for seq, length in lengths.items():
            if not 0 <= length <= self.length(seq):
                raise KvlabError(f"cannot crop {self._tokens[seq]} tokens to {length}")
        self.catch_up()
        pairs = [(group, seq, group.chooser.place(seq, length))
                 for group in self.groups for seq, length in lengths.items()]
        for group, seq, length in pairs:
            group.check_crop(seq, length)
        for group in self.groups:
            group.make_crop_room({seq: at for of, seq, at in pairs if of is group})
        for group, seq, length in pairs:
            group.crop(seq, length)
        self._tokens.update(lengths)

    def _between_steps(self, what: str) -> None:
        if self.under_way is not None:
            raise KvlabError(f"a step is under way, and no sequence can be {what} within it; "
                             "commit or abort it first")
