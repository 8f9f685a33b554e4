"""Copies that are made as late as they may be: when somebody waits for them, and no earlier."""

from __future__ import annotations

from kvlab.offload import HostStore
from kvlab.pool import Here


class Late(Here):
    """Whoever reads rows without waiting for them reads what was there before.

    log: "begin", then the number of each copy when it is made.
    """

    def __init__(self):
        self.waiting, self.made, self.log = [], 0, []

    def begin(self):
        self.log.append("begin")

    def run(self, copy):
        self.waiting.append(copy)
        return self.made + len(self.waiting)

    def wait(self, ticket):
        while self.made < ticket:
            self.waiting.pop(0)()
            self.made += 1
            self.log.append(self.made - 1)

    finish = wait


class LateStore(HostStore):
    """`offload=host` with such copies. lanes: of the caches that were built with it."""

    def __init__(self, **settings):
        super().__init__(layerwise=True, **settings)
        self.lanes: list[Late] = []

    def lane(self, device):
        self.lanes.append(Late())
        return self.lanes[-1]
