"""Prompts and answers that share a device, on requests that can be followed by hand."""

from __future__ import annotations

import pytest

from kvlab.core import BadInput
from kvlab.sim import CostModel, from_requests, simulate, workloads
from kvlab.sim.costs import Calibration
from kvlab.sim.pace import Steps, Work

# 4 tokens take a second to prefill, a step of decode takes a second
SLOW = {"prefill_tokens_per_second": 4.0, "decode_tokens_per_second": 1.0}


def trace(*rows):
    """Rows of (second, block ids, output tokens), blocks of 4 tokens."""
    return from_requests([(1e3 * at, 4 * len(ids), out, ids) for at, ids, out in rows], 4)


def events(pace, *works):
    """(ms, whose, done) of what happens to requests of (prompt, output tokens, arrival)."""
    found = []
    for number, (new, output, arrival) in enumerate(works):
        while (event := pace.next(arrival)) is not None:
            found.append((event.ms, event.work.of, event.done))
        began = max(arrival, pace.now)
        pace.enter(Work(new, 0, new, output, arrival, began, 0.0, number))
    while (event := pace.next(None)) is not None:
        found.append((event.ms, event.work.of, event.done))
    return found


class OneByOne(Steps):
    def _steps_before(self, ms):
        return 1


def test_a_prompt_holds_up_an_answer_and_an_answer_a_prompt():
    t = trace((0, [0], 4), (1, [1, 2], 1))
    apart = simulate(t, "lru", 20, service=CostModel(**SLOW)).service
    assert apart["ttft_ms"] == (1000 + 2000) / 2 and apart["makespan_seconds"] == 5.0
    shared = simulate(t, "lru", 20, service=CostModel(**SLOW, chunk_tokens=4)).service
    # 1 s: the first token, a step until 2 s; then chunk, step, chunk until 5 s; a step until 6 s
    assert shared["ttft_ms"] == (1000 + 4000) / 2 and shared["makespan_seconds"] == 6.0


def test_many_steps_at_once_are_the_steps_one_by_one(tmp_path):
    Calibration((5, 1, 0.01), (10, 2, 0.1), (0, 1), (0, 1), 4.0, {}).write(tmp_path / "c.json")
    cost = CostModel(calibration=str(tmp_path / "c.json"), chunk_tokens=8)
    works = (8, 50, 0.0), (20, 30, 100.0), (4, 40, 500.0)
    found, slow = events(Steps(cost), *works), events(OneByOne(cost), *works)
    assert [row[1:] for row in found] == [row[1:] for row in slow]
    assert [row[0] for row in found] == pytest.approx([row[0] for row in slow])


def test_lanes_and_steps_are_not_mixed():
    with pytest.raises(BadInput, match="one prompt is computed at a time"):
        CostModel(chunk_tokens=512, prefills=2)


@pytest.mark.parametrize("chunk", [None, 256])
def test_compiled_times_are_those_of_a_run_in_which_nobody_meets(chunk):
    """Requests far apart: what is in flight holds nothing that another one could miss."""
    pytest.importorskip("numba")
    t = workloads.chats(requests=60, rate=0.01)
    cost = CostModel(chunk_tokens=chunk, running=4)
    plain = simulate(t, "lru", 3000, service=cost).service
    quick = simulate(t, "lru", 3000, service=cost, compiled=True).service
    assert quick == pytest.approx({name: plain[name] for name in quick})


def test_chunks_take_whole_prompts_behind_the_first():
    """8 tokens a chunk, 2 s: prompts of 4 and 4 share one, one of 6 waits, 1 fits behind the 4."""
    works = (4, 1, 0.0), (6, 1, 0.0), (4, 1, 0.0), (10, 1, 0.0), (1, 1, 0.0)
    cost = CostModel(**SLOW, chunk_tokens=8, packed=True)
    found = [(ms, of) for ms, of, done in events(Steps(cost), *works) if done]
    assert found == [(2000, 0), (2000, 2), (3750, 1), (3750, 4), (6250, 3)]
    with pytest.raises(BadInput, match="service.packed"):
        CostModel(packed=True)
    fitted = Calibration((100.0, 1.0, 0.0), (10.0, 0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 1.0, {})
    fixed = CostModel.__new__(CostModel)
    fixed.__dict__.update(cost.__dict__, measures=fitted)
    assert fixed.prefill_ms(5) == 105 and fixed.prefill_ms(5, first=False) == 5
