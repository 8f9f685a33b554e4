"""Requests through one cache: right tokens, nothing left behind, and a reason for every refusal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from kvlab.cache import CacheSpec
from kvlab.eval.load import failing
from kvlab.model import PagedCache
from kvlab.model.load import RandomModel
from kvlab.model.prefill import forward_chunk
from kvlab.serve import (
    Limits,
    Loop,
    StepClock,
    TraceRequests,
    with_cancellations,
    with_rate,
)
from kvlab.sim import workloads

SPEC = CacheSpec(format="fp32", block_size=4, policy="lru", prefix="hash", budget_blocks=36)


@pytest.fixture(scope="module")
def loaded():
    tiny = RandomModel(hidden_size=32, layers=2, query_heads=2, kv_heads=1, head_dim=16,
                       mlp_size=32, vocabulary=8192)  # fmt: skip
    return tiny.load("cpu")


@pytest.fixture(scope="module")
def requests():
    trace = workloads.system_prompts(40, prompts=6, system_tokens=24, user_tokens=12,
                                     output_tokens=8, block_size=4, rate=1e4)  # fmt: skip
    return TraceRequests(trace, 40, block_tokens=4).make(None, 8192)


@pytest.fixture(scope="module")
def cold(loaded, requests):
    """Greedy output of each request without any cache of earlier ones."""
    return {r.number: generated(loaded, r) for r in requests}


def generated(loaded, request):
    cache, out = PagedCache.for_model(loaded.model, format="fp32", block_size=4), []
    new = torch.from_numpy(request.prompt)
    for _ in range(request.output_tokens):
        out.append(int(forward_chunk(loaded.model, new[None], cache, last=True)[0, -1].argmax()))
        new = torch.tensor(out[-1:])
    return out


def serve(loaded, requests, limits=None, spec=SPEC, share=0.0, ms=1.0, check=True):
    """(served, loop) with the cache checked and emptied."""
    cache = PagedCache.for_model(loaded.model, spec)
    loop = Loop(loaded, cache, limits, StepClock(ms))
    with failing(cache, share, 0) as faults:
        served = loop.run(requests)
    cache.check()
    assert not share or faults["memory"]
    assert [s.number for s in served] == [r.number for r in requests]
    cache.drop_prefixes()
    assert cache.groups[0].ledger.held_count == 0
    assert cache.stats().allocated_bytes == 0
    return served, loop


LIMITS = {
    "one by one": Limits(running=1),
    "reserved": Limits(running=4),
    "preempted": Limits(running=6, reserve=False),
    "small chunks": Limits(running=6, chunk_tokens=5, reserve=False),
    "chunks of one": Limits(running=3, chunk_tokens=1),
}


@pytest.mark.parametrize("name", LIMITS)
def test_outputs_are_those_of_cold_runs(loaded, requests, cold, name):
    served, loop = serve(loaded, requests, LIMITS[name])
    assert all(s.state == "done" for s in served)
    assert {s.number: s.output for s in served} == cold
    assert sum(s.hit_tokens for s in served) > 0
    assert loop.most_running == (1 if name == "one by one" else loop.most_running)
    if not LIMITS[name].reserve:
        assert sum(s.preemptions for s in served) > 0


@pytest.mark.parametrize("axes", [
    {"prefix": "none", "policy": "none", "budget_blocks": None},
    {"policy": "none", "budget_blocks": None}, {"prefix": "none", "policy": "none"},
], ids=str)  # fmt: skip
def test_other_caches_serve_too(loaded, requests, cold, axes):
    spec = replace(SPEC, **axes)
    served, _ = serve(loaded, requests, Limits(running=4, reserve=False), spec)
    assert {s.number: s.output for s in served} == cold


def test_failing_memory_costs_time_but_no_token(loaded, requests, cold):
    served, _ = serve(loaded, requests, Limits(running=4, reserve=False), share=0.1)
    assert {s.number: s.output for s in served if s.state == "done"} == {
        s.number: cold[s.number] for s in served if s.state == "done"
    }
    assert sum(s.state == "done" for s in served) > 35
    assert all(s.reason for s in served if s.state == "refused")


def test_memory_that_always_fails_is_a_clear_refusal(loaded, requests):
    served, _ = serve(loaded, requests[:3], Limits(failures=2), share=1.0)
    assert [s.state for s in served] == ["refused"] * 3
    assert "request 0: out of memory" in served[0].reason


def test_users_who_leave_leave_nothing(loaded, requests, cold):
    leaving = with_cancellations(requests, 0.6, seed=1)
    assert {r.cancel_after for r in leaving} > {None, -1, 0}
    served, _ = serve(loaded, leaving, Limits(running=4, chunk_tokens=8, reserve=False))
    states = {s.state for s in served}
    assert states == {"done", "cancelled"}
    for s in served:
        assert s.output == cold[s.number][: len(s.output)]
    assert any(s.state == "cancelled" and s.output for s in served)
    assert any(s.state == "cancelled" and s.admitted_ms is None for s in served)


def test_what_cannot_be_served_is_refused_with_a_reason(loaded, requests):
    small = replace(SPEC, budget_blocks=9)
    served, _ = serve(loaded, requests, Limits(running=2), small)
    refused = [s for s in served if s.state == "refused"]
    assert refused and all("blocks, the budget is 9" in s.reason for s in refused)
    served, _ = serve(loaded, requests, Limits(tokens=40))
    assert any("tokens, the limit is 40" in s.reason for s in served)
    served, _ = serve(loaded, with_rate(requests, 1e6), Limits(running=1, waiting=3))
    assert any("3 requests wait already" in s.reason for s in served)
    empty = requests[0]._replace(prompt=requests[0].prompt[:0])
    served, _ = serve(loaded, [empty])
    assert served[0].reason == "request 0: the prompt is empty"
    known = loaded.model.config.vocab_size
    for id in (-1, known):  # others are served
        odd = requests[1]._replace(prompt=np.append(requests[1].prompt, id))
        served, _ = serve(loaded, [requests[0], odd])
        assert served[0].state == "done"
        assert served[1].reason == (f"request 1: {id} is no token of this model, whose ids are "
                                    f"0 to {known - 1}")  # fmt: skip


def test_time_is_over(loaded, requests, cold):
    served, _ = serve(loaded, requests, Limits(running=2, seconds=0.03))
    states = [s.state for s in served]
    assert 2 < states.count("done") < len(requests) - 2
    assert all("seconds are over" in s.reason for s in served if s.state == "refused")
    assert all(s.output == cold[s.number] for s in served if s.state == "done")


def test_times_follow_the_clock(loaded, requests):
    slow, _ = serve(loaded, with_rate(requests, 10), Limits(running=4), ms=50)
    quick, _ = serve(loaded, with_rate(requests, 0.1), Limits(running=4), ms=50)
    assert all(s.arrival_ms <= s.admitted_ms <= s.first_ms <= s.end_ms for s in slow)
    assert max(s.ttft_ms for s in slow) > 3 * max(s.ttft_ms for s in quick)


def test_a_run_repeats(loaded, requests):
    runs = [serve(loaded, requests, Limits(running=4, reserve=False))[0] for _ in range(2)]
    assert runs[0] == runs[1]


def test_an_interrupted_run_gives_everything_back(loaded, requests):
    cache = PagedCache.for_model(loaded.model, SPEC)

    def stop(event, number):
        if event == "first" and number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loop(loaded, cache, Limits(running=4), StepClock(), stop).run(requests)
    cache.drop_prefixes()
    cache.check()
    assert cache.groups[0].ledger.held_count == 0
