"""Job: many requests at once through captured steps, beside the library's continuous batching."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from kvlab.blocks import chained_hashes
from kvlab.core import BadInput, Measurement, Variant, check_number
from kvlab.eval.clock import fresh_peak, seconds
from kvlab.eval.sweep import Point, Sweep, at_least, check_peers, check_variants
from kvlab.model import Driver, LoadedModel, PagedCache, check_driver, continuous_batching
from kvlab.serve import Limits, Loop, Request, WallClock, with_rate
from kvlab.sim import CostModel, from_requests, simulate

PEERS = {"continuous sdpa": "sdpa", "continuous flash 2": "flash_attention_2",
         "continuous flash 3": "flash_attention_3"}  # fmt: skip
WARM = 48  # requests that warm up, as many as let compilers and libraries meet what comes
ALL_FREE = 1 << 24  # blocks: a simulated cache in which nothing has to leave


@dataclass
class ServingSpeed(Sweep):
    """Output tokens a second, waits, and memory of a burst of requests, or of a stream of them.

    model, requests: a loader; a source of requests, of which the first `counts` are served.
    running, chunk_tokens, decode_steps: as in `kvlab.serve.Limits`; all blocks a request can need
        are taken when it is admitted.
    most_seconds: after which nobody is admitted (null: none); rows are then of those served.
    rate: requests a second on average; null: all at once.
    output_tokens: of each request, so that the library can be asked for as many; null: the
        requests' own, without peers.
    peers: of the library's continuous batching, on up to `peer_requests` requests (null: any), with
        `peer_settings` of its `ContinuousBatchingConfig`, for up to `peer_seconds`.
    calibration: file of `job=calibrate`, from which times are predicted beside those measured.
    driver, device, cap_gb: as in `Evaluate`.

    Captures and what the library makes before its first step are not timed; `ready_seconds` says
    how long they took.
    """

    model: object
    requests: object
    counts: list[int]
    running: int = 64
    chunk_tokens: int = 16384
    decode_steps: int = 1
    most_seconds: float | None = None
    rate: float | None = None
    output_tokens: int | None = 128
    peers: Sequence[str] = ()
    peer_requests: int | None = None
    peer_settings: Mapping[str, int | None] = field(default_factory=dict)
    peer_seconds: float = 600.0
    calibration: str | None = None
    driver: Driver = "auto"
    device: str = "auto"
    cap_gb: float | None = None

    wants_specs = True
    may_not_fit = True

    def __post_init__(self):
        check_driver(self.driver)
        at_least(1, counts=self.counts)
        check_number("job.output_tokens", self.output_tokens, null=True)
        check_number("job.rate", self.rate, 0, whole=False, above=True, null=True)
        check_number("job.peer_requests", self.peer_requests, null=True)
        check_number("job.peer_seconds", self.peer_seconds, 0, whole=False, above=True)
        self.limits = Limits(self.running, None, self.chunk_tokens, seconds=self.most_seconds,
                             decode_steps=self.decode_steps)  # fmt: skip
        check_peers(self.peers, PEERS)
        if self.peers and (self.output_tokens is None or self.rate is not None):
            raise BadInput("peers", list(self.peers), "are asked for requests that come at once, "
                           "for equally many tokens each: give job.output_tokens, job.rate=null")
        self.cost = self.calibration and CostModel(
            calibration=self.calibration, running=self.running, chunk_tokens=self.chunk_tokens,
            packed=True, decode_steps=self.decode_steps, lag=1,
        )

    def points(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[Point]:
        check_driver(self.driver, device)
        loaded = self.model.load(device)
        check_variants(loaded, variants)
        made = self._made(loaded)
        for count in self.counts:
            requests = made[:count]
            place = {**loaded.about(), "trace": self.requests.name, "requests": len(requests),
                     "running": self.running, "output_tokens": self.output_tokens,
                     "prompt_tokens": sum(len(r.prompt) for r in requests)}  # fmt: skip
            ours = {"chunk_tokens": self.chunk_tokens, "decode_steps": self.decode_steps,
                    "requests_per_second": self.rate}  # fmt: skip
            for name, params, spec in variants:
                own = params | place | ours | {"block_size": spec.block_size}
                yield Point(name, own, partial(self._ours, loaded, spec, requests))
            if self.peer_requests is None or count <= self.peer_requests:
                for name in self.peers:
                    yield Point(name, place | {"peer": name},
                                partial(self._peer, loaded, name, requests))

    def _made(self, loaded: LoadedModel) -> list[Request]:
        made = self.requests.make(loaded.tokenizer, loaded.model.config.vocab_size)
        made = made[: max(self.counts)]
        if self.output_tokens is not None:
            made = [r._replace(output_tokens=self.output_tokens) for r in made]
        if self.rate is None:
            return [r._replace(arrival_ms=0.0) for r in made]
        return with_rate(made, self.rate)

    # ---- ours

    def _ours(self, loaded, spec, requests: list[Request]) -> Iterator[Measurement]:
        few = [r._replace(arrival_ms=0.0, output_tokens=2) for r in requests[:WARM]]
        self._served(loaded, spec, few)
        fresh_peak(loaded.model.device)
        took, (loop, served, cache) = seconds(
            loaded.model.device, lambda: self._served(loaded, spec, requests)
        )
        done = [s for s in served if s.state == "done"]
        ran = max(s.end_ms for s in done) / 1e3
        print(f"{len(done)} of {len(requests)} requests, {ran:.2f} s, "
              f"before them {took - ran:.2f} s, "
              f"captured: {loop.why_eager or 'yes'}", flush=True)
        yield from outcome([s.token_ms for s in done], [s.arrival_ms for s in done], ran)
        yield Measurement("done_requests", len(done), "requests", "higher", count=len(served))
        yield Measurement("ready_seconds", took - ran, "s", "lower")
        yield from held(loaded.model.device, cache.stats().peak_allocated_bytes)
        yield Measurement("captured", float(loop.why_eager is None), "yes or no", "higher")
        yield Measurement("steps", loop.steps, "steps", count=len(requests))
        hits, prompts = (sum(getattr(s, n) for s in done) for n in ("hit_tokens", "prompt_tokens"))
        yield Measurement("prompt_tokens_per_second", prompts / ran, "tokens/s", "higher")
        yield Measurement("token_hit_percent", 100 * hits / prompts, "%", "higher", count=prompts)
        cache.check()
        if self.cost and len(done) == len(served):
            cost = replace(self.cost, packed=loop.engine.packs, lag=loop.engine.lag)
            yield from predicted(cost, cache, spec, requests)

    def _served(self, loaded, spec, requests: list[Request]):
        cache = PagedCache.for_model(loaded.model, spec)
        loop = Loop(loaded, cache, self.limits, WallClock(), driver=self.driver)
        return loop, loop.run(requests), cache

    # ---- the library's

    def _peer(self, loaded, name: str, requests: list[Request]) -> Iterator[Measurement]:
        model, prompts = loaded.model, [r.prompt for r in requests]
        gc.collect()
        fresh_peak(model.device)
        settings = (model, prompts, self.output_tokens, self.running, PEERS[name])
        chosen = {key: value for key, value in self.peer_settings.items() if value is not None}
        done = continuous_batching(*settings, most_seconds=self.peer_seconds, **chosen)
        print(f"{name}: {len(requests)} requests, {done.seconds:.2f} s, before them "
              f"{done.ready_seconds:.2f} s", flush=True)
        yield from outcome(done.token_ms, [0.0] * len(requests), done.seconds)
        yield Measurement("ready_seconds", done.ready_seconds, "s", "lower")
        yield from held(model.device)


def outcome(
    token_ms: Sequence[Sequence[float]], arrivals: Sequence[float], ran: float
) -> Iterator[Measurement]:
    """What came out in `ran` seconds; token_ms: when each token of each request was there."""
    tokens = sum(map(len, token_ms))
    yield Measurement("output_tokens_per_second", tokens / ran, "tokens/s", "higher", count=tokens)
    firsts = [times[0] - at for times, at in zip(token_ms, arrivals) if times]
    yield from quantiles("ttft", firsts)
    each = [(t[-1] - t[0]) / (len(t) - 1) for t in token_ms if len(t) > 1]
    yield from quantiles("tpot", each)
    yield from quantiles("token_gap", np.concatenate([np.diff(t) for t in token_ms if len(t) > 1]))


def quantiles(name: str, ms: Sequence[float]) -> Iterator[Measurement]:
    for percent in (50, 99):
        value = float(np.percentile(ms, percent))
        yield Measurement(f"{name}_p{percent}_ms", value, "ms", "lower", count=len(ms))


def held(device: torch.device, cache_bytes: int | None = None) -> Iterator[Measurement]:
    """Memory at its most."""
    if cache_bytes is not None:
        yield Measurement("peak_cache_bytes", cache_bytes, "B", "lower")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        yield Measurement("peak_device_bytes", peak, "B", "lower")


def predicted(cost: CostModel, cache, spec, requests: list[Request]) -> Iterator[Measurement]:
    """The same requests in the simulator, with this machine's times of single prompts and steps."""
    ids: dict = {}
    rows = []
    for r in requests:
        own = None if spec.prefix.shares else r.number  # nobody else's then
        names = chained_hashes(cache.identity, spec.block_size, r.prompt)
        chain = [ids.setdefault((own, name), len(ids)) for name in names]
        rows.append((r.arrival_ms, len(r.prompt), r.output_tokens, chain))
    trace = from_requests(rows, spec.block_size)
    told = simulate(trace, "lru", ALL_FREE, service=cost, shape=cache.shape,
                    window_seconds=None).service  # fmt: skip
    for name, better, unit in (("ttft_p50_ms", "lower", "ms"), ("ttft_p99_ms", "lower", "ms"),
                               ("served_output_tokens_per_second", "higher", "tokens/s")):
        yield Measurement(f"predicted_{name.removeprefix('served_')}", told[name], unit, better)
