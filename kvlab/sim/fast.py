"""Compiled replay: the results of the policy objects, to the block, at a hundred times the speed.

Needs numba (`pip install "kvlab[fast]"`). `sim/compiled/` has the policies and loops.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvlab.core import BadInput
from kvlab.policy import EvictionPolicy, asked, by_name
from kvlab.sim.outcome import Outcome, Tally
from kvlab.sim.sizes import ModelShape
from kvlab.sim.trace import Trace

try:
    from kvlab.sim.compiled import catalog, sums
    from kvlab.sim.compiled import runner as loops
except ModuleNotFoundError:  # numba is an optional extra
    catalog = sums = loops = None

PREFIX = (
    "arc", "belady", "fifo", "gdsf", "hybrid", "leaf_first", "lfu", "lru", "mq", "pgdsf",
    "priority", "random", "s3fifo", "sieve",
)  # fmt: skip
FLAT = ("fifo", "lru", "lfu", "sieve", "s3fifo")  # of them those that libcachesim has, too


class Compiled:
    """Runs pieces of a trace; tables grow with the different blocks, 30 to 70 bytes each.

    policy: a name, or an object that has served nobody yet. cost: of computing a block, by depth.
    host: (policy, capacity, mode) of a tier behind. whole: the only piece is a loaded trace.
    """

    def __init__(
        self,
        policy: str | EvictionPolicy,
        capacity: int,
        prefix: bool,
        partial_misses: bool = False,
        *,
        cost: Callable[[int], float] = lambda depth: 1.0,
        host: tuple[str | EvictionPolicy, int, str] | None = None,
        whole: bool = False,
    ):
        if loops is None:
            raise BadInput("compiled", True, 'needs numba: pip install "kvlab[fast]"')
        self._prefix = prefix
        tier = host and (_made(host[0]), *host[1:])
        self._runner = loops.Runner(
            _made(policy), capacity, tier, prefix, partial_misses, cost, whole
        )

    def foresee(self, trace: Trace, uses: np.ndarray | None) -> None:
        """Tell Belady the future: this trace, of each request the first `uses` [R] accesses."""
        self._runner.foresee(loops.belady_keys(trace, uses))

    def run(self, piece: Trace) -> Outcome:
        return self._runner.run(piece)

    def tally(self, shape: ModelShape, window_seconds: float | None) -> Tally:
        """Sums of what `run` returns; call `add` after each piece."""
        if not self._prefix:
            return Tally(shape, window_seconds)
        return sums.CompiledTally(shape, window_seconds, self._runner)

    def more(self) -> dict:
        return self._runner.more()


def _made(policy: str | EvictionPolicy):
    if isinstance(policy, str):
        policy = asked(policy)(()) if asked(policy).bounds else by_name(policy)
    found = catalog.made(policy)
    if found is None:
        raise BadInput("policy", policy.name, f"compiled replay knows: {', '.join(PREFIX)}")
    if policy.capacity is not None or len(policy):
        raise BadInput("policy", policy.name, "has served a cache already; give a new one")
    return found
