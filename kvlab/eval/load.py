"""Job: more and more requests a second, until the pool thrashes; with users who leave and memory
that fails."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from kvlab.blocks import BlockLedger, replay
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Measurement, check_number
from kvlab.eval.sweep import Point, Sweep
from kvlab.model import LoadedModel, PagedCache, forward_chunk
from kvlab.serve import Limits, Loop, Served, StepClock, WallClock, with_cancellations, with_rate


class Load(Sweep):
    """The same requests at rising rates through one cache with a budget.

    model, requests, spec: a loader, a source of requests, a cache with prefix=hash and a budget.
    rates: requests a second. running, waiting, chunk_tokens, reserve: see `kvlab.serve.Limits`.
    cancel: share of users who leave at a random point. failures: share of steps in which the
        allocator fails, injected; in a captured step only where blocks are taken.
    sample: served requests per rate that are computed again, cold.
    step_ms: null measures the wall's time; else each step takes so long, and the run repeats.
    tolerance: logits by which a token may miss the cold run's best; above, it is wrong.
    """

    holds_nothing = True
    own_list = "this job has its own list; see job.rates"

    def __init__(
        self, model, requests, spec: CacheSpec, rates: Sequence[float] = (2, 8, 32),
        running: int = 8, waiting: int | None = 64, chunk_tokens: int = 256, reserve: bool = False,
        cancel: float = 0.1, failures: float = 0.01, sample: int = 20, tolerance: float = 0.05,
        step_ms: float | None = None, device: str = "auto", seed: int = 0,
    ):
        for name, value in (("cancel", cancel), ("failures", failures)):
            if not 0 <= value < 1:
                raise BadInput(f"job.{name}", value, "must be a share: at least 0, less than 1")
        if not rates:
            raise BadInput("job.rates", [], "name at least one, in requests a second")
        for rate in rates:
            check_number("job.rates", rate, 0, whole=False, above=True)
        check_number("job.sample", sample, 0)
        check_number("job.tolerance", tolerance, 0, whole=False)
        check_number("job.step_ms", step_ms, 0, whole=False, above=True, null=True)
        if not spec.prefix.shares or (spec.budget_blocks is None and spec.budget_bytes is None):
            raise BadInput("prefix", spec.prefix.name, "load needs prefix=hash and a budget")
        self.model, self.requests, self.spec, self.rates = model, requests, spec, list(rates)
        self.limits = Limits(running, waiting, chunk_tokens, reserve=reserve)
        self.cancel, self.failures, self.sample = cancel, failures, sample
        self.tolerance, self.step_ms, self.device, self.seed = tolerance, step_ms, device, seed

    def points(self, device: torch.device, variants) -> Iterator[Point]:
        loaded = self.model.load(device)
        made = self.requests.make(loaded.tokenizer, loaded.model.config.vocab_size)
        made = with_cancellations(made, self.cancel, self.seed)
        self._at(loaded, made[:2])  # libraries keep workspaces from their first call on
        for rate in self.rates:
            params = {"requests_per_second": rate, "requests": len(made), **loaded.about(),
                      "trace": self.requests.name, "cancel": self.cancel,
                      "failures": self.failures, "running": self.limits.running}  # fmt: skip
            yield Point(f"{rate:g} requests/s", params,
                        partial(self._at, loaded, with_rate(made, rate)))

    def _at(self, loaded: LoadedModel, requests: list) -> list[Measurement]:
        """One rate: a fresh cache, everything served, everything given back."""
        before = device_bytes(loaded)
        cache = PagedCache.for_model(loaded.model, self.spec)
        recorded = [(group.ledger, []) for group in cache.groups]
        for ledger, events in recorded:
            ledger.events = events.append
        clock = WallClock() if self.step_ms is None else StepClock(self.step_ms)
        loop = Loop(loaded, cache, self.limits, clock)
        with failing(cache, self.failures, self.seed) as faults:
            served = loop.run(requests)
        cache.check()
        again = [replay(events, BlockLedger(ledger.capacity, self.spec.policy()))
                 for ledger, events in recorded]  # fmt: skip
        rows = [*outcomes(served, loop), *latencies(served, clock.now_ms),
                Measurement("injected_failures", faults["memory"], "failures"),
                Measurement("evictions", cache.stats().evictions, "blocks", "lower"),
                Measurement("replay_differs", float(any(again)), "runs", "lower",
                            count=sum(len(events) for _, events in recorded))]  # fmt: skip
        evictions = cache.stats().evictions
        rows.append(thrash(served, evictions))
        rows += self._wrong(loaded, requests, served)
        rows += leaks(cache)
        del cache, loop, ledger, events, recorded
        gc.collect()
        left = device_bytes(loaded) - before
        return [*rows, Measurement("leaked_device_bytes", left, "B", "lower")]

    def _wrong(self, loaded, requests, served: list[Served]) -> Iterator[Measurement]:
        """Compare sampled outputs with cold runs that see the same tokens."""
        done = [s for s in served if s.output]
        picked = random.Random(self.seed).sample(done, min(self.sample, len(done)))
        prompts = {r.number: r.prompt for r in requests}
        gaps = np.array([g for s in picked for g in self._gaps(loaded, prompts[s.number], s)])
        yield Measurement("wrong_tokens", int((gaps > self.tolerance).sum()), "tokens", "lower",
                          count=len(gaps))
        yield Measurement("largest_logit_gap", float(gaps.max(initial=0)), "logits", "lower",
                          count=len(gaps))

    def _gaps(self, loaded, prompt: np.ndarray, served: Served) -> list[float]:
        """How far each output token's logit lies below the best of a run without any history."""
        spec = CacheSpec(format=self.spec.format, block_size=self.spec.block_size)
        cache = PagedCache.for_model(loaded.model, spec)
        ids = torch.tensor([*prompt.tolist(), *served.output], device=loaded.model.device)
        logits = forward_chunk(loaded.model, ids[None, :-1], cache)[0, len(prompt) - 1 :].float()
        chosen = logits.gather(1, ids[len(prompt) :, None])[:, 0]
        return (logits.max(-1).values - chosen).tolist()


@contextmanager
def failing(cache: PagedCache, share: float, seed: int) -> Iterator[Counter]:
    """Let a share of the steps fail as the device's allocator would: where they take their memory,
    before or after they got it, or in the middle of a layer, where activations need theirs."""
    draw, faults = random.Random(seed), Counter()

    def faulty(call, share):
        def act(*arguments, **named):
            late = draw.random() < 0.5
            fails = draw.random() < share and not _capturing()
            if fails and not late:
                out_of_memory()
            result = call(*arguments, **named)
            if fails:
                out_of_memory()
            return result
        return act

    def out_of_memory():
        faults["memory"] += 1
        raise torch.OutOfMemoryError("injected: the allocator has no memory left")

    for group in cache.groups:
        group.storage.take = faulty(group.storage.take, share)
    core, begin = cache.core, cache.core.begin

    def begun(*step):
        running = begin(*step)
        running.attend = faulty(running.attend, share / core.geometry.layers)
        return running

    core.begin = begun
    try:
        yield faults
    finally:
        del core.begin
        for group in cache.groups:
            del group.storage.take


def _capturing() -> bool:
    """Whether what runs is recorded: an error there would be one of the recording."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def device_bytes(loaded: LoadedModel) -> int:
    """Bytes allocated on a CUDA device; 0 on the CPU, where only the cache's own are known."""
    device = loaded.model.device
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def outcomes(served: list[Served], loop: Loop) -> Iterator[Measurement]:
    """What became of the requests; a refusal without a reason would be a defect."""
    count, states = len(served), Counter(s.state for s in served)
    for state in ("done", "cancelled", "refused"):
        better = "higher" if state == "done" else None
        yield Measurement(f"{state}_requests", states[state], "requests", better, count=count)
    silent = sum(s.state == "refused" and not s.reason for s in served)
    yield Measurement("refused_without_reason", silent, "requests", "lower", count=count)
    preempted = sum(s.preemptions for s in served)
    yield Measurement("preemptions", preempted, "preemptions", "lower", count=count)
    yield Measurement("most_running", loop.most_running, "sequences")
    blocks = sum(len(s.codes) - s.codes.count("t") for s in served)
    hits = sum(s.codes.count("h") + s.codes.count("r") for s in served)
    yield Measurement("block_hit_percent", 100 * hits / max(1, blocks), "%", "higher", count=blocks)


def latencies(served: list[Served], total_ms: float) -> Iterator[Measurement]:
    """Times of the requests that got a token, and what came out in all."""
    waits = np.array([s.ttft_ms for s in served if s.ttft_ms is not None])
    if len(waits):
        for name, value in (("ttft_p50_ms", np.median(waits)),
                            ("ttft_p99_ms", np.quantile(waits, 0.99))):
            yield Measurement(name, float(value), "ms", "lower", count=len(waits))
    tokens, seconds = sum(len(s.output) for s in served), total_ms / 1e3
    yield Measurement("output_tokens_per_second", tokens / seconds, "tokens/s", "higher",
                      count=tokens)
    yield Measurement("served_requests_per_second", len(waits) / seconds, "requests/s", "higher",
                      count=len(waits))


def thrash(served: list[Served], evictions: int) -> Measurement:
    """Share of evicted blocks that a later prompt wanted."""
    wanted = sum(s.codes.count("e") for s in served)
    return Measurement("thrash_percent", 100 * min(1.0, wanted / max(1, evictions)), "%", "lower",
                       count=evictions)


def leaks(cache: PagedCache) -> Iterator[Measurement]:
    """What is still held when nobody holds anything."""
    cache.drop_prefixes()
    cache.check()
    held = sum(group.ledger.held_count for group in cache.groups)
    yield Measurement("leaked_blocks", held, "blocks", "lower")
    stores = [store for group in cache.groups for store in (group.pool.sealed, group.pool.open)]
    slabs = sum(len(store.slabs) * store.slab_bytes for store in stores)
    yield Measurement("leaked_bytes", slabs, "B", "lower")
