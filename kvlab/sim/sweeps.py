"""Many policies at many capacities over one trace, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

from kvlab.core import BadInput
from kvlab.sim.files import TraceStream
from kvlab.sim.result import SimResult
from kvlab.sim.simulator import simulate
from kvlab.sim.trace import Trace


def sweep(
    trace: Trace | TraceStream,
    policies: Sequence[str],
    capacities: Sequence[int],
    *,
    jobs: int = -1,
    **how,
) -> Iterator[SimResult]:
    """A result for each capacity and policy in turn, policies changing first, as they get ready.

    jobs: simulations at a time, by joblib (the extra `fast`); -1 takes all cores. how: as in
    `simulate`. Compiled ones run in threads, which share a loaded trace; others in processes. Each
    reads a stream for itself, so that memory stays that of `jobs` pieces and `jobs` states.
    """
    cells = [(trace, policy, capacity) for capacity, policy in product(capacities, policies)]
    for ready in attempts(partial(simulate, **how), cells, jobs, bool(how.get("compiled"))):
        yield ready()


def attempts(run: Callable, calls: Sequence[tuple], jobs: int, threads: bool) -> Iterator[Callable]:
    """For each call's arguments, in order, what gives its result or raises what it raised.

    jobs: calls at a time; 1 makes each when it is asked for. threads: else processes.
    """
    if jobs == 1:
        yield from (partial(run, *call) for call in calls)
        return
    try:
        from joblib import Parallel, delayed
    except ModuleNotFoundError:
        raise BadInput("jobs", jobs, 'needs joblib: pip install "kvlab[fast]"') from None
    prefer = "threads" if threads else "processes"
    made = Parallel(jobs, prefer=prefer, return_as="generator")
    yield from made(delayed(_attempt)(run, call) for call in calls)


def _attempt(run: Callable, call: tuple) -> Callable:
    try:
        return partial(_give, run(*call))
    except Exception as error:
        return partial(_raise, error)


def _give(result):
    return result


def _raise(error: Exception):
    raise error
