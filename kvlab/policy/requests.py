"""LFU and ARC that count a request once, however often it touches a block."""

from __future__ import annotations

from kvlab.core import BlockId
from kvlab.policy.classic import LFU
from kvlab.policy.lru_queues import ARC
from kvlab.policy.moment import NOW


class _Once:
    """Tells the first touch of a block by a request from the others by the same one. Where nobody
    says which request it is, each touch is the first."""

    def __init__(self):
        self._number = NOW.number
        self._by: dict[BlockId, int] = {}  # block -> the request that used it last

    def turn(self, number: int) -> None:
        self._number = number

    @property
    def told(self) -> bool:
        """Whether anybody says which request it is."""
        return self._number != NOW.number

    def first(self, id: BlockId) -> bool:
        """Whether this request had not used the block; it has from now on."""
        if self.told and self._by.get(id) == self._number:
            return False
        self._by[id] = self._number
        return True


class RequestLFU(LFU):
    """LFU by requests: the block that fewest requests used leaves, the least recent of them first.

    An engine that touches a block at every step of a running request makes LFU count steps
    (vLLM's offloading did until https://github.com/vllm-project/vllm/pull/51787). Where a request
    touches each block once, as in a replay one request at a time, this is LFU.
    Differs from LFU: touches after a request's first change neither count nor recency.
    """

    name = "request_lfu"
    asks = ("number",)

    def __init__(self):
        super().__init__()
        self._touches = _Once()
        self._uses: dict[BlockId, tuple[int, int]] = {}  # requests and last step, held included

    def begin(self, moment):
        self._touches.turn(moment.number)
        return ()

    def add(self, meta):
        self._touches.first(meta.id)
        self._uses[meta.id] = 0, meta.born
        super().add(meta)

    def release(self, meta):
        super().add(meta)

    def touch(self, meta):
        if self._touches.first(meta.id):
            self._uses[meta.id] = self._uses[meta.id][0] + 1, meta.last
            super().touch(meta)

    def _rank(self, meta):
        return self._uses[meta.id]


class RequestARC(ARC):
    """ARC by requests: a block moves up when another request uses it, and a request that finds
    many blocks in one ghost list moves the target once.

    What vLLM's offloading does since https://github.com/vllm-project/vllm/pull/51787. In ARC on
    blocks a prompt of a thousand evicted blocks moves the target a thousand times, to one end.
    """

    name = "request_arc"
    asks = ("number",)

    def __init__(self):
        super().__init__()
        self._touches = _Once()
        self._learned: set[bool] = set()  # lists that this request learned from: rising or not

    def begin(self, moment):
        self._touches.turn(moment.number)
        self._learned.clear()
        return ()

    def add(self, meta):
        self._touches.first(meta.id)
        super().add(meta)

    def touch(self, meta):
        if self._touches.first(meta.id):
            super().touch(meta)

    def _learn(self, change):
        if self._touches.told and (change > 0) in self._learned:
            return
        self._learned.add(change > 0)
        super()._learn(change)
