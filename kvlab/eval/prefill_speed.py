"""How fast long prompts are computed into each cache, with what memory, and decoded from there."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvlab.cache import CacheSpec
from kvlab.core import Measurement, Variant
from kvlab.eval.clock import fresh_peak, seconds
from kvlab.eval.sweep import Point, Sweep, at_least, check_peers, check_variants
from kvlab.model import Decoder, Driver, PagedCache, check_prefill_driver, prefill
from kvlab.model.fuse import fused
from kvlab.model.peers import dynamic_prefill
from kvlab.model.room import activation_bytes, standing_bytes, weight_bytes

PEERS = {"dynamic whole": None, "dynamic chunked": True}  # whether in chunks
UNTIMED = 4  # decoded tokens that compile and capture


@dataclass
class PrefillSpeed(Sweep):
    """Seconds and peak bytes of one random prompt per context, through every cache in turn.

    model: a loader; weights may be random.
    contexts: tokens of the prompts. chunk_tokens: of a chunk, for the variants and peers alike.
    peers: `dynamic whole` and `dynamic chunked`, transformers' DynamicCache with its SDPA.
    decode_tokens: fed to each variant behind its prompt, the first four not timed; 0: none.
    device, cap_gb, seed: as in `Evaluate`.

    RMSNorms are fused for all of them alike. The account names what the peak consists of: weights,
    what stood before (`standing_bytes`), and of the chunk that held most the cache, workspace and
    activations (`activation_bytes`). What was held after each chunk is appended to
    `measurements.curve.jsonl` in the run folder, the last logits to `logits/`: what must be exact
    can be compared with another run.
    driver: of the chunks, see `model.prefill.prefill`; a row says how many were replays of a
        captured one, where any was.
    """

    model: object
    contexts: list[int]
    chunk_tokens: int = 4096
    peers: Sequence[str] = ()
    decode_tokens: int = 0
    device: str = "auto"
    cap_gb: float | None = None
    seed: int = 0
    driver: Driver = "auto"

    wants_specs = True
    may_not_fit = True

    def __post_init__(self):
        at_least(1, contexts=self.contexts, chunk_tokens=self.chunk_tokens)
        at_least(0, decode_tokens=self.decode_tokens)
        check_peers(self.peers, PEERS)
        check_prefill_driver(self.driver)

    def run(self, folder, variants: Sequence[Variant] = ()) -> None:
        self.folder = Path(folder.path)
        super().run(folder, variants)

    def ahead(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[tuple]:
        for name in (*(variant.name for variant in variants), *self.peers):
            yield from ((name, {"tokens": tokens}) for tokens in self.contexts)

    def weight(self, params: dict) -> float:
        """Attention grows with the square, and is half of the work at about 20,000 tokens."""
        return params["tokens"] * (1 + params["tokens"] / 20_000)

    def points(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[Point]:
        loaded = self.model.load(device)
        check_variants(loaded, variants)
        source = torch.Generator(device).manual_seed(self.seed)
        longest = (1, max(self.contexts))
        ids = torch.randint(len(loaded.tokenizer), longest, generator=source, device=device)
        shared = {**loaded.about(), "chunk_tokens": self.chunk_tokens}
        with fused(loaded.model):
            for name, params, spec in variants:
                about = shared | loaded.about(spec) | params | {"block_size": spec.block_size}
                yield from Arm(self, loaded.model, name, ids, spec).points(about)
            for name in self.peers:
                arm = PeerArm(self, loaded.model, name, ids)
                yield from arm.points(shared | {"peer": name, "format": "bf16"})


class PeerArm:
    """One cache at every length; its kernels are compiled before the first prompt is timed."""

    def __init__(self, job: PrefillSpeed, model, name: str, ids: Tensor):
        self.job, self.model, self.name, self.ids = job, model, name, ids
        self.device, self.warm = ids.device, False

    def points(self, params: dict) -> Iterator[Point]:
        for tokens in self.job.contexts:
            yield Point(self.name, params | {"tokens": tokens}, partial(self.rows, tokens))

    def rows(self, tokens: int) -> Iterator[Measurement]:
        if not self.warm:
            self.warm_up(self.ids[:, : 2 * self.job.chunk_tokens + 100])
            self.warm = True
        gc.collect()  # a cache and its decoder know each other; their buffers would count as ours
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        fresh_peak(self.device)
        yield from self.timed(self.ids[:, :tokens])

    def warm_up(self, ids: Tensor) -> None:
        self._whole_or_chunked(ids)

    def timed(self, ids: Tensor) -> Iterator[Measurement]:
        yield from self.prefilled(lambda: self._whole_or_chunked(ids), ids.shape[1])

    def prefilled(self, call: Callable, tokens: int) -> Iterator[Measurement]:
        """Rows that every cache has."""
        took, _ = seconds(self.device, call)
        yield Measurement("prefill_seconds", took, "s", "lower", count=tokens)
        yield Measurement("prefill_tokens_per_second", tokens / took, "tokens/s", "higher",
                          count=tokens)
        if self.device.type == "cuda":
            for name, most in (("peak_device_bytes", torch.cuda.max_memory_allocated),
                               ("peak_reserved_bytes", torch.cuda.max_memory_reserved)):
                yield Measurement(name, most(self.device), "B", "lower")

    def _whole_or_chunked(self, ids: Tensor):
        return dynamic_prefill(self.model, PEERS[self.name] and self.job.chunk_tokens, ids)


class Arm(PeerArm):
    """A cache of ours, with its account and what is decoded from it."""

    def __init__(self, job: PrefillSpeed, model, name: str, ids: Tensor, spec: CacheSpec):
        super().__init__(job, model, name, ids)
        self.spec = spec

    def warm_up(self, ids: Tensor) -> None:
        """Compile kernels, plan attention and spill a little, with a cache that is then dropped."""
        cache, count = PagedCache.for_model(self.model, self.spec), self.job.decode_tokens
        self._fill(cache, ids, False)
        if count:
            decoder = Decoder(self.model, cache)
            for at in range(min(count, self.spec.block_size + 2)):  # a seal compiles too
                decoder.step(ids[:, at % ids.shape[1]])
        cache.reset()

    def timed(self, ids: Tensor) -> Iterator[Measurement]:
        standing, tokens = standing_bytes(self.model, self.device), ids.shape[1]
        cache = PagedCache.for_model(self.model, self.spec)
        if self.spec.offload.keeps:  # pinning is slow, and done once in a server's life
            took, _ = seconds(self.device, lambda: [g.away.shelf.reserve(tokens)
                                                    for g in cache.groups])
            yield Measurement("host_reserve_seconds", took, "s", "lower")
        peak = Peak(cache, self.model.config, self.job.folder, self.name, tokens)
        yield from self.prefilled(lambda: self._fill(cache, ids, peak), tokens)
        self._keep(tokens)
        if self.replayed:
            yield Measurement("prefill_replayed_chunks", self.replayed, "chunks", "higher")
        yield from account(self.model, peak, standing)
        if self.job.decode_tokens:
            yield from decode_rows(self.model, cache, ids, self.job.decode_tokens)
        cache.check()

    def _fill(self, cache: PagedCache, ids: Tensor, progress) -> None:
        done = prefill(self.model, ids, cache, chunk_tokens=self.job.chunk_tokens,
                       progress=progress, driver=self.job.driver)
        self.logits, self.replayed = done.logits, done.replayed

    def _keep(self, tokens: int) -> None:
        """The last logits, of which another run's can be compared with."""
        folder = self.job.folder / "logits"
        folder.mkdir(exist_ok=True)
        slug = "".join(c if c.isalnum() or c in ".=-" else "_" for c in self.name)
        np.save(folder / f"{slug}-{tokens}.npy", self.logits[0].float().cpu().numpy())


class Peak:
    """The account of the chunk that held most, and a line of the curve for each chunk.

    account: line -> bytes. `cache_peak_bytes` is the most that the cache held at one time within
    that chunk: the chunk's blocks are there before others leave. allocated: the most after a chunk.
    """

    def __init__(self, cache: PagedCache, config, folder: Path, name: str, tokens: int):
        self.cache, self.token_bytes, self.done = cache, activation_bytes(config), 0
        self.account, self.allocated = {}, 0
        self.started = time.perf_counter()
        self.curve = folder / "measurements.curve.jsonl"
        self.told = {"variant": name, "tokens": tokens}

    def __call__(self, done: int, total: int) -> None:
        stats = self.cache.stats()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        line = self.told | {"done": done, "seconds": time.perf_counter() - self.started,
                            "cache_allocated_bytes": stats.allocated_bytes,
                            "cache_peak_bytes": stats.peak_allocated_bytes,
                            "cache_host_bytes": stats.host_bytes, "peak_device_bytes": peak}
        with self.curve.open("a") as file:
            file.write(json.dumps(line) + "\n")
        held = {"cache_peak_bytes": stats.peak_allocated_bytes,
                "workspace_bytes": stats.workspace_bytes,
                "activation_bytes": self.token_bytes * (done - self.done)}  # fmt: skip
        self.account = max(self.account, held, key=lambda lines: sum(lines.values()))
        self.allocated = max(self.allocated, stats.allocated_bytes)
        self.done = done
        self.cache.reset_peak()


def account(model, peak: Peak, standing: int) -> Iterator[Measurement]:
    """What the device holds at the peak, line by line, the sum of the lines, and what it is of the
    measured peak.

    standing: `standing_bytes` before there was the cache.
    """
    stats, device = peak.cache.stats(), model.device
    lines = {"weights_bytes": weight_bytes(model), "standing_bytes": standing, **peak.account}
    for name, value in lines.items():
        yield Measurement(name, value, "B", "lower")
    total = sum(lines.values())
    yield Measurement("accounted_bytes", total, "B")
    yield Measurement("cache_allocated_bytes", peak.allocated, "B", "lower")
    yield Measurement("cache_logical_bytes", stats.logical_bytes, "B", "lower")
    share = 100 * stats.allocated_bytes / max(1, stats.logical_bytes)
    yield Measurement("allocated_of_logical_percent", share, "%", "lower")
    yield Measurement("cache_host_bytes", stats.host_bytes, "B", "lower")
    yield Measurement("resident_tokens_percent", stats.resident_tokens_percent, "%", "lower")
    if device.type == "cuda":
        share = 100 * total / torch.cuda.max_memory_allocated(device)
        yield Measurement("accounted_percent", share, "%")


def decode_rows(model, cache: PagedCache, ids: Tensor, count: int) -> Iterator[Measurement]:
    """Tokens a second behind the prompt; the first steps, which compile and capture, are not timed.
    """
    decoder, first = Decoder(model, cache), min(UNTIMED, count - 1)

    def run(start: int, stop: int) -> None:
        for at in range(start, stop):
            decoder.step(ids[:, at % ids.shape[1]])

    run(0, first)
    took, _ = seconds(ids.device, lambda: run(first, count))
    rate, count = (count - first) / took, count - first
    yield Measurement("decode_tokens_per_second", rate, "tokens/s", "higher", count=count)
    yield Measurement("decode_captured", float(decoder.captured), "")
    if ids.is_cuda:
        peak = torch.cuda.max_memory_allocated(ids.device)
        yield Measurement("peak_device_bytes_with_decode", peak, "B", "lower")
