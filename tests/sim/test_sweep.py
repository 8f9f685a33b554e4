"""A sweep is its simulations, whatever runs them."""

from contextlib import nullcontext

import pytest

from kvlab.core import BadInput
from kvlab.sim import TraceStream, fast, simulate, sweep, write_trace
from kvlab.sim.jobs import HitRate


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sweep_gives_each_simulation_in_order(trie, tmp_path, compiled):
    pytest.importorskip("joblib")
    if compiled and fast.loops is None:
        pytest.skip("the extra `fast` is not installed")
    trace = trie(1, 60, 5, 3)
    stream = TraceStream(write_trace(trace, tmp_path / "t.jsonl"), piece=50)
    for source in (trace, stream):
        found = list(sweep(source, ["lru", "fifo"], [5, 20], jobs=2, compiled=compiled))
        cells = [(capacity, policy) for capacity in (5, 20) for policy in ("lru", "fifo")]
        for result, (capacity, policy) in zip(found, cells, strict=True):
            alone = simulate(source, policy, capacity, compiled=compiled)
            assert vars(result) == vars(alone)


def test_a_sweep_refuses_what_a_simulation_refuses(trie):
    pytest.importorskip("joblib")
    with pytest.raises(BadInput, match="known: adaptive"):
        list(sweep(trie(1), ["lrru"], [5], jobs=1))


class Folder:
    """Rows kept in memory."""

    def __init__(self):
        self.rows = []

    def done(self, variant, params):
        return False

    def surviving(self, variant, params):
        return nullcontext()

    def add(self, variant, params, rows):
        self.rows.append((variant, params, rows))


def test_a_job_writes_the_same_rows_however_it_computes_them(trie):
    pytest.importorskip("joblib")
    pytest.importorskip("numba")
    found = []
    for how in ({}, {"compiled": True, "jobs": 2}):
        folder = Folder()
        HitRate(trie(2, 60, 5, 3), ["lru", "adaptive", "belady"], [5, 20], **how).run(folder)
        found.append([(v, p, [r for r in rows if r.name != "orphans"])
                      for v, p, rows in folder.rows])  # fmt: skip
    assert found[0] == found[1]
