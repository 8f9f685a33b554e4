"""Admission: what is not worth keeping waits at the door, and the door empties first."""

from __future__ import annotations

from kvlab.core import BadInput, BlockId, check_number
from kvlab.policy.base import BlockMeta, EvictionPolicy, by_name, nothing
from kvlab.policy.line import Line
from kvlab.policy.moment import NOW, refuse_expiring
from kvlab.policy.queues import Ghosts


class Admission(EvictionPolicy):
    """A door in front of another policy.

    A running request needs its blocks, so none can be turned away; those not admitted stand in a
    FIFO queue, the door, which gives way before the member does while it is over its share.
    A use is asked again. All blocks of one request are judged alike or the earlier ones better, so
    that no block is kept whose prefix is not.
    """

    name = ""

    def __init__(self, member: str | EvictionPolicy, door: float):
        if not 0 <= door < 1:
            raise BadInput("policy.door", door, "must be a share of the cache, from 0 to below 1")
        self.member = by_name(member) if isinstance(member, str) else member
        refuse_expiring("policy.member", self.member)
        self.observes, self.scored = self.member.observes, self.member.scored
        self.asks = tuple(dict.fromkeys((*type(self).asks, *self.member.asks)))
        self.door, self._door, self._entries = door, Line(), 0
        self._waiting: dict[BlockId, BlockMeta] = {}  # at the door, held ones included
        self._held: set[BlockId] = set()  # of those at the door
        self.moment = NOW

    def admits(self, meta: BlockMeta, new: bool) -> bool:
        """Whether a block goes to the member, as it comes (`new`) or is used at the door."""
        raise NotImplementedError

    def left(self, meta: BlockMeta) -> None:
        """Hear that a block was evicted at the door."""

    def resize(self, capacity):
        super().resize(capacity)
        self.member.resize(capacity)

    def begin(self, moment):
        self.moment = moment
        return self.member.begin(moment)

    def add(self, meta):
        if self.admits(meta, new=True):
            self.member.add(meta)
            return
        self._entries += 1
        meta.place = self._entries
        self._waiting[meta.id] = meta
        self._door.push(meta)

    def touch(self, meta):
        if meta.id not in self._waiting:
            self.member.touch(meta)
        elif self.admits(meta, new=False):
            held = meta.id in self._held
            self._forget(meta)
            self.member.add(meta)
            if held:
                self.member.hold(meta)

    def _forget(self, meta):
        del self._waiting[meta.id]
        if meta.id in self._held:
            self._held.remove(meta.id)
            self._door.size -= 1
            meta.line = None
        else:
            self._door.remove(meta)

    def remove(self, meta):
        if meta.id in self._waiting:
            self._forget(meta)
        else:
            self.member.remove(meta)

    def hold(self, meta):
        if meta.id in self._waiting:
            self._door.hold(meta)
            self._held.add(meta.id)
        else:
            self.member.hold(meta)

    def release(self, meta):
        if meta.id in self._held:
            self._held.remove(meta.id)
            self._door.release(meta)
        else:
            self.member.release(meta)

    def rescore(self, meta):
        if meta.id not in self._waiting:
            self.member.rescore(meta)

    def expect(self, content):
        self.member.expect(content)

    def tick(self, step):
        self.member.tick(step)

    def pop(self):
        blocks = self.capacity or len(self)
        if self._door and (self._door.size > self.door * blocks or not len(self.member)):
            meta = self._door.pop()
            del self._waiting[meta.id]
            self.left(meta)
            return meta.id
        if not len(self.member):
            raise nothing()
        return self.member.pop()

    def __len__(self):
        return len(self._door) + len(self.member)

    def __contains__(self, id):
        return id in self._door or id in self.member


class AdmitReuse(Admission):
    """Admission by expected reuse: a block is kept once it has been asked for `uses` times.

    TinyLFU's thought (Einziger, Friedman and Manes 2017, https://doi.org/10.1145/3149371) with the
    door as its window and exact counts of what left it.
    member: the policy behind the door (default lru). uses: askings that admit (2).
    door: share of the cache for what is not admitted (0.1). ghosts: contents remembered after
    leaving the door, in cache sizes (4).
    """

    name = "admit_reuse"

    def __init__(
        self, member: str | EvictionPolicy = "lru", uses: int = 2, door: float = 0.1,
        ghosts: float = 4.0,
    ):  # fmt: skip
        if uses < 2:
            raise BadInput("policy.uses", uses, "must be at least 2; 1 admits all")
        check_number("policy.ghosts", ghosts, 0, whole=False)
        super().__init__(member, door)
        self.uses, self.ghosts = uses, ghosts
        self._ghosts = Ghosts()
        self._asked: dict[BlockId, int] = {}

    def admits(self, meta, new):
        before = (self._ghosts.recall(meta.content) or 0) if new else self._asked[meta.id]
        self._asked[meta.id] = before + 1
        return before + 1 >= self.uses

    def left(self, meta):
        limit = int(self.ghosts * (self.capacity or len(self)))
        self._ghosts.remember(meta.content, self._asked[meta.id], limit)


class AdmitCost(Admission):
    """Admission by cost: only prompts of at least `tokens` tokens are kept.

    As hosted services do, which cache prompts from 1,024 tokens on
    (https://platform.openai.com/docs/guides/prompt-caching): a short one is soon computed again.
    member: the policy behind the door (default lru). tokens: of the prompt (1024). door: share of
    the cache for what is not admitted (0.1).
    """

    name = "admit_cost"
    asks = ("tokens",)

    def __init__(self, member: str | EvictionPolicy = "lru", tokens: int = 1024, door: float = 0.1):
        if tokens < 1:
            raise BadInput("policy.tokens", tokens, "must be at least 1")
        super().__init__(member, door)
        self.tokens = tokens

    def admits(self, meta, new):
        return self.moment.tokens >= self.tokens
