"""Compiled replay: the results of the policy objects, to the block, at a hundred times the speed.

Needs numba (`pip install "kvlab[fast]"`). `sim/compiled/` has the policies and loops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvlab.core import BadInput
from kvlab.policy import Adaptive, EvictionPolicy, asked, by_name
from kvlab.sim.outcome import Outcome, Tally
from kvlab.sim.sizes import ModelShape
from kvlab.sim.trace import Trace

try:
    from kvlab.sim.compiled import catalog, chooser, sums
    from kvlab.sim.compiled import runner as loops
except ModuleNotFoundError:  # numba is an optional extra
    catalog = chooser = sums = loops = None

PREFIX = (
    "adaptive", "admit_cost", "admit_reuse", "arc", "belady", "fifo", "gdsf", "hybrid",
    "keep_until_return", "leaf_first", "learned", "lfu", "lru", "mq", "none", "pgdsf", "priority",
    "random", "request_arc", "request_lfu", "s3fifo", "sieve", "ttl", "wa_lru",
)  # fmt: skip
FLAT = ("fifo", "lru", "lfu", "sieve", "s3fifo")  # of them those that libcachesim has, too


class Compiled:
    """Runs pieces of a trace; tables grow with the different blocks, 30 to 70 bytes each.

    policy: a name, or an object that has served nobody yet. cost: of computing a block, by depth.
    tiers: (policy, capacity, mode) of each behind, two at most, the nearest first. whole: the only
    piece is a loaded trace.
    """

    def __init__(
        self,
        policy: str | EvictionPolicy,
        capacity: int,
        prefix: bool,
        partial_misses: bool = False,
        *,
        cost: Callable[[int], float] = lambda depth: 1.0,
        tiers: Sequence[tuple[str | EvictionPolicy, int, str]] = (),
        whole: bool = False,
    ):
        if loops is None:
            raise BadInput("compiled", True, 'needs numba: pip install "kvlab[fast]"')
        self._prefix = prefix
        behind = [(_made(by_name(p) if isinstance(p, str) else p), *rest) for p, *rest in tiers]
        how = partial_misses, cost, whole
        if policy == Adaptive.name:
            policy = Adaptive()
        if type(policy) is Adaptive:
            if not prefix:
                raise BadInput("compiled", True, "has the adaptive chooser with prefix=True only")
            members = [_member(member) for member in policy.members]
            self._runner = chooser.Chooser(policy, members, capacity, behind, *how)
        else:
            self._runner = loops.Runner(_made(policy), capacity, behind, prefix, *how)

    def foresee(self, trace: Trace, uses: np.ndarray | None) -> None:
        """Tell the policy the future: this trace, of each request the first `uses` [R] accesses;
        None: each access on its own."""
        self._runner.foresee(trace, uses)

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
    if isinstance(policy, str):  # the future comes by `foresee`
        policy = by_name(policy, **({"future": ()} if asked(policy).foresees else {}))
    found = catalog.made(policy)
    if found is None:
        raise BadInput("policy", policy.name, _why_not(policy))
    if policy.capacity is not None or len(policy):
        raise BadInput("policy", policy.name, "has served a cache already; give a new one")
    return found


def _member(policy: EvictionPolicy):
    """A member of the adaptive chooser: one that can begin in the middle of a trace."""
    if policy.foresees or type(catalog.innermost(policy)) in catalog.BY_BIRTH:
        remedy = "is no member of a compiled chooser: it goes by the future or by birth"
        raise BadInput("policy.members", policy.name, remedy)
    return _made(policy)


def _why_not(policy: EvictionPolicy) -> str:
    member = getattr(policy, "member", None)
    if isinstance(policy, Adaptive):
        return "is compiled alone: not for a tier behind, over leaves or behind a door"
    if policy.scored:
        return "goes by scores of attention, which no trace has; compiled replay leaves it out"
    if member is not None and member.foresees:
        return f"has a member that knows the future, {member.name}, which is compiled alone"
    if hasattr(policy, "door"):
        return "has a door before another door, fifo or request_lfu, which is not compiled"
    return f"compiled replay knows: {', '.join(PREFIX)}, and leaf_first and doors over them"
