"""Arrivals, pauses, context caps and shared heads: traces small enough to follow by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import Definitions, Sessions, Trace, from_requests
from kvlab.sim.definitions import common_head
from kvlab.sim.describe import ideal
from kvlab.sim.jobs import HitRate


def two(**columns) -> Trace:
    """Two sessions of two requests, blocks of 10 tokens, and a sub-agent (2) of the first."""
    made = from_requests(
        [
            (0, 20, 5, [1, 2]), (0, 20, 5, [11, 12]), (4000, 30, 5, [1, 2, 3]),
            (6000, 10, 5, [1]), (9000, 40, 5, [11, 12, 13, 14]),
        ], 10,
    )  # fmt: skip
    known = {
        "session": [0, 1, 0, 2, 1], "root": [0, 1, 0, 0, 1], "scope": [0] * 5,
        "think_ms": [np.nan, np.nan, 1000, np.nan, 2000], "shared_tokens": [20, 20, 20, 10, 20],
    }  # fmt: skip
    columns = {name: np.array(column) for name, column in {**known, **columns}.items()}
    return replace(made, columns=columns, whole_blocks=True)


def times(trace: Trace) -> list[tuple[int, float]]:
    """(session, seconds) of each request in order."""
    return list(zip(trace.columns["session"].tolist(), (trace.arrival_ms / 1e3).tolist()))


def test_nothing_chosen_changes_nothing():
    trace = two()
    assert Sessions().apply(trace) is trace


@pytest.mark.parametrize(
    "chosen, expected",
    [
        ({"arrivals": "together"}, [(0, 0), (1, 0), (0, 4), (2, 6), (1, 9)]),
        # one at a time: the second begins when the last request of the first has come
        ({"arrivals": "concurrency", "concurrency": 1}, [(0, 0), (0, 4), (1, 6), (2, 6), (1, 15)]),
        # answers take no time: 1 and 2 s of thinking; the sub-agent 2 s after the second request
        ({"loop": "closed"}, [(0, 0), (1, 0), (0, 1), (1, 2), (2, 3)]),
        ({"think": 0.5}, [(0, 0), (1, 0), (0, 0.5), (1, 0.5), (2, 1)]),
    ],
)
def test_when_requests_come(chosen, expected):
    made = Sessions(**chosen).apply(two())
    assert sorted(times(made), key=lambda r: (r[1], r[0])) == expected
    assert (np.diff(made.arrival_ms) >= 0).all()


def test_poisson_moves_whole_sessions():
    made = Sessions(arrivals="poisson", rate=0.1, seed=3).apply(two())
    at = dict.fromkeys(made.columns["session"].tolist())
    for session in at:
        at[session] = made.arrival_ms[made.columns["session"] == session]
    assert np.diff(at[0]).tolist() == [4000.0] and np.diff(at[1]).tolist() == [9000.0]
    assert at[2][0] - at[0][0] == 6000.0 and at[1][0] > 0
    again = Sessions(arrivals="poisson", rate=0.1, seed=3).apply(two())
    assert again.arrival_ms.tolist() == made.arrival_ms.tolist()


def test_the_blocks_go_with_their_requests():
    plain, made = two(), Sessions(arrivals="concurrency", concurrency=1).apply(two())
    number = made.columns["number"].tolist()
    assert [list(plain.requests())[n] for n in number] == list(made.requests())
    assert made.columns["follows"].tolist() == [[-1, -1, 0, 2, 1][n] for n in number]


@pytest.mark.parametrize(
    "how, left, hits",
    [("cut", [2, 2, 2, 1, 2], 5), ("drop", [2, 2, 1], 1), ("end", [2, 2, 1], 1)],
)
def test_context_caps(how, left, hits):
    made = Sessions(context_tokens=20, over_context=how).apply(two())
    assert np.diff(made.first).tolist() == left and made.input_tokens.max() == 20
    assert ideal(made).block_hits == hits


def test_the_session_ends_at_its_first_long_prompt():
    trace = two(session=[0, 0, 0, 0, 0], root=[0] * 5)
    assert len(Sessions(context_tokens=20, over_context="end").apply(trace)) == 2
    assert len(Sessions(context_tokens=20, over_context="drop").apply(trace)) == 3


def test_heads_are_shared_by_sessions_of_a_model():
    plain, made = two(), Sessions(shared_heads=1.0).apply(two())
    ids = list(made.requests())
    # the sub-agent's head is 1 block and it begins as the main session does: 1 block is shared
    assert ids[0][0] == ids[2][0] != ids[3][0]
    assert len(set(ids[1]) & set(ids[4])) == 2 and ids[0][1:] == [2]
    assert ids[0][0] == ids[1][0]
    made.check_prefix_chained()
    assert ideal(made).block_hits == ideal(plain).block_hits  # + head of 1, - sub-agent's own
    apart = Sessions(shared_heads=1.0).apply(two(scope=[0, 1, 0, 0, 1]))
    assert not set(list(apart.requests())[0]) & set(list(apart.requests())[1])


def test_every_choice_stands_in_the_rows():
    job = HitRate(two(), ["lru"], [9], sessions=Sessions(arrivals="poisson", rate=2))
    (point,) = job._by_capacity()
    told = {k: v for k, v in point.params.items() if k.startswith("sessions_")}
    assert told == {
        "sessions_arrivals": "poisson", "sessions_rate": 2, "sessions_think": "recorded",
        "sessions_loop": "open", "sessions_context_tokens": None, "sessions_shared_heads": 0.0,
        "sessions_seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "call",
    [
        lambda: Sessions(arrivals="now"), lambda: Sessions(rate=0), lambda: Sessions(think="long"),
        lambda: Sessions(shared_heads=2), lambda: Sessions(concurrency=0),
        lambda: Sessions(context_tokens=25).apply(two()),
        lambda: Sessions(context_tokens=5, over_context="drop").apply(two()),
        lambda: Sessions(loop="closed").apply(from_requests([(0, 5, 1, [1])], 5)),
        lambda: Sessions(shared_heads=0.5).apply(from_requests([(0, 5, 1, [1])], 5)),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(BadInput):
        call()


def test_a_head_that_all_requests_share_can_be_left_out():
    """Its hits are the same at every capacity: what is left are the others."""
    rows = [(n, 30, 1, [0, 10 * n % 30 + 1, 10 * n % 30 + 2]) for n in range(6)]
    trace = from_requests(rows, 10)
    plain, less = ideal(trace), ideal(Definitions(common_head="skipped").apply(trace))
    assert (plain.block_hits, plain.block_accesses, plain.tokens) == (5 + 6, 18, 180)
    assert (less.block_hits, less.block_accesses, less.tokens) == (6, 12, 120)
    assert common_head(trace) == 1 and common_head(two()) == 0
