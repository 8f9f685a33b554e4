"""Queues, closed loops, throughput and money, on requests that can be followed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import CostModel, Sessions, from_requests, simulate
from kvlab.sim.costs import Calibration

# 4 tokens (one block) take a second to prefill, an output token takes a second, side by side
SLOW = {"prefill_tokens_per_second": 4.0, "decode_tokens_per_second": 1.0, "chunk_tokens": None}


def trace(*rows):
    """Rows of (second, block ids, output tokens), blocks of 4 tokens."""
    return from_requests([(1e3 * at, 4 * len(ids), out, ids) for at, ids, out in rows], 4)


def test_prompts_are_computed_one_after_the_other():
    t = trace((0, [0, 1], 0), (0, [2, 3], 0), (0, [4], 0))
    alone = simulate(t, "lru", 20, service=CostModel(**SLOW)).service
    queued = simulate(t, "lru", 20, service=CostModel(**SLOW, prefills=1)).service
    assert alone["ttft_ms"] == (2000 + 2000 + 1000) / 3 and alone["queue_mean_ms"] == 0
    assert queued["ttft_ms"] == (2000 + 4000 + 5000) / 3
    assert queued["queue_mean_ms"] == (0 + 2000 + 4000) / 3
    assert queued["stalled_requests"] == 0
    two = simulate(t, "lru", 20, service=CostModel(**SLOW, prefills=2)).service
    assert two["ttft_ms"] == (2000 + 2000 + 3000) / 3


def test_only_so_many_run():
    t = trace((0, [0], 3), (0, [1], 3), (0, [2], 3))
    served = simulate(t, "lru", 20, service=CostModel(**SLOW, running=1)).service
    assert served["peak_in_flight_requests"] == 1
    assert served["ttft_ms"] == (1000 + 5000 + 9000) / 3 and served["stalled_requests"] == 2


def test_throughput_money_and_joules():
    t = trace((0, [0, 1], 2), (10, [0, 1], 2))
    cost = CostModel(**SLOW, dollars_per_hour=3.6, watts=500)
    told = simulate(t, "lru", 20, service=cost).service
    # first: 2 + 2 s; second: 1 token of prefill (0.25 s) + 2 s, ends at 12.25 s
    assert told["makespan_seconds"] == 12.25 and told["busy_percent"] == pytest.approx(
        100 * (4 + 2.25) / 12.25
    )
    assert told["served_output_tokens_per_second"] == pytest.approx(4 / 12.25)
    assert told["dollars_per_million_tokens"] == pytest.approx(12.25 * 1e-3 / 20e-6)
    assert told["joules_per_million_tokens"] == pytest.approx(500 * 12.25 / 20e-6)
    assert "dollars_per_million_tokens" not in simulate(t, "lru", 9, service=CostModel()).service


def test_calibrated_times_depend_on_length_and_company(tmp_path):
    Calibration((100, 1, 0.01), (10, 1, 0), (0, 1), (0, 1), 4.0, {}).write(tmp_path / "c.json")
    cost = CostModel(calibration=str(tmp_path / "c.json"), chunk_tokens=None)
    t = trace((0, [0, 1], 2), (0, [0, 1, 2], 2), (9, [0, 1, 2, 3], 0))
    told = simulate(t, "lru", 20, service=cost).service
    last = 100 + 4 + 0.01 * (16**2 - 12**2)  # 12 tokens were there
    assert told["ttft_ms"] == pytest.approx((108.64 + 113.44 + last) / 3)


def two_sessions(think=1000.0):
    """Two sessions of two turns each, recorded 100 s apart."""
    made = trace((0, [0, 1], 2), (0, [5, 6], 2), (100, [0, 1, 2], 2), (100, [5, 6, 7], 2))
    pause = np.array([np.nan, np.nan, think, think])
    return replace(made, columns={"session": np.array([0, 1, 0, 1]), "think_ms": pause})


def test_in_a_closed_loop_the_next_turn_waits_for_the_answer():
    sessions = Sessions(loop="closed")
    made = sessions.apply(two_sessions())
    ran = []
    result = simulate(made, "lru", 20, service=CostModel(**SLOW), sessions=sessions,
                      outcomes=lambda piece, _: ran.append(piece))  # fmt: skip
    # 2 s of prefill, 2 s of answer, 1 s of thinking
    assert ran[0].arrival_ms.tolist() == [0, 0, 5000, 5000]
    assert result.service["makespan_seconds"] == 5 + 1 + 2 and result.block_hits == 4


def test_one_session_begins_when_another_has_ended():
    sessions = Sessions(loop="closed", arrivals="concurrency", concurrency=1)
    made = sessions.apply(two_sessions())
    ran = []
    result = simulate(made, "lru", 20, service=CostModel(**SLOW), sessions=sessions,
                      outcomes=lambda piece, _: ran.append(piece))  # fmt: skip
    assert ran[0].arrival_ms.tolist() == [0, 5000, 8000, 13000]
    assert ran[0].columns["session"].tolist() == [0, 0, 1, 1]
    assert result.service["peak_in_flight_requests"] == 1 and result.block_hits == 4


def test_a_slow_machine_stretches_a_closed_loop_and_not_an_open_one():
    slow = CostModel(**SLOW | {"prefill_tokens_per_second": 0.04})
    spans = {}
    for loop in ("open", "closed"):
        sessions = Sessions(loop=loop)
        t = sessions.apply(two_sessions())
        spans[loop] = simulate(t, "lru", 20, service=slow, sessions=sessions).service
    assert spans["closed"]["makespan_seconds"] == 202 + 1 + 102
    assert spans["open"]["peak_in_flight_requests"] == 4
    assert spans["closed"]["peak_in_flight_requests"] == 2


def test_every_request_of_a_closed_loop_is_served_once():
    rows = [(n, [100 * (n % 7) + d for d in range(1 + n // 7)], 3) for n in range(70)]
    t = replace(trace(*rows), columns={"session": np.arange(70) % 7})
    for arrivals in ("recorded", "together", "concurrency", "poisson"):
        sessions = Sessions(loop="closed", arrivals=arrivals, concurrency=3, think=2)
        result = simulate(sessions.apply(t), "lru", 60, service=CostModel(**SLOW, prefills=1),
                          sessions=sessions)  # fmt: skip
        assert result.requests == 70 and result.block_accesses == t.accesses
        assert sum(result.misses.values()) + result.block_hits == t.accesses


def test_what_makes_no_sense_is_refused():
    with pytest.raises(BadInput, match="apply has made"):
        simulate(two_sessions(), service=CostModel(), sessions=Sessions(loop="closed"))
    for wrong in ({"prefills": 0}, {"running": 0}, {"watts": -1}):
        with pytest.raises(BadInput):
            CostModel(**wrong)
