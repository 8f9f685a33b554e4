"""The compiled path gives the results of the policy objects, to the last count."""

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import Host, TraceStream, fast, simulate, write_trace
from kvlab.sim.workloads import scans

needs_numba = pytest.mark.skipif(fast.loops is None, reason="the extra `fast` is not installed")


def same(trace, policy, capacity, **more):
    plain = vars(simulate(trace, policy, capacity, **more))
    quick = vars(simulate(trace, policy, capacity, compiled=True, **more))
    plain["orphans"] = None  # counted where the ledger is
    assert plain == quick, (policy, capacity)


@needs_numba
@pytest.mark.parametrize("policy", fast.FLAT)
def test_flat_results_are_the_same(trie, policy):
    for seed in range(40):
        trace = trie(seed, requests=60, depth=5, fan=3)
        for capacity in (1, 2, 3, 7, 10, 11, 20, 33, 60):
            same(trace, policy, capacity, prefix=False)
    same(scans(100), policy, 500, prefix=False)


@needs_numba
@pytest.mark.parametrize("partial", ["hit", "miss"])
def test_prefix_results_are_the_same(trie, partial):
    for seed in range(40):
        trace = trie(seed, requests=60, depth=5, fan=3)
        for capacity in (2, 4, 7, 11, 20, 60):
            same(trace, "lru", capacity, partial_blocks=partial)


@needs_numba
@pytest.mark.parametrize("policy", fast.FLAT)
def test_a_stream_is_one_run(tmp_path, trie, policy):
    trace = trie(3, requests=300, depth=6, fan=3)
    stream = TraceStream(write_trace(trace, tmp_path / "t.jsonl"), piece=50)
    whole = simulate(trace, policy, 25, prefix=False, compiled=True)
    assert vars(simulate(stream, policy, 25, prefix=False, compiled=True)) == vars(whole)


@needs_numba
def test_sparse_ids_are_fine_in_a_trace_and_refused_in_a_stream(tmp_path, tiny):
    trace = tiny([-3, 2**50], [-3])
    assert simulate(trace, "lru", 2, compiled=True).block_hits == 1
    stream = TraceStream(write_trace(trace, tmp_path / "t.jsonl"))
    with pytest.raises(BadInput, match="block ids must lie in"):
        simulate(stream, "lru", 2, compiled=True)


@needs_numba
def test_what_is_not_compiled_is_refused(tiny):
    with pytest.raises(BadInput, match="compiled flat replay knows: fifo, lru"):
        simulate(tiny([0]), "arc", prefix=False, compiled=True)
    with pytest.raises(BadInput, match="compiled prefix-correct replay knows: lru"):
        simulate(tiny([0]), "fifo", compiled=True)
    with pytest.raises(BadInput, match="no host"):
        simulate(tiny([0]), "lru", host=Host(3), compiled=True)


def test_without_numba_the_remedy_is_named(monkeypatch, tiny):
    monkeypatch.setattr(fast, "loops", None)
    with pytest.raises(BadInput, match=r"pip install .kvlab\[fast\]"):
        simulate(tiny([0]), "lru", compiled=True)


@needs_numba
def test_long_tables_grow_without_losing_state():
    from kvlab.sim import from_requests

    ids = np.concatenate([np.arange(500), np.arange(5000, 5500), np.arange(0, 500)])
    whole = from_requests([(0.0, 1, 0, [i]) for i in ids.tolist()], 1)
    runner = fast.Compiled("lru", 600, prefix=False)
    parts = [runner.run(whole.select(np.arange(1500) // 500 == part)) for part in range(3)]
    code = np.concatenate([part.code for part in parts])
    plain = fast.Compiled("lru", 600, prefix=False).run(whole).code
    assert np.array_equal(code, plain)
