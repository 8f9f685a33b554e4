"""Steps that run ahead of the host: the same tokens as the library's forward, whatever happens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.eval.load import failing
from kvlab.model import Lanes, Packed, PagedCache
from kvlab.model.lanes import bucket, buckets
from kvlab.model.load import RandomModel
from kvlab.serve import Limits, Loop, StepClock, TraceRequests, with_cancellations
from kvlab.sim import workloads

SPEC = CacheSpec(format="fp32", block_size=4, policy="lru", prefix="hash", budget_blocks=36)


@pytest.fixture(scope="module")
def loaded():
    tiny = RandomModel(hidden_size=32, layers=2, query_heads=2, kv_heads=1, head_dim=32,
                       mlp_size=32, vocabulary=8192)  # fmt: skip
    return tiny.load("cpu")


@pytest.fixture(scope="module")
def requests():
    trace = workloads.system_prompts(24, prompts=4, system_tokens=20, user_tokens=12,
                                     output_tokens=8, block_size=4, rate=400)  # fmt: skip
    return TraceRequests(trace, 24, block_tokens=4).make(None, 8192)


def serve(loaded, requests, limits, driver, spec=SPEC, share=0.0, seed=0):
    cache = PagedCache.for_model(loaded.model, spec)
    loop = Loop(loaded, cache, limits, StepClock(), driver=driver)
    with failing(cache, share, seed):
        served = loop.run(requests)
    cache.check()
    cache.drop_prefixes()
    pool, held = cache.groups[0].pool, cache.groups[0].ledger.held_count
    assert held == len(pool.sealed.slabs) == len(pool.open.slabs) == 0
    assert not loop.flights and all(len(s.token_ms) == len(s.output) for s in served)
    return served, loop


@pytest.fixture(scope="module")
def plain(loaded, requests):
    """Outputs of the library's forward, one request at a time."""
    served, loop = serve(loaded, requests, Limits(running=1), "eager")
    assert loop.why_eager == "as asked for" and loop.engine.lag == 0
    return {s.number: s.output for s in served}


@settings(max_examples=8, deadline=None)
@given(
    running=st.integers(1, 7), chunk=st.integers(1, 60), steps=st.integers(0, 3),
    reserve=st.booleans(), share=st.sampled_from([0.0, 0.0, 0.1]), leaving=st.booleans(),
    prefix=st.booleans(), seed=st.integers(0, 99),
)
def test_tokens_are_those_of_the_eager_loop(
    loaded, requests, plain, running, chunk, steps, reserve, share, leaving, prefix, seed
):
    """Rows join, leave, are preempted and cancelled; memory fails."""
    limits = Limits(running=running, chunk_tokens=chunk, reserve=reserve, decode_steps=steps)
    spec = SPEC if prefix else replace(SPEC, prefix="none", policy="none")
    some = with_cancellations(requests, 0.4, seed) if leaving else requests
    served, loop = serve(loaded, some, limits, "static", spec, share, seed)
    assert loop.engine.lag == 1 and loop.why_eager is None
    for request, s in zip(some, served):
        wanted = plain[s.number]
        if s.state == "cancelled":
            wanted = wanted[: max(0, request.cancel_after)]
        assert s.output == (wanted if s.state != "refused" else s.output)
        assert share or s.state != "refused"


def test_the_eager_loop_and_steps_without_buckets_agree(loaded, requests, plain):
    limits = Limits(running=5, chunk_tokens=16, reserve=False)
    for driver in ("eager", "auto"):
        served, loop = serve(loaded, requests, limits, driver)
        assert {s.number: s.output for s in served} == plain
        assert sum(s.preemptions for s in served) > 0
    assert "CUDA device" in loop.why_eager


def test_rows_of_a_bucket_that_nobody_has_change_nothing(loaded):
    """Through the kernels' tables, in Triton's interpreter: the lanes behind three sequences."""
    pytest.importorskip("triton")
    ids, found = [list(range(1, 20)), list(range(30, 35)), list(range(40, 57))], {}
    for driver in ("eager", "static"):
        spec = CacheSpec(format="fp32", block_size=16, kernels="triton")
        cache = PagedCache.for_model(loaded.model, spec)
        seqs = [cache.open() for _ in ids]
        first = Packed(loaded.model, cache).forward(seqs, ids).argmax(-1)
        lanes = Lanes(loaded.model, cache, 5, driver=driver)
        lanes.warm_up(40)
        tables = cache.groups[0].sources.sealed
        lanes.join(seqs, first)
        out = [lanes.step().tokens()]
        assert len(tables.decoding.table) == (4 if driver == "static" else 3)
        lanes.leave(seqs[0])
        assert lanes.seqs == [seqs[2], seqs[1]]
        cache.close(seqs[0])
        out.append(lanes.step().tokens())
        found[driver] = [first.tolist(), *out]
        cache.check()
    assert found["static"] == found["eager"]


def test_tables_stay_where_they_are(loaded):
    pytest.importorskip("triton")
    cache = PagedCache.for_model(loaded.model, format="fp32", block_size=4, kernels="triton")
    sealed = cache.groups[0].sources.sealed
    sealed.widen(4, 10)
    whole = sealed._tables
    sealed.prepare([], 2)
    first = sealed.decoding
    sealed.prepare([], 4)
    assert sealed.decoding is whole
    sealed.prepare([], 2)
    assert sealed.decoding is first and sealed.in_place() == [first]
    assert first.table.data_ptr() == whole.table.data_ptr() and first.n_blocks.shape == (2,)
    sealed.widen(4, 5000)
    sealed.prepare([], 2)
    assert sealed.decoding is not first and sealed.decoding.table.shape[1] > 5000


def test_buckets():
    assert buckets(1) == [1] and buckets(5) == [1, 2, 4, 8] and buckets(64)[-1] == 64
    assert buckets(65)[-2:] == [64, 128] and buckets(200)[-3:] == [128, 192, 256]
    assert bucket(buckets(64), 33) == 64 and bucket(buckets(64), 1) == 1


def test_what_cannot_be_captured_says_so(loaded):
    cache = PagedCache.for_model(loaded.model, format="fp32", block_size=4, policy="snapkv",
                                 evict="token", budget_percent=50)  # fmt: skip
    loop = Loop(loaded, cache, Limits(running=2))
    assert "one by one" in loop.why_eager and loop.engine.lag == 0
    with pytest.raises(BadInput, match="auto runs eagerly"):
        Loop(loaded, cache, Limits(running=2), driver="graph")
    with pytest.raises(BadInput, match="auto runs eagerly"):
        Loop(loaded, PagedCache.for_model(loaded.model, format="fp32"), driver="graph")
    with pytest.raises(BadInput, match="decode_steps"):
        Limits(decode_steps=-1)


@pytest.mark.parametrize("driver", ["eager", "static"])
def test_requests_that_cannot_be_served_end(loaded, requests, driver):
    """One that asks for no token was decoded for ever; two of one number got one answer."""
    none = [requests[0]._replace(output_tokens=0), requests[1], requests[2]._replace(
        output_tokens=-2)]  # fmt: skip
    served, _ = serve(loaded, none, Limits(), driver)
    assert [s.state for s in served] == ["refused", "done", "refused"]
    assert "at least 1" in served[0].reason
    for odd in (requests[0]._replace(arrival_ms=float("nan")), requests[1]):
        with pytest.raises(BadInput, match="requests"):
            serve(loaded, [requests[1], odd], Limits(), driver)


@pytest.mark.gpu
def test_captured_steps_give_the_same_tokens(requests):
    tiny = RandomModel(hidden_size=64, layers=2, query_heads=4, kv_heads=2, head_dim=32,
                       mlp_size=64, vocabulary=8192).load("cuda", torch.float32)  # fmt: skip
    spec, found = replace(SPEC, block_size=16, budget_blocks=24), []
    for driver in ("eager", "graph"):
        served, loop = serve(tiny, requests, Limits(running=6, reserve=False), driver, spec)
        found.append([s.output for s in served])
    assert found[0] == found[1] and loop.why_eager is None
    assert loop.engine.lanes.captures <= 2 * len(loop.engine.lanes.buckets)
