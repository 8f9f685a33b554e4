"""Job: hit rates and time to the first token of a live prefix cache, beside their simulation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product

import numpy as np
import torch

from kvlab.blocks import HashSharing
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Measurement
from kvlab.eval.recording import (
    Recording,
    Simulated,
    agreement,
    foresees,
    only_ledger,
    record,
    simulated,
)
from kvlab.eval.sweep import Point, Sweep
from kvlab.model import LoadedModel, PagedCache
from kvlab.policy import by_name
from kvlab.serve import Limits, Loop, Request, TtftModel, WallClock

MIB = 1 << 20
LENGTHS = (1, 16, 64, 128, 256, 384, 512, 768, 1024)  # tokens of the prompts that calibrate


class PrefixHitRate(Sweep):
    """Policies x budgets x formats on live requests, one at a time, and the same simulated.

    model, requests: a loader; a source of requests, or a list of them.
    spec: the cache; format, policy, budget and sharing of prefixes are this job's to choose.
    budgets_mib: bytes of sealed blocks; a smaller format so holds more blocks.
    calibrate: prompts per length that fit the model of time; the simulated hits of each
        request are turned into a time by it, and compared with the measured one.
    chunk_tokens: of a prompt, computed in one step.
    """

    holds_nothing = True
    own_list = "see job.policies, job.formats"

    def __init__(
        self, model, requests, spec: CacheSpec, policies: Sequence[str] = ("lru", "arc", "belady"),
        budgets_mib: Sequence[float] = (4, 8), formats: Sequence[str] = ("bf16", "int8", "int4"),
        chunk_tokens: int = 512, calibrate: int = 3, device: str = "auto",
    ):
        for policy in policies:
            if not foresees(policy):
                by_name(policy)
        if spec.budget_blocks or spec.budget_bytes or spec.budget_percent:
            raise BadInput("cache.budget_blocks", "given", "this job's budgets are job.budgets_mib")
        self.model, self.spec = model, spec
        self.requests = list(requests) if isinstance(requests, Sequence) else [requests]
        self.policies, self.budgets_mib = list(policies), list(budgets_mib)
        self.formats, self.calibrate = list(formats), calibrate
        self.limits, self.device = Limits(running=1, chunk_tokens=chunk_tokens), device

    def points(self, device: torch.device, variants) -> Iterator[Point]:
        loaded = self.model.load(device)
        for source in self.requests:
            made = source.make(loaded.tokenizer, loaded.model.config.vocab_size)
            for format in self.formats:
                plain = replace(self.spec, format=format)
                speed = cache(partial(calibrated, loaded, plain, self.limits, self.calibrate))
                for budget, policy in product(self.budgets_mib, self.policies):
                    spec = replace(plain, budget_bytes=int(budget * MIB), policy="lru",
                                   prefix=HashSharing(outputs=False))
                    ledger = only_ledger(PagedCache.for_model(loaded.model, spec))
                    params = {
                        "trace": source.name, "requests": len(made), "format": format,
                        "policy": policy, "budget_mib": budget, **loaded.about(),
                        "capacity_blocks": ledger.capacity, "block_size": spec.block_size,
                        "chunk_tokens": self.limits.chunk_tokens,
                    }
                    yield Point(f"{format} {policy}", params,
                                partial(self._live, loaded, spec, made, policy, speed))

    def _live(self, loaded, spec, made, policy: str, speed) -> Iterator[Measurement]:
        """speed: gives the model of time, which is fitted at the first call."""
        fitted = speed()
        live = record(loaded, spec, made, policy, self.limits, WallClock())
        yield from rows(live, simulated(live), fitted)


def rows(live: Recording, other: Simulated, speed: TtftModel) -> Iterator[Measurement]:
    """Live and simulated side by side; what differs between them is counted, not averaged."""
    yield from agreement(live, other)
    yield Measurement("evictions", live.evictions, "blocks", "lower")
    done = [(s, hit) for s, hit in zip(live.served, other.hits.tolist()) if s.state == "done"]
    yield Measurement("refused_requests", len(live.served) - len(done), "requests", "lower")
    yield from times(live, done, speed)


def times(live: Recording, done: list, speed: TtftModel) -> Iterator[Measurement]:
    """Measured time to the first token, from admission on, against the one predicted."""
    if not done:
        return
    measured = np.array([s.prefill_ms for s, _ in done])
    prompt = np.array([s.prompt_tokens for s, _ in done])
    found = np.minimum([hit * live.block_size for _, hit in done], prompt - 1)
    predicted = speed.predict(prompt, found)
    errors = np.abs(predicted / measured - 1)
    yield Measurement("ttft_ms", float(measured.mean()), "ms", "lower", count=len(done))
    yield Measurement("predicted_ttft_ms", float(predicted.mean()), "ms", "lower", count=len(done))
    yield Measurement("ttft_p50_ms", float(np.median(measured)), "ms", "lower", count=len(done))
    yield Measurement("predicted_ttft_error_percent", 100 * float(np.median(errors)), "%", "lower",
                      count=len(done))
    cold = float(speed.predict(prompt, np.zeros_like(prompt)).mean())
    yield Measurement("predicted_ttft_cold_ms", cold, "ms", count=len(done))


def calibrated(
    loaded: LoadedModel, spec: CacheSpec, limits: Limits, repeats: int
) -> TtftModel:
    """Time prompts of several lengths, cold and then with the first of their tokens known, one at
    a time; the first round is not counted."""
    draw = np.random.default_rng(0)
    roomy = replace(spec, prefix=HashSharing(), policy="none", budget_bytes=None)
    samples = []
    for repeat in range(repeats + 1):
        cold = [draw.integers(1, loaded.model.config.vocab_size, n) for n in LENGTHS]
        warm = [np.append(p, draw.integers(1, 8192, 1 + len(p) // 4)) for p in cold]
        requests = [Request(i, 0.0, p, 1) for i, p in enumerate([*cold, *warm])]
        empty = PagedCache.for_model(loaded.model, roomy)
        served = Loop(loaded, empty, limits, WallClock()).run(requests)
        samples += [(s.prompt_tokens, s.hit_tokens, s.prefill_ms) for s in served if repeat]
    return TtftModel.fit(samples, limits.chunk_tokens)
