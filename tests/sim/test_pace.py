"""Prompts and answers that share a device, on requests that can be followed by hand."""

from __future__ import annotations

import pytest

from kvlab.core import BadInput
from kvlab.sim import CostModel, from_requests, simulate, workloads
from kvlab.sim.costs import Calibration
from kvlab.sim.pace import Lanes, Steps, Work

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
    def __init__(self, cost):
        super().__init__(cost)
        self._rows.steps_before = lambda left: 1


def test_a_prompt_holds_up_an_answer_and_an_answer_a_prompt():
    t = trace((0, [0], 4), (1, [1, 2], 1))
    apart = simulate(t, "lru", 20, service=CostModel(**SLOW, chunk_tokens=None)).service
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
        CostModel(packed=True, chunk_tokens=None)
    fitted = Calibration((100.0, 1.0, 0.0), (10.0, 0.0, 0.0), (0.0, 0.0), (0.0, 0.0), 1.0, {})
    fixed = CostModel.__new__(CostModel)
    fixed.__dict__.update(cost.__dict__, measures=fitted)
    assert fixed.prefill_ms(5) == 105 and fixed.prefill_ms(5, first=False) == 5


# ---- the loop's steps, by hand

PREFILL, DECODE = (10.0, 1.0, 0.0, 3.0), (5.0, 1.0, 0.0, 0.1)  # ms of a chunk, of a step


def measured(prefill=PREFILL, decode=DECODE, **more) -> CostModel:
    cost = CostModel(**more)
    vars(cost)["measures"] = Calibration(prefill, decode, (0.0, 0.0), (0.0, 0.0), 1.0, {})
    return cost


# two requests at 0: prompts of 8 and 12 tokens, outputs of 3 and 2; 10 tokens a chunk
BY_HAND = {
    # chunk of 8: 18 ms, the first token. Step of one row over 8: 5 + 1 + 0.8. Chunk of 10: 20. Step
    # over 9: 6.9, the end of the first. Chunk of 2: 12, a first token; step over 12: 7.2, the end
    "loop": ({}, [(18.0, 0, False), (51.7, 0, True), (63.7, 1, False), (70.9, 1, True)]),
    # the same steps, everything seen one of them later; the last step ends what there is
    "lag": ({"lag": 1}, [(44.8 + 6.9, 0, False), (70.9, 0, True), (70.9, 1, False),
                         (70.9, 1, True)]),
    # three chunks, then steps of both rows: 5 + 2 + 1.2, and one over 9: 6.9
    "prompts first": ({"decode_steps": 0}, [(18.0, 0, False), (50.0, 1, False), (58.2, 1, True),
                                            (65.1, 0, True)]),
    # both steps of the first answer, then the chunks of the second, alone on the device
    "two steps": ({"decode_steps": 2}, [(18.0, 0, False), (31.7, 0, True), (63.7, 1, False),
                                        (70.9, 1, True)]),
}  # fmt: skip


@pytest.mark.parametrize("how", BY_HAND)
def test_two_requests_step_by_step(how):
    options, expected = BY_HAND[how]
    found = events(Steps(measured(chunk_tokens=10, **options)), (8, 3, 0.0), (12, 2, 0.0))
    assert [row[1:] for row in found] == [row[1:] for row in expected]
    assert [row[0] for row in found] == pytest.approx([row[0] for row in expected])


def test_a_further_prompt_in_a_chunk_costs_its_own():
    found = events(Steps(measured(chunk_tokens=20, packed=True)), (8, 1, 0.0), (12, 1, 0.0))
    assert {ms for ms, _, _ in found} == {10 + 8 + 3 + 12}


def test_a_step_waits_for_its_longest_row():
    """Rows of 4 and 40 take what two of 40 take, where only the longest one counts."""
    pace = Steps(measured((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0), chunk_tokens=40))
    found = events(pace, (40, 3, 0.0), (4, 11, 0.0))
    # steps over 40 and 41 while the long one is there, then over 5, 6, ... 13
    assert found[-1] == (40 + 41 + sum(range(5, 14)), 1, True)


BURST = [(7, 4), (30, 1), (12, 9), (3, 2), (25, 6), (16, 16), (5, 3)]  # prompt, output tokens


def burst(cost: CostModel) -> dict:
    t = from_requests([(0.0, p, out, [10 * i + j for j in range(-(-p // 4))])
                       for i, (p, out) in enumerate(BURST)], 4)  # fmt: skip
    return simulate(t, "lru", 500, service=cost).service


@pytest.mark.parametrize("running", [1, 2, 7])
@pytest.mark.parametrize("more", [{}, {"packed": True}, {"decode_steps": 0}, {"decode_steps": 3}])
def test_no_work_is_lost_and_none_is_made(running, more):
    """Where a token costs the same in any company, the time is the sum of all tokens'."""
    cost = measured((0.0, 2.0, 0.0), (0.0, 3.0, 0.0), running=running, chunk_tokens=8, **more)
    work = sum(2 * p + 3 * (out - 1) for p, out in BURST)
    assert 1e3 * burst(cost)["makespan_seconds"] == pytest.approx(work)


def test_more_rows_never_raise_the_first_time_to_a_first_token():
    first = [events(Steps(measured(chunk_tokens=8)), *((p, out, 0.0) for p, out in BURST[:n]))[0]
             for n in range(1, 8)]  # fmt: skip
    assert len(set(first)) == 1
    waits = [burst(measured(chunk_tokens=8, running=n))["ttft_ms"] for n in (1, 2, 4, 7)]
    assert waits == sorted(waits, reverse=True)


@pytest.mark.parametrize("free", ["no answers", "answers for nothing"])
def test_where_nobody_answers_it_is_the_queue_of_a_prefill_server(free):
    decode = DECODE if free == "no answers" else (0.0, 0.0, 0.0)
    works = [(p, 0 if free == "no answers" else out, 3.0 * i) for i, (p, out) in enumerate(BURST)]
    steps = measured((10.0, 1.0, 0.01), decode, chunk_tokens=64)
    lanes = measured((10.0, 1.0, 0.01), decode, chunk_tokens=None, prefills=1)
    found, queue = events(Steps(steps), *works), events(Lanes(lanes), *works)
    if free == "answers for nothing":  # they come a token a step, behind the chunks of others
        found, queue = ([e for e in all_of if not e[2]] for all_of in (found, queue))
    found, queue = sorted(found, key=lambda e: e[1:]), sorted(queue, key=lambda e: e[1:])
    assert [e[1:] for e in found] == [e[1:] for e in queue]
    assert [e[0] for e in found] == pytest.approx([e[0] for e in queue])
