"""What requests do with blocks: the one protocol, of the live cache and of the simulator.

    open     find what is known of the prompt, pin it, make room, bring back what waits on the host
    begin    blocks for the next tokens: a plain record, undone by `abort` until `commit`
    commit   the blocks are the sequences'; what they hold is made known
    fork, truncate, close

Prefixes that no sequence uses are kept by `Prefixes`.

No tensors: bytes move behind the `storage` of each layer group, or nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvlab.blocks import forks
from kvlab.blocks.chain import Chain, leading
from kvlab.blocks.holding import Holding
from kvlab.blocks.names import Names
from kvlab.blocks.step import Opened, Step
from kvlab.core import BadInput, KvlabError, SeqId
from kvlab.policy import Moment


class Sequences:
    """Sequences over all layer groups, each of which does what is asked, or none does.

    identity: where chains of hashes begin: what decides which bytes a block holds.
    """

    def __init__(self, groups: list[Holding], identity: str = ""):
        self.groups, self.identity = groups, identity
        self.block_size = groups[0].block_size
        sharing = groups[0].sharing
        self.shares, self.hold = sharing.shares, sharing.hold
        self.lengths: dict[SeqId, int] = {}
        self.chains: dict[SeqId, Chain | Names] = {}
        self._opened = 0  # sequences so far: the next name
        self.under_way: list[list[Step]] | None = None  # the step: by row, then by group

    # ---- a sequence comes

    def chain(self, token_ids: Sequence[int] | Chain | Names) -> Chain | Names | None:
        """Tokens as they are looked up; None where nothing is shared."""
        if not self.shares:
            return None
        if isinstance(token_ids, Chain | Names):
            return token_ids
        return Chain(self.identity, self.block_size, token_ids)

    def hits(self, chain: Chain | Names | None) -> tuple[int, int]:
        """Leading whole blocks that every group holds on the device, and there or on the host.

        The last token is never among them: it is always computed.
        """
        if chain is None or not chain.tokens:
            return 0, 0
        most = (chain.tokens - 1) // self.block_size
        near = min(most, *(leading(group.known.found(chain)) for group in self.groups))
        if not self.groups[0].known.tier.keeps:
            return near, near
        return near, min(most, *(reach(group, chain) for group in self.groups))

    def hear(self, moment: Moment) -> None:
        """A request comes: policies that go by requests hear of it, and may give blocks up."""
        for group in self.groups:
            group.hear(moment)

    def open(
        self, token_ids: Sequence[int] | Chain | Names = (), *, reserve: int = 0,
        most: int | None = None, look: Callable[[Opened, Chain | Names], None] | None = None,
    ) -> tuple[SeqId, Opened]:
        """A new sequence, and what it begins with; see `length`.

        reserve: tokens that it will reach; their blocks are set aside now, so that it cannot run
        out of blocks before. most: known blocks to start with, at most. look: shown what was found
        before anything moves. Raises `OutOfBlocks`; nothing but evictions has happened then.
        """
        chain, size, seq = self.chain(token_ids), self.block_size, self._new_name()
        near, hit = (n if most is None else min(n, most) for n in self.hits(chain))
        first = self.groups[0]
        opened = Opened(near, hit, first.known.found(chain), first.known.away(chain), [])
        if look and chain is not None:
            look(opened, chain)
        for group in self.groups:
            group.enter(seq, chain, near)
        try:
            for group in self.groups:
                opened.evicted.extend(group.reserve(seq, near, max(hit, -(-reserve // size))))
            for group in self.groups if hit > near else ():
                group.sharing.bring(seq, near, hit)
        except BaseException:  # the allocator's errors, too
            for group in self.groups:
                group.close(seq, done=False)
            raise
        for group in self.groups:
            group.sharing.settle(seq)
        self.lengths[seq] = hit * size
        if chain is not None:
            self.chains[seq] = chain
        return seq, opened

    def _new_name(self) -> SeqId:
        self._opened += 1
        return self._opened - 1

    def length(self, seq: SeqId) -> int:
        """Tokens of `seq` seen so far, evicted ones included."""
        try:
            return self.lengths[seq]
        except KeyError:
            raise KvlabError(f"no sequence {seq} is open in this cache") from None

    def tell(self, seq: SeqId, token_ids: Sequence[int], at: int | None = None) -> None:
        """Say which tokens the next steps of `seq` compute: only known tokens can be shared.

        at: position of the first of them (the next), for a driver that knows them later.
        """
        if seq in self.chains:
            self.chains[seq].tell(self.lengths[seq] if at is None else at, token_ids)

    # ---- a step

    def begin(self, seqs: Sequence[SeqId], counts: Sequence[int]) -> list[list[Step]]:
        """Find room for `counts[i]` new tokens of `seqs[i]`, evicting where the policy may.

        The steps by row, then by group. Raises `OutOfBlocks`; lengths and contents are then as
        before, but for evicted blocks.
        """
        self._check_step(seqs, counts)
        if len(seqs) > 1:
            self._make_room(seqs, counts)
        steps: list[list[Step]] = []
        try:
            for seq, count in zip(seqs, counts, strict=True):
                steps.append([])
                for group in self.groups:
                    steps[-1].append(group.step(seq, count))
        except BaseException:  # the allocator's errors, too
            self._undo(steps)
            raise
        self.under_way = steps
        return steps

    def _check_step(self, seqs: Sequence[SeqId], counts: Sequence[int]) -> None:
        if self.under_way is not None:
            raise KvlabError("the previous step was neither committed nor aborted")
        if len(seqs) != len(counts) or min(counts, default=0) < 0:
            raise BadInput("counts", counts, f"must be {len(seqs)} numbers of tokens, 0 or more")
        for seq in seqs:
            self.length(seq)
        if len(set(seqs)) < len(seqs):
            raise BadInput("seqs", seqs, "must name each sequence once; fork what comes twice")

    def _make_room(self, seqs: Sequence[SeqId], counts: Sequence[int]) -> None:
        """For all rows at once, or an early row would evict in vain."""
        for group in self.groups:
            wanted = [(seq, group.needs(seq, n)) for seq, n in zip(seqs, counts, strict=True)]
            coming = [c for seq, blocks in wanted for c in group.sharing.coming(seq, blocks)]
            group.room.make(sum(len(blocks) for _, blocks in wanted), coming)

    def running(self) -> list[list[Step]]:
        """The step under way."""
        if self.under_way is None:
            raise KvlabError("no step is under way; begin one first")
        return self.under_way

    def commit(self, publish: bool = True) -> None:
        """Close the step: full blocks are sealed for good, lengths advance.

        publish: what may be known is made known; False where the sequences end here and do so
        then. `Alone.end_step` comes last.
        """
        steps = self.running()
        if self.shares:
            self._note_holes(steps)
        for row in steps:
            for group, step in zip(self.groups, row):
                group.commit(step, publish)
            self.lengths[row[0].seq] += row[0].count
        self.under_way = None

    def _note_holes(self, steps: list[list[Step]]) -> None:
        """A hole in one layer shows in what all layers above it hold."""
        for row in steps:
            whole = row[0].past // self.block_size
            saw_all = all(group.whole(row[0].seq, whole) for group in self.groups)
            for step in row:
                step.saw_all = saw_all

    def abort(self) -> None:
        """Undo a step that did not reach `commit`; all is as before `begin`, but for evictions."""
        if self.under_way is not None:
            self._undo(self.under_way)
            self.under_way = None

    def _undo(self, steps: list[list[Step]]) -> None:
        for row in steps:
            for group, step in zip(self.groups, row):
                group.abort(step)

    # ---- a sequence goes

    def close(self, seqs: Sequence[SeqId]) -> None:
        """Forget sequences and give their blocks back; a step that they take part in is aborted."""
        self.stop(seqs)
        for seq in seqs:
            self._drop(seq)

    def stop(self, seqs: Sequence[SeqId]) -> None:
        """Abort a step that any of these sequences takes part in."""
        for seq in seqs:
            self.length(seq)
        if self.under_way and {row[0].seq for row in self.under_way}.intersection(seqs):
            self.abort()

    def _drop(self, seq: SeqId, done: bool = True) -> None:
        """done: what it computed may be made known; False for a sequence that never ran."""
        for group in self.groups:
            group.close(seq, done)
        del self.lengths[seq]
        self.chains.pop(seq, None)

    def fork(self, parents: Sequence[SeqId]) -> list[SeqId]:
        """A second sequence with the same past for each of `parents`, one of which may come several
        times: sealed blocks shared, the open tail copied; all forks or none.

        Raises `OutOfBlocks` before anything has changed, and what the storage raises when nothing
        but evictions has happened.
        """
        self.between_steps("forked")
        tails = sum(self.length(parent) % self.block_size > 0 for parent in parents)
        for group in self.groups:
            group.room.short_of(tails)
        for group in self.groups:  # before blocks are pinned that could make room
            group.room.make(tails)
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
        chain = self.chains[parent].copy() if parent in self.chains else None
        forked = []
        try:
            for group in self.groups:
                forks.fork(group, parent, child, chain)
                forked.append(group)
        except BaseException:
            for group in forked:
                group.close(child, done=False)
            raise
        self.lengths[child] = self.lengths[parent]
        if chain is not None:
            self.chains[child] = chain
        return child

    def truncate(self, lengths: dict[SeqId, int]) -> None:
        """Forget the tokens of sequences from these lengths on; what one cannot do is done to
        none, and an error says why not."""
        self.between_steps("cropped")
        for seq, length in lengths.items():
            if not 0 <= length <= self.length(seq):
                raise KvlabError(f"cannot crop {self.lengths[seq]} tokens to {length}")
        places = [{seq: group.storage.place(seq, n) for seq, n in lengths.items()}
                  for group in self.groups]  # fmt: skip
        for group, ends in zip(self.groups, places):
            for seq, end in ends.items():
                forks.check_crop(group, seq, end)
        for group, ends in zip(self.groups, places):
            forks.make_crop_room(group, ends)
        for group, ends in zip(self.groups, places):
            for seq, end in ends.items():
                forks.crop(group, seq, end)
        self.lengths.update(lengths)

    def between_steps(self, what: str) -> None:
        if self.under_way is not None:
            raise KvlabError(f"a step is under way, and no sequence can be {what} within it; "
                             "commit or abort it first")



def reach(group: Holding, chain: Chain | Names) -> int:
    """Leading whole blocks of the chain that are on the device or in host memory."""
    found, away = group.known.found(chain), set(group.known.away(chain))
    return next((i for i, b in enumerate(found) if b is None and i not in away), len(found))
