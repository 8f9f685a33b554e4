"""Requests over `Sequences` with bytes that can be told apart, and the plain truth beside it.

Sequences open, write, fork, shrink, fail and close; handles keep prefixes; the policy makes room,
the host takes what leaves. After each action `check` compares every book with what follows from
the tokens alone. Driven by hypothesis in `test_machine.py` and by a seeded generator in
`long_run.py`.
"""

from __future__ import annotations

from collections import Counter

from kvlab.blocks import (
    Alone,
    BlockLedger,
    Ground,
    Holding,
    HostTier,
    NoStorage,
    NoTier,
    Prefixes,
    PrefixIndex,
    Sequences,
    Serving,
    Shared,
    WriteBack,
    WriteThrough,
)
from kvlab.blocks.chain import as_bytes
from kvlab.core import KvlabError, OutOfBlocks, OutOfHost
from kvlab.policy import by_name
from kvlab.window import SinkWindow

SIZE = 2  # tokens in a block
CAPACITY = 16
SEQUENCES = 4  # at most at a time
HOST = 24  # blocks
KINDS = {
    "alone": (Alone, NoTier), "alone, host": (Alone, NoTier),
    "shared": (Shared, NoTier), "shared, host": (Shared, HostTier),
    "serving": (Serving, NoTier), "exclusive": (Serving, HostTier),
    "write back": (Serving, WriteBack), "write through": (Serving, WriteThrough),
}  # fmt: skip


class Bytes(NoStorage):
    """What a block holds is the tokens of its sequence up to its end."""

    opens_single = True

    def __init__(self, host: int):
        super().__init__()
        self.limit = host
        self.device: dict[int, tuple] = {}
        self.host: dict[int, tuple] = {}
        self.holders: Counter[int] = Counter()
        self.away: dict[int, dict[int, int]] = {}  # sequence -> index -> key
        self.fails = False
        self.keys = 0

    def take(self, step):
        if self.fails:
            raise MemoryError

    def undo(self, step):
        self.drop(step.own)

    def open(self, seq):
        self.away[seq] = {}

    def close(self, seq):
        self.let_go(self.away.pop(seq).values())

    def fork(self, parent, child):
        self.away[child] = dict(self.away[parent])
        self.holders.update(self.away[child].values())

    def crop(self, seq, whole, fill):
        stop = whole + bool(fill)
        self.let_go([self.away[seq].pop(i) for i in list(self.away[seq]) if i >= stop])

    def copy_tail(self, tail, block, fill):
        if self.fails:
            raise MemoryError
        self.device[block] = self.device[tail]

    def lift(self, seq, index, block, fill):
        path = self.host[self.away[seq][index]] if block is None else self.device[block]
        if block is None:
            self.let_go([self.away[seq].pop(index)])
        return path[: index * SIZE + fill]

    def put_down(self, seq, index, block, contents):
        self.device[block] = contents

    def require(self, count):
        if self.limit and len(self.host) + count > self.limit:
            raise OutOfHost(count, len(self.host), self.limit)

    def spill(self, blocks, holes):
        if not self.limit:
            return []
        self.require(len(blocks))
        keys = list(range(self.keys, self.keys + len(blocks)))
        self.keys += len(blocks)
        place = dict(zip(blocks, keys))
        for block, key in place.items():
            self.host[key] = self.device[block]
            self.holders[key] = 1
        for seq, indices in holes:
            for index in indices:
                key = next(k for b, k in place.items() if b == self.tables[seq].ids[index])
                self.away[seq][index] = key
                self.holders[key] += 1
        return keys

    def fetch(self, keys, blocks):
        self.device.update(zip(blocks, (self.host[key] for key in keys)))

    def let_go(self, keys):
        for key in keys:
            self.holders[key] -= 1
            if not self.holders[key]:
                del self.holders[key], self.host[key]

    def has(self, seq, index):
        return index in self.away[seq]

    def recall(self, wanted, blocks):
        for (seq, index), block in zip(wanted, blocks):
            key = self.away[seq].pop(index)
            self.device[block] = self.host[key]
            self.let_go([key])

    def drop(self, blocks):
        for block in blocks:
            self.device.pop(block, None)


class House:
    """groups: layer groups; what fails in one must leave all as they were."""

    def __init__(self, policy: str, kind: str = "serving", capacity: int = CAPACITY,
                 groups: int = 1, window: bool = False):  # fmt: skip
        self.kind = kind
        self.stores = [Bytes(HOST if KINDS[kind][1].keeps or "host" in kind else 0)
                       for _ in range(groups)]
        held = [self._group(policy, store, capacity, window) for store in self.stores]
        self.sequences = Sequences(held, "toy")
        self.prefixes = Prefixes(self.sequences)
        self.tokens: dict[int, list[int]] = {}
        self.done: Counter[str] = Counter()

    def _group(self, policy, store, capacity, window):
        member, tier = KINDS[self.kind]
        more = {}
        if member is not Alone:
            more = {"index": PrefixIndex("toy", SIZE), "tier": tier() if tier is NoTier else
                    tier(BlockLedger(None, by_name("lru")), store)}  # fmt: skip
        ledger = BlockLedger(capacity, by_name(policy))
        slides = SinkWindow(sinks=2, recent=4, middle=False) if window else None
        return Holding(member(Ground(ledger, SIZE, store), **more), slides)

    def pick(self, which: int) -> int | None:
        return sorted(self.tokens)[which % len(self.tokens)] if self.tokens else None

    # -- actions -----------------------------------------------------------------------------

    def open(self, prompt: list[int], reserve: int = 0) -> None:
        if len(self.tokens) == SEQUENCES:
            return
        before = self.state()
        try:
            seq, opened = self.sequences.open(prompt, reserve=reserve)
        except (OutOfBlocks, OutOfHost):
            assert self.state()["tables"] == before["tables"]
            self.done["refused"] += 1
            return
        assert opened.near <= opened.hit == self.sequences.length(seq) // SIZE
        assert opened.hit * SIZE < max(1, len(prompt)), "the last token is always computed"
        self.done["hit"] += bool(opened.near)
        self.done["host hit"] += opened.hit > opened.near
        self.tokens[seq] = prompt[: self.sequences.length(seq)]
        self.write([len(self.tokens) - 1], [prompt[opened.hit * SIZE :]])

    def write(self, rows: list[int], new: list[list[int]], end: str = "commit") -> None:
        """A step of these rows, which ends as `end` says: commit, abort, or fails to begin."""
        rows = dict(zip((self.pick(row) for row in rows), new))
        if None in rows or not rows:
            return
        for seq, tokens in rows.items():
            self.sequences.tell(seq, tokens)
        before, gone = self.state(), self.evictions
        self.stores[-1].fails = end == "fail"
        try:
            steps = self.sequences.begin(list(rows), [len(t) for t in rows.values()])
        except (OutOfBlocks, OutOfHost, MemoryError):
            self.done["refused"] += 1
            self.undone(before, gone)
            return
        finally:
            self.stores[-1].fails = False
        if end != "commit":
            self.sequences.abort()
            self.done["abort"] += 1
            self.undone(before, gone)
            return
        for seq, tokens in rows.items():
            self.tokens[seq] = self.tokens[seq] + tokens
        for row in steps:
            for group, store, step in zip(self.sequences.groups, self.stores, row):
                self.fill(group, store, step)
        self.sequences.commit()
        for group in self.sequences.groups:
            group.sharing.end_step()

    def fill(self, group, store, step):
        first, tokens = step.past // SIZE, self.tokens[step.seq]
        ids = ([step.tail] if step.fill else []) + step.new
        for index, block in enumerate(ids, first):
            path = tuple(tokens[: (index + 1) * SIZE])
            if block in step.adopted:
                assert store.device[block] == path, "a kept block holds these very tokens"
                self.done["adopt"] += 1
            else:
                store.device[block] = path

    def undone(self, before, gone):
        """All is as it was, but for what left."""
        if self.evictions == gone:
            now = self.state()
            for name, value in before.items():
                assert now[name] == value, f"undo restores {name}"
            self.done["undo"] += 1

    def fork(self, which: int, fails: bool = False) -> None:
        seq = self.pick(which)
        if seq is None or len(self.tokens) == SEQUENCES:
            return
        before, gone = self.state(), self.evictions
        self.stores[-1].fails = fails
        try:
            (child,) = self.sequences.fork([seq])
        except (OutOfBlocks, OutOfHost, MemoryError):
            self.undone(before, gone)
        else:
            self.tokens[child] = list(self.tokens[seq])
            self.done["fork"] += 1
        finally:
            self.stores[-1].fails = False

    def truncate(self, which: int, length: int) -> None:
        seq = self.pick(which)
        if seq is None:
            return
        length %= len(self.tokens[seq]) + 1
        try:
            self.sequences.truncate({seq: length})
        except OutOfHost:
            return
        except KvlabError as error:
            assert isinstance(error, OutOfBlocks) or "was evicted" in str(error)
            return
        self.tokens[seq] = self.tokens[seq][:length]
        self.done["truncate"] += 1

    def close(self, which: int) -> None:
        seq = self.pick(which)
        if seq is not None:
            self.sequences.close([seq])
            del self.tokens[seq]
            self.done["close"] += 1

    def keep(self, which: int, pin: bool = True) -> None:
        seq = self.pick(which)
        if self.sequences.shares and seq is not None:
            handle = self.prefixes.keep(self.tokens[seq], pin)
            self.done["keep"] += bool(handle.ids)

    def attach(self, prompt: list[int]) -> None:
        if self.sequences.shares:
            self.prefixes.attach(prompt)

    def release(self, which: int) -> None:
        handles = self.prefixes.handles
        if handles:
            handle = handles[which % len(handles)]
            self.prefixes.release(handle)
            self.prefixes.release(handle)

    def evict(self, count: int) -> None:
        for group in self.sequences.groups:
            most = min(count, group.ledger.evictable_count)
            try:
                group.room.evict(most)
            except OutOfHost:
                continue
            self.done["evict"] += most

    def drop(self, spill: bool) -> None:
        if self.sequences.shares and spill:
            try:
                self.prefixes.spill_known()
            except OutOfHost:
                return
        elif self.sequences.shares:
            self.prefixes.drop_known()

    def renew(self) -> None:
        if self.sequences.shares:
            self.prefixes.renew("toy")
            self.done["renew"] += 1

    def use(self, which: int) -> None:
        """Some sealed blocks of a sequence were looked at."""
        seq = self.pick(which)
        for group in self.sequences.groups if seq is not None else ():
            ids = [i for i in group.tables[seq].ids if i is not None]
            group.ledger.touch([i for i in ids if group.ledger.state(i) == 2][:: -1 - which % 3])

    # -- laws --------------------------------------------------------------------------------

    @property
    def evictions(self) -> int:
        return sum(group.room.evictions for group in self.sequences.groups)

    def state(self) -> dict:
        """All that a step may change and an undo must bring back."""
        groups = self.sequences.groups
        return {
            "lengths": dict(self.sequences.lengths),
            "tables": [{s: (list(t.ids), t.length) for s, t in g.tables.items()} for g in groups],
            "claims": [{s: (set(c.borrowed), set(c.pinned), dict(c.kept), c.reserved[:],
                            c.settled, c.clean, c.own[:]) for s, c in g.claims.items()}
                       for g in groups],
            "blocks": [[(m.id, m.state, m.pins, m.content)
                        for m in g.ledger.register.metas if m.state] for g in groups],
            "known": [set(g.known.blocks) for g in groups],
        }  # fmt: skip

    def check(self) -> None:
        for group, store in zip(self.sequences.groups, self.stores):
            group.check()
            group.known.tier.check()
            if group.sharing.shares:
                group.known.index.check()
                self.check_known(group, store)
            self.check_pins(group)
            for seq, table in group.tables.items():
                self.check_table(group, store, seq, table)
            keys = Counter(group.known.tier.keys)
            keys.update(k for away in store.away.values() for k in away.values())
            assert keys == store.holders, "host keys and their holders agree"
            assert set(store.host) == set(store.holders)

    def check_known(self, group, store):
        for block in group.known.blocks:
            _, raw = group.known.index.content(block)
            path = store.device[block]
            assert raw == as_bytes(path[-SIZE:])
        for content, id in getattr(group.known.tier, "_where", {}).items():
            path = store.host[group.known.tier._kept[id][1]]
            assert self.sequences.chain(list(path)).names()[-1] == content

    def check_pins(self, group):
        pins = Counter()
        for claim in group.claims.values():
            pins.update([*claim.borrowed, *claim.pinned, *claim.kept.values(), *claim.guarded])
        place = self.sequences.groups.index(group)
        for handle in self.prefixes.handles:
            pins.update(handle.parts[place])
        held = {m.id: m.pins for m in group.ledger.register.metas if m.pins}
        assert held == pins, "pins are balanced"

    def check_table(self, group, store, seq, table):
        tokens = self.tokens[seq]
        assert table.length == len(tokens) == self.sequences.length(seq)
        for index, block in enumerate(table.ids):
            path = tuple(tokens[: (index + 1) * SIZE])
            if block is not None:
                assert store.device[block] == path, "a block holds its sequence's tokens"
            elif index in store.away[seq]:
                assert store.host[store.away[seq][index]] == path
            else:
                loses = not group.sharing.hold or not group.window.middle
                assert loses, "who runs keeps its blocks"

    def settle(self) -> None:
        """Nothing is left when all have gone."""
        while self.tokens:
            self.close(0)
            self.check()
        if self.sequences.shares:
            self.prefixes.drop_known()
        self.check()
        for group, store in zip(self.sequences.groups, self.stores):
            assert group.ledger.held_count == 0
            assert not store.device and not store.host
