"""Contract of the eviction axis: which evictable block leaves first.

A policy is an ordered bag of blocks. `BlockLedger` owns one and is the only caller; the same
object serves the pool on the device and a replayed trace. A policy sees `BlockMeta`, never
tensors, and no clock: time is the ledger's count of steps (one per block sealed or touched,
one per `tick`). No two blocks share a stamp, and what ties all the same ends at the block id.
One that goes by requests, sessions or seconds says so in `asks` and hears a `Moment` of each.

Life of a block in a policy:

    add -> touch* -> pop                      evicted: the policy's own choice
                  -> remove                   freed by its owner
        -> hold -> touch* -> release -> ...   pinned for a while: known, never popped
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import chain, islice, repeat

from kvlab import axes, kinds
from kvlab.core import BlockId
from kvlab.policy.meta import BlockMeta
from kvlab.policy.moment import Moment


def names() -> list[str]:
    """Short names of kvlab's own policies, sorted."""
    return sorted(axes.names("policy"))


def by_name(name: str, **parameters) -> EvictionPolicy:
    """A new policy of this short name or dotted path; BadInput lists the known ones."""
    return axes.by_name("policy", name, **parameters)


def asked(name: str) -> type[EvictionPolicy] | EvictionPolicy:
    """Whom to ask what the policy of this name or dotted path is: its class, or one made by it."""
    found = axes.find("policy", name)
    return found if isinstance(found, type) else found()


BULK = (  # a verb, and what stands for many of it
    ("add", "add_all"), ("add", "release_all"), ("release", "release_all"),
    ("remove", "hold_all"), ("hold", "hold_all"), ("touch", "touch_all"),
    ("pop", "pop_all"), ("expect", "pop_all"),
)  # fmt: skip


@kinds.members("policy")
class EvictionPolicy:
    """An ordered bag of evictable blocks. A subclass with a `name` can be asked for by it.

    The attributes say what a policy is; jobs, controls and tables ask them and no names.
    """

    name = ""  # short name, as in `policy=lru`; without one of its own, the name of the class
    evicts = True  # whether it ever gives a block up
    scored = False  # whether its order depends on `meta.score`
    control = False  # whether it is itself what other policies have to beat
    foresees = False  # whether it is made with the future of a trace
    bounds = False  # whether no policy can hit more: what it reaches is the most there is
    asks: tuple[str, ...] = ()  # fields of `Moment` without which it cannot work
    expires = False  # whether `begin` may give blocks up
    waits = False  # whether nothing leaves before a context is over, and was repeated
    # What the live cache makes scores and touches of: a scorer's name, dotted path, class or
    # instance (kvlab/cache/scores.py); None: spare the work.
    observes: object = "mass"
    # The scorer by which the same method chooses single tokens (cache.evict=token); None: it ranks
    # blocks only.
    by_token: object = None
    capacity: int | None = None  # blocks of the ledger it serves

    def __init_subclass__(cls, **rest):
        super().__init_subclass__(**rest)
        for verb, bulk in BULK:  # a verb that is new speaks for its bulk form, too
            if verb in cls.__dict__ and bulk not in cls.__dict__:
                setattr(cls, bulk, getattr(EvictionPolicy, bulk))
        if not cls.__dict__.get("name"):
            cls.name = cls.__name__  # an inherited one would pass it off as its parent
        elif not cls.__module__.startswith("kvlab."):
            axes.enlist("policy", cls.name, cls)

    def resize(self, capacity: int | None) -> None:
        """Say how many blocks the cache has (None: unbounded). Called before anything else."""
        self.capacity = capacity

    def add(self, meta: BlockMeta) -> None:
        """Learn of a block just sealed, or (where `hold` forgets) unpinned again."""
        raise NotImplementedError

    def remove(self, meta: BlockMeta) -> None:
        """Forget a block, evictable or held; one that is not known is no error."""
        raise NotImplementedError

    def touch(self, meta: BlockMeta) -> None:
        """Hear that a block was used; `last` and `hits` are already new. It may be held."""

    def rescore(self, meta: BlockMeta) -> None:
        """Hear that `meta.score` changed. It may be held."""

    def hold(self, meta: BlockMeta) -> None:
        """Stop offering a block that was pinned.

        A policy whose order is a function of the metadata forgets it here and finds its place
        again in `add`; one with state of its own overrides the pair and keeps that state.
        """
        self.remove(meta)

    def release(self, meta: BlockMeta) -> None:
        """Offer a held block again, in the place that it would have without the pin."""
        self.add(meta)

    def begin(self, moment: Moment) -> Sequence[BlockId]:
        """Hear which request comes: adds and touches up to the next one are its doing.

        Returns the blocks whose time is over, which are forgotten here (`expires`).
        """
        return ()

    def expect(self, content: int) -> None:
        """Hear what will take the place of the next victim, where the caller knows it."""

    def pop(self) -> BlockId:
        """Choose the victim and forget it; IndexError if nothing is evictable."""
        raise NotImplementedError

    # ---- many at a time: the same as one after the other, in this order, and faster where it can

    def add_all(self, metas: Sequence[BlockMeta]) -> None:
        """`add` each; none of them is pinned."""
        for meta in metas:
            self.add(meta)

    def touch_all(self, metas: Sequence[BlockMeta]) -> None:
        """`touch` each; no block comes twice, and `last` rises."""
        for meta in metas:
            self.touch(meta)

    def hold_all(self, metas: Sequence[BlockMeta]) -> None:
        """`hold` each."""
        for meta in metas:
            self.hold(meta)

    def release_all(self, metas: Sequence[BlockMeta]) -> None:
        """`release` each."""
        for meta in metas:
            self.release(meta)

    def pop_all(self, count: int, coming: Sequence[int | None] = ()) -> list[BlockId]:
        """`pop` so many, there being as many; before each, `expect` what comes in its place."""
        if not self.listens:
            return [self.pop() for _ in range(count)]
        victims = []
        for content in islice(chain(coming, repeat(None)), count):
            if content is not None:
                self.expect(content)
            victims.append(self.pop())
        return victims

    @property
    def listens(self) -> bool:
        """Whether `expect` does anything."""
        return type(self).expect is not EvictionPolicy.expect

    def tick(self, step: int) -> None:
        """Hear that a step (of decoding, or a request) is over."""

    def __len__(self) -> int:
        """Evictable blocks; held ones do not count."""
        raise NotImplementedError

    def __contains__(self, id: BlockId) -> bool:
        """Whether the block is evictable."""
        raise NotImplementedError


def nothing() -> IndexError:
    """What `pop` raises."""
    return IndexError("pop from a policy that has nothing evictable")


class NoEviction(EvictionPolicy):
    """The policy that gives nothing up: blocks leave when their owner frees them."""

    name = "none"
    evicts = False

    def add(self, meta):
        pass

    def remove(self, meta):
        pass

    def pop(self):
        raise IndexError("policy none evicts nothing; choose a policy or free a sequence")

    def __len__(self):
        return 0

    def __contains__(self, id):
        return False


class PriorityPolicy(EvictionPolicy):
    """A policy that is one function: the block of smallest `priority(meta)` leaves first.

    A heap with lazy deletion. `_filed` holds the entry in force of each evictable block, `_held`
    that of each pinned one. The heap holds, for each evictable block, at least one entry not above
    the one in force and puts it right when it surfaces, so a touch that raises a priority costs no
    heap operation. O(log n) amortized.
    """

    def __init__(self):
        self._heap: list[tuple] = []
        self._filed: dict[BlockId, tuple] = {}
        self._held: dict[BlockId, tuple] = {}

    def priority(self, meta: BlockMeta) -> float | tuple:
        """Smallest leaves first. Asked when a block is added, touched or rescored, not later."""
        raise NotImplementedError

    def add(self, meta):
        self._file((self.priority(meta), meta.id))

    def _file(self, entry):
        self._filed[entry[1]] = entry
        if len(self._heap) > 2 * len(self._filed) + 64:
            self._heap = list(self._filed.values())
            heapify(self._heap)
        else:
            heappush(self._heap, entry)

    def remove(self, meta):
        if self._filed.pop(meta.id, None) is None:
            self._held.pop(meta.id, None)

    def hold(self, meta):
        self._held[meta.id] = self._filed.pop(meta.id)

    def release(self, meta):
        self._file(self._held.pop(meta.id))

    def touch(self, meta):
        id = meta.id
        filed = self._filed.get(id)
        if filed is not None:
            entry = (self.priority(meta), id)
            if entry < filed:
                self._file(entry)
            elif entry != filed:  # an equal one must stay: the heap knows it by identity
                self._filed[id] = entry
        elif id in self._held:
            self._held[id] = (self.priority(meta), id)

    rescore = touch

    def pop(self):
        return self._pop()[1]

    def _pop(self) -> tuple[float | tuple, BlockId]:
        """Priority and id of the victim, which is forgotten."""
        heap, filed = self._heap, self._filed
        if not filed:
            raise nothing()
        while True:
            entry = heappop(heap)
            current = filed.get(entry[1])
            if current is entry:
                del filed[entry[1]]
                return entry
            if current is not None and entry < current:
                heappush(heap, current)

    def __len__(self):
        return len(self._filed)

    def __contains__(self, id):
        return id in self._filed
