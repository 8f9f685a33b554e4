"""The simulator's steps are the live loop's: both run requests whose steps have prices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvlab.cache import CacheSpec
from kvlab.model import PagedCache
from kvlab.model.load import RandomModel
from kvlab.serve import Limits, Loop, Request, StepClock
from kvlab.sim import CostModel
from kvlab.sim.costs import Calibration
from kvlab.sim.pace import Steps, Work

NO_SHRINKING = [Phase.explicit, Phase.generate]  # an example takes a while
PREFILL, DECODE = (8.0, 1.0, 0.125, 2.0), (4.0, 0.5, 0.25, 0.125)  # ms, exact in floats


class Priced(StepClock):
    """Steps take what is computed in them."""

    def step(self):
        """Nothing by itself."""

    def watch(self, loop, cost: CostModel) -> None:
        prefill, decode = loop.engine.prefill, loop.engine.decode

        def chunk(jobs, ids):
            for job, new in zip(jobs, ids):
                self._now += cost.prefill_ms(len(new), job.computed, job is jobs[0])
            return prefill(jobs, ids)

        def step(jobs):
            fixed, row, token, longest = cost.step_costs
            lengths = [job.computed for job in jobs]
            self._now += fixed + row * len(jobs) + token * sum(lengths) + longest * max(lengths)
            return decode(jobs)

        loop.engine.prefill, loop.engine.decode = chunk, step


@pytest.fixture(scope="module")
def loaded():
    tiny = RandomModel(hidden_size=32, layers=1, query_heads=2, kv_heads=1, head_dim=32,
                       mlp_size=32, vocabulary=8192)  # fmt: skip
    return tiny.load("cpu")


def lived(loaded, requests, limits: Limits, cost: CostModel, driver: str):
    """(ms of the first token, of the last) of each request, in the loop."""
    cache = PagedCache.for_model(loaded.model, CacheSpec(format="fp32", block_size=4))
    clock = Priced()
    loop = Loop(loaded, cache, limits, clock, driver=driver)
    clock.watch(loop, cost)
    served = loop.run(requests)
    assert loop.engine.lag == cost.lag and loop.engine.packs == cost.packed
    return [(s.first_ms, s.end_ms) for s in served]


def told(requests, cost: CostModel):
    """The same of the simulator's steps, with as many requests at a time."""
    pace, found, running, now = Steps(cost), [[0.0, 0.0] for _ in requests], 0, 0.0

    def happens(until):
        nonlocal running, now
        event = pace.next(until)
        if event is not None:
            found[event.work.of][event.done] = event.ms
            running, now = running - event.done, max(now, event.ms)
        return event

    for r in requests:
        while happens(max(now, r.arrival_ms)):
            pass
        now = max(now, r.arrival_ms, pace.now)
        while running >= cost.running:
            happens(None)
        tokens = len(r.prompt)
        pace.enter(Work(tokens, 0, tokens, r.output_tokens, r.arrival_ms, now, 0.0, r.number))
        running += 1
    while happens(None):
        pass
    return [tuple(times) for times in found]


@settings(max_examples=12, deadline=None, derandomize=True, phases=NO_SHRINKING)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7), st.integers(0, 60)),
                   min_size=1, max_size=6),
    running=st.integers(1, 5), chunk=st.integers(1, 24), steps=st.integers(0, 3),
    driver=st.sampled_from(["eager", "static"]),
)  # fmt: skip
def test_each_first_and_last_token_comes_when_the_simulator_says(
    loaded, sizes, running, chunk, steps, driver
):
    ahead = driver == "static"
    cost = CostModel(running=running, chunk_tokens=chunk, decode_steps=steps, packed=ahead,
                     lag=int(ahead))  # fmt: skip
    vars(cost)["measures"] = Calibration(PREFILL, DECODE, (0.0, 0.0), (0.0, 0.0), 1.0, {})
    limits = Limits(running=running, chunk_tokens=chunk, decode_steps=steps)
    at = np.cumsum([pause + 1 / 1024 for *_, pause in sizes])  # between steps, not at their ends
    requests = [Request(i, float(at[i]), np.arange(prompt) % 64, output)
                for i, (prompt, output, _) in enumerate(sizes)]  # fmt: skip
    live = lived(loaded, requests, limits, cost, driver)
    assert np.allclose(told(requests, cost), live, rtol=1e-9, atol=0)
