"""Time of a run, in ms from its start: the wall's, or one that counts steps and so repeats."""

from __future__ import annotations

import time


class WallClock:
    """Real time; waiting sleeps."""

    def start(self) -> None:
        self._began = time.perf_counter()

    @property
    def now_ms(self) -> float:
        return 1e3 * (time.perf_counter() - self._began)

    def wait_until(self, ms: float) -> None:
        time.sleep(max(0.0, ms - self.now_ms) / 1e3)

    def step(self) -> None:
        """A step begins; what it computes is there at its end."""


class StepClock(WallClock):
    """Every step takes `ms`, whatever it does; waiting takes no time."""

    def __init__(self, ms: float = 1.0):
        self.ms, self._now = ms, 0.0

    def start(self):
        self._now = 0.0

    @property
    def now_ms(self):
        return self._now

    def wait_until(self, ms):
        self._now = max(self._now, ms)

    def step(self):
        self._now += self.ms
