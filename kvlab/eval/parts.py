"""Chunks of prompts and steps of decode, timed one by one through the engine of a live loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from statistics import median

import numpy as np
import torch

from kvlab.cache import CacheSpec
from kvlab.eval.clock import synchronize
from kvlab.model import Driver, LoadedModel, PagedCache
from kvlab.serve import Job, Request, engine_of


class Parts:
    """What the steps of `serve.Loop` are made of, without the waits between them.

    repeats: of each chunk, the median counts, after one that warms up. driver: of the engine.
    `packs` says whether a chunk may hold several prompts.
    """

    def __init__(self, loaded: LoadedModel, spec: CacheSpec, driver: Driver, repeats: int,
                 seed: int):  # fmt: skip
        self.loaded, self.spec, self.driver, self.repeats = loaded, spec, driver, repeats
        self.draw = np.random.default_rng(seed)
        self.packs = self._engine(1)[1].packs

    def _engine(self, rows: int):
        cache = PagedCache.for_model(self.loaded.model, self.spec)
        return cache, engine_of(self.loaded, cache, rows, self.driver)

    def _jobs(self, cache: PagedCache, lengths: Sequence[int], output: int) -> list[Job]:
        jobs = []
        for number, tokens in enumerate(lengths):
            prompt = self.draw.integers(1, len(self.loaded.tokenizer), tokens)
            jobs.append(Job(Request(number, 0.0, prompt, output)))
            jobs[-1].open(cache, True, 0.0)
        return jobs

    @torch.inference_mode()
    def chunk_ms(self, tokens: int, prompts: int) -> float:
        """Of a chunk that is so many whole prompts of so many tokens each."""
        times = []
        for _ in range(self.repeats + 1):
            cache, runs = self._engine(prompts)
            jobs = self._jobs(cache, [tokens] * prompts, 1)
            times.append(self._timed(partial(self._compute, runs, jobs)))
        return median(times[1:])

    def _compute(self, runs, jobs: list[Job]) -> None:
        runs.prefill(jobs, [job.tokens for job in jobs]).tokens()

    @torch.inference_mode()
    def step_ms(self, lengths: Sequence[int], steps: int) -> float:
        """Of a step of rows of these lengths, the mean of so many; the host reads the tokens of
        one while the next is computed, where the engine lets it."""
        cache, runs = self._engine(len(lengths))
        runs.warm_up(max(lengths) + steps + 3)
        jobs = self._jobs(cache, lengths, steps + 4)
        for job in jobs:
            self._read([job], runs.prefill([job], [job.tokens]), len(job.tokens))
        self._steps(runs, jobs, 3)  # compile, capture
        return self._timed(lambda: self._steps(runs, jobs, steps)) / steps

    def _steps(self, runs, jobs: list[Job], steps: int) -> None:
        flights: list = []
        for _ in range(steps):
            flights.append(runs.decode(jobs))
            for job in jobs:
                job.choose(1)
            if len(flights) > runs.lag:
                self._take(jobs, flights.pop(0))
        for arriving in flights:
            self._take(jobs, arriving)

    def _read(self, jobs: list[Job], arriving, computed: int) -> None:
        for job in jobs:
            job.choose(computed)
        self._take(jobs, arriving)

    @staticmethod
    def _take(jobs: list[Job], arriving) -> None:
        for job, token in zip(jobs, arriving.tokens()):
            job.take(token, 0.0)

    def _timed(self, call) -> float:
        device = self.loaded.model.device
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        return 1e3 * (time.perf_counter() - started)


def uneven(mean: int, rows: int, spread: float) -> list[int]:
    """Lengths of so many rows: one of `spread` times the mean, the others alike."""
    longest = min(round(spread * mean), mean * rows - (rows - 1))
    rest, more = divmod(mean * rows - longest, max(1, rows - 1))
    return [longest] + [rest + (i < more) for i in range(rows - 1)]
