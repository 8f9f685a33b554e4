"""The adaptive chooser on arrays makes the choices of its object."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compiled import in_turn, needs_numba, replay, same, tries

from kvlab.core import BadInput
from kvlab.policy import Adaptive, AdmitReuse, Hybrid, Random
from kvlab.sim import fast, simulate

QUICK = partial(Adaptive, memory=2, patience=0.1)
CHOOSERS = {
    "lists": lambda: QUICK(["lru", "lfu", "s3fifo"], floor=100),
    "in part": lambda: QUICK(["lru", "arc", "mq"], floor=2),
    "leaves": lambda: QUICK(["lru", "pgdsf", Hybrid(half_life=5)], floor=3),
    "by requests": lambda: QUICK(["lru", "lfu", "keep_until_return", "wa_lru"], floor=3),
    "doors and draws": lambda: QUICK([Random(), AdmitReuse("gdsf", door=0.4), "gdsf"], floor=3),
    "hasty": lambda: Adaptive(["sieve", "lru", "pgdsf"], memory=0.5, patience=0, floor=2),
}


COMPILED = {"lists", "doors and draws"}


@needs_numba
@pytest.mark.parametrize("name, how", in_turn(CHOOSERS, COMPILED), indirect=["how"])
def test_requests(name, how):
    @settings(max_examples=120, deadline=None)
    @given(tries(), st.sampled_from([1, 2, 3, 5, 8, 13, 20]), st.sampled_from(["hit", "miss"]))
    def check(trace, capacity, partial_blocks):
        same(trace, CHOOSERS[name], capacity, partial_blocks=partial_blocks)

    check()


@needs_numba
@pytest.mark.parametrize("piece", [14, 3])
def test_a_new_leader_has_heard_of_no_request_before(tiny, plain, piece):
    """WA-LRU counts the requests of a kind and how many of them were followed. Who counts followers
    of requests that came before the lead sees more followed than there are, and took 5 for 0."""
    trace = tiny(*[[0]] * 8, [1], [0, 2], [0, 3, 4, 5], [1], [0], [6])
    trace = replace(trace, arrival_ms=np.zeros(14), columns={"session": np.zeros(14, dtype=int)})

    def policy():
        return QUICK(["lru", "wa_lru"], floor=3)

    assert replay(trace, policy, 5)[1][1] == [1, 2, 0]
    runner = fast.Compiled(policy(), 5, True)
    pieces = [trace.select(np.arange(14) // piece == at) for at in range(-(-14 // piece))]
    assert [id for part in pieces for id in runner.run(part).evicted] == [1, 2, 0]


@needs_numba
def test_ids_that_change_their_depth_are_refused(tiny):
    trace = tiny([1, 2, 3], [3, 1])
    with pytest.raises(BadInput, match="where ids keep their depth; 1 does not"):
        simulate(trace, "adaptive", 4, compiled=True)
    assert simulate(trace, "adaptive", 4).block_hits == 2


@needs_numba
def test_a_leader_may_change_with_the_last_request(trie, plain):
    trace = trie(3, requests=40, depth=5, fan=3)
    for count in range(1, 41):
        same(trace.select(np.arange(40) < count), CHOOSERS["lists"], 5)
