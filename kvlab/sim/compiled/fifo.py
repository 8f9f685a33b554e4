"""FIFO: one line by birth."""

from kvlab.sim.compiled.lru import add, hold, pop, release, remove  # noqa: F401
