"""Prefixes kept in no sequence's name, and what becomes of all when their identity ends."""

from __future__ import annotations

from collections.abc import Sequence

from kvlab.blocks.chain import CutOff, leading
from kvlab.blocks.prefix import PrefixIndex
from kvlab.blocks.sequences import Sequences
from kvlab.core import BlockId, KvlabError, SeqId


class PrefixHandle:
    """A prefix kept or found: `ids` (of the first layer group), `tokens`, `pinned`.

    parts: ids for each layer group. identity: under which they were found; when the sequences
    have another, the handle holds nothing any more.
    """

    __slots__ = ("ids", "identity", "parts", "pinned", "tokens")

    def __init__(self, parts: list[list[BlockId]], tokens: int, pinned: bool, identity: str):
        self.ids, self.tokens, self.pinned = parts[0], tokens, pinned
        self.parts, self.identity = parts, identity


class Prefixes:
    """Handles on known prefixes of `sequences`: pins that belong to no sequence."""

    def __init__(self, sequences: Sequences):
        self.sequences, self.groups = sequences, sequences.groups
        self.handles: list[PrefixHandle] = []

    def keep(self, token_ids: Sequence[int], pin: bool = True) -> PrefixHandle:
        """Keep what is held of the whole blocks of `token_ids`, live sequences' included.

        With `pin` they stay until `release`, else as long as the policy leaves them.
        """
        for seq, chain in self.sequences.chains.items():
            if chain.starts_with(token_ids) >= self.sequences.block_size:
                for group in self.groups:
                    group.sharing.publish(seq)
        return self._handle(token_ids, pin)

    def attach(self, token_ids: Sequence[int]) -> PrefixHandle:
        """Find and pin the longest run of whole blocks that is there; it counts as used, the tail
        being the first to leave again."""
        handle = self._handle(token_ids, True)
        for group, ids in zip(self.groups, handle.parts):
            group.ledger.touch(ids[::-1])
        return handle

    def _handle(self, token_ids: Sequence[int], pin: bool) -> PrefixHandle:
        sequences = self.sequences
        chain = sequences.chain(token_ids)
        found = [group.known.found(chain) for group in self.groups]
        count = min(map(leading, found))
        parts = [ids[:count] for ids in found]
        handle = PrefixHandle(parts, count * sequences.block_size, pin, sequences.identity)
        if pin:
            for group, ids in zip(self.groups, parts):
                group.ledger.pin(ids)
            self.handles.append(handle)
        return handle

    def release(self, handle: PrefixHandle) -> None:
        """Unpin a handle's blocks, tail first. A second release does nothing.

        Raises `KvlabError` for a handle of another cache.
        """
        if handle.pinned:
            if handle not in self.handles:
                raise KvlabError("this prefix was not pinned in this cache; release it where "
                                 "it was attached")
            handle.pinned = False
            self.handles.remove(handle)
            for group, ids in zip(self.groups, handle.parts):
                group.ledger.unpin(ids[::-1])

    def drop_known(self) -> int:
        """Release all handles and free every known block that no sequence uses; how many."""
        self._release_all()
        for group in self.groups:
            group.known.tier.clear()
        return sum(group.room.exit.drop_known() for group in self.groups)

    def _release_all(self) -> None:
        for handle in list(self.handles):
            self.release(handle)

    def spill_known(self) -> int:
        """Send every known block that nobody uses to the host tier; how many left the device."""
        return sum(group.room.exit.drop_known(spill=True) for group in self.groups)

    def renew(self, identity: str) -> None:
        """What was computed so far is found no more: handles are released, known blocks freed,
        and what running sequences compute stays theirs."""
        sequences, size = self.sequences, self.sequences.block_size
        sequences.identity = identity
        self._release_all()
        sequences.chains = {seq: CutOff(size, True) for seq in sequences.chains}
        for group in self.groups if sequences.shares else ():
            group.known.renew(PrefixIndex(identity, size), sequences.chains)

    def keep_apart(self, seq: SeqId) -> None:
        """The next tokens of `seq` are none that token ids stand for: it never becomes known."""
        if seq in self.sequences.chains and not isinstance(self.sequences.chains[seq], CutOff):
            self.sequences.chains[seq] = CutOff(self.sequences.block_size)
            for group in self.groups:
                group.known.cut_off(seq, self.sequences.chains[seq])

    def outdated(self, seq: SeqId) -> bool:
        """Whether a sequence began under another identity."""
        return getattr(self.sequences.chains.get(seq), "outdated", False)

    @property
    def known_tokens(self) -> int:
        """Tokens of all known blocks, each block counted once."""
        return min(len(group.known.blocks) for group in self.groups) * self.sequences.block_size
