"""A small serving house over ledger, tables and prefix cache, and the plain truth beside it.

Sequences write tokens, share what they sealed, and close; the policy makes room. After each action
`check` compares every book with what a few dicts say. Driven by hypothesis in `test_machine.py` and
by a seeded generator in `long_run.py`.
"""

from __future__ import annotations

from collections import Counter

from kvlab.blocks import (
    FREE,
    SEALED,
    BlockLedger,
    BlockTable,
    PrefixCache,
    PrefixHandle,
    PrefixIndex,
)
from kvlab.policy import by_name

SIZE = 2  # tokens in a block
CAPACITY = 24
SEQUENCES = 4  # at most at a time


class Sequence:
    """A request under way. A serving one pins its blocks; a lossy one leaves them to the policy."""

    def __init__(self, number: int, serving: bool, handle: PrefixHandle):
        self.number, self.serving, self.handle = number, serving, handle
        self.tokens: list[int] = []
        self.own: list[int] = []  # blocks it must free
        self.table = BlockTable(SIZE)


class House:
    def __init__(self, policy: str, capacity: int = CAPACITY):
        self.ledger = BlockLedger(capacity, by_name(policy))
        self.cache = PrefixCache(self.ledger, PrefixIndex("toy", SIZE))
        self.sequences: list[Sequence] = []
        self.path: dict[int, tuple] = {}  # sealed block -> all tokens up to its end: the truth
        self.kept: set[int] = set()  # blocks that the prefix cache owns
        self.opened = 0
        self.done: Counter[str] = Counter()

    # -- actions -----------------------------------------------------------------------------

    def open(self, prompt: list[int], serving: bool) -> None:
        """A new sequence, beginning with what is cached of its prompt."""
        if len(self.sequences) == SEQUENCES:
            return
        handle = self.cache.attach_prefix(prompt)
        self.done["hit"] += bool(handle.ids)
        assert self.expected_match(prompt) == handle.ids
        sequence = Sequence(self.opened, serving, handle)
        self.opened += 1
        sequence.table.append(handle.ids, handle.tokens)
        sequence.tokens = prompt[: handle.tokens]
        self.sequences.append(sequence)
        self.write(len(self.sequences) - 1, prompt[handle.tokens :])

    def expected_match(self, prompt):
        known = {self.path[id]: id for id in self.kept if id in self.cache.index}
        ends = range(SIZE, len(prompt) + 1, SIZE)
        run = []
        for end in ends:
            if tuple(prompt[:end]) not in known:
                break
            run.append(known[tuple(prompt[:end])])
        return run

    def write(self, which: int, tokens: list[int]) -> None:
        """Append tokens if room can be made for them; seal the blocks that become full."""
        if not self.sequences:
            return
        sequence = self.sequences[which % len(self.sequences)]
        table, ledger = sequence.table, self.ledger
        short = table.missing(len(tokens)) - ledger.free_count
        if short > ledger.evictable_count:
            return
        self.evict(max(short, 0))
        fresh = ledger.allocate(table.missing(len(tokens)), owner=sequence.number)
        if sequence.serving:
            ledger.pin(fresh)
        sequence.own += fresh
        table.append(fresh, len(tokens))
        first = (len(sequence.tokens)) // SIZE
        sequence.tokens += tokens
        for index in range(first, len(sequence.tokens) // SIZE):
            self.seal(sequence, index)

    def seal(self, sequence, index):
        id, tokens = sequence.table.ids[index], sequence.tokens[: (index + 1) * SIZE]
        contents = [None, *self.cache.index.contents(tokens)]
        self.ledger.seal([id], contents[-1:], [index], parent=contents[-2:-1])
        self.path[id] = tuple(tokens)

    def share(self, which: int) -> None:
        """Give the sealed blocks before the first hole to the prefix cache, and go on with its."""
        if not self.sequences:
            return
        sequence = self.sequences[which % len(self.sequences)]
        table, old = sequence.table, sequence.handle
        whole = len(sequence.tokens) // SIZE
        whole = min([whole, *table.holes])
        ids = table.ids[:whole]
        if any(self.ledger.meta(id).doomed for id in ids):
            return  # dropped while in use: nobody owns these any more
        sequence.handle = self.cache.cache_prefix(sequence.tokens[: whole * SIZE], ids)
        table.ids[:whole] = sequence.handle.ids
        mine = [id for id in ids if id in sequence.own]
        if sequence.serving:
            self.ledger.unpin(mine)
        sequence.own = [id for id in sequence.own if id not in mine]
        self.kept.update(sequence.handle.ids)
        self.cache.release_prefix(old)
        self.done["share"] += bool(ids)

    def close(self, which: int) -> None:
        if not self.sequences:
            return
        sequence = self.sequences.pop(which % len(self.sequences))
        tail_first = sequence.own[::-1]
        if which % 2 and sequence.serving:
            self.ledger.unpin(tail_first)
        self.ledger.free(tail_first)
        if not which % 2 and sequence.serving:
            self.ledger.unpin(tail_first)
        self.cache.release_prefix(sequence.handle)
        self.done["close"] += 1

    def truncate(self, which: int, blocks: int) -> None:
        """Take back whole blocks at the end, as far as the sequence owns them."""
        if not self.sequences:
            return
        sequence = self.sequences[which % len(self.sequences)]
        keep = max(len(sequence.tokens) // SIZE - blocks, len(sequence.handle.ids))
        if keep * SIZE >= len(sequence.tokens):
            return
        gone = sequence.table.truncate(keep * SIZE)
        sequence.tokens = sequence.tokens[: keep * SIZE]
        sequence.own = [id for id in sequence.own if id not in gone]
        self.ledger.free(gone)
        if sequence.serving:
            self.ledger.unpin(gone)
        self.done["truncate"] += 1

    def evict(self, count: int) -> None:
        count = min(count, self.ledger.evictable_count)
        victims = self.cache.evict(count)
        assert len(set(victims)) == count
        for id in victims:
            assert self.ledger.meta(id).pins == 0
            self.punch(id)
        self.ledger.free(victims)
        self.done["evict"] += count

    def punch(self, id):
        self.kept.discard(id)
        for sequence in self.sequences:
            if id in sequence.own:
                sequence.own.remove(id)
                assert sequence.table.punch(sequence.table.ids.index(id)) == id

    def drop(self, which: int) -> None:
        """The prefix cache gives up one block that somebody may be reading."""
        kept = sorted(self.kept)
        if kept:
            id = kept[which % len(kept)]
            self.cache.drop([id])
            self.kept.remove(id)
            self.done["drop"] += 1

    def use(self, which: int, score: float) -> None:
        """A step: some sealed blocks of a sequence were looked at, tail first."""
        if self.sequences:
            table = self.sequences[which % len(self.sequences)].table
            sealed = [i for i in table.ids if i is not None and self.ledger.state(i) == SEALED]
            self.ledger.touch(sealed[:: -1 - which % 3])
            for id in sealed[-1:]:
                self.ledger.score(id, score)
        self.ledger.tick()

    # -- laws --------------------------------------------------------------------------------

    def check(self) -> None:
        self.ledger.check()
        self.cache.index.check()
        owned = [id for sequence in self.sequences for id in sequence.own]
        readers = Counter()
        for sequence in self.sequences:
            readers.update(sequence.handle.ids)
            readers.update(sequence.own if sequence.serving else ())
            self.check_table(sequence)
        assert not set(owned) & self.kept
        assert len(owned) == len(set(owned)), "one owner"
        held = set(owned) | self.kept | set(readers)
        assert self.ledger.held_count == len(held), "no block is lost, none is held twice"
        for id in held:
            assert self.ledger.state(id) != FREE
            assert self.ledger.meta(id).pins == readers[id]
        assert {id for id in self.kept if id in self.cache.index} == self.kept

    def check_table(self, sequence):
        table, tokens = sequence.table, sequence.tokens
        assert table.length == len(tokens)
        for index, id in enumerate(table.ids):
            end = (index + 1) * SIZE
            if id is not None and end <= len(tokens):
                assert self.path[id] == tuple(tokens[:end]), "a block holds its sequence's tokens"
