"""How fast a model decodes from each cache, beside the library's own, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from kvlab.core import BadInput, Measurement, Variant
from kvlab.model import model_geometry, portrait
from kvlab.model.adapter import PagedCache
from kvlab.model.decode import Decoder, Driver, check_driver
from kvlab.model.device import prepare_device
from kvlab.model.peers import PEERS, Peer

FILL_TOKENS = 16384  # of a row, that a cache takes over at a time
WARM_UP = 3  # steps


class DecodeSpeed:
    """Tokens a second of the decode driver over caches filled with random keys and values.

    model: a loader; weights may be random.
    contexts, batches: tokens of a row before the first step, and rows; what does not fit into the
        device's memory is left out.
    steps: tokens decoded of each row, the first of which are not timed.
    peers: caches of the library measured beside, of `kvlab.model.peers.PEERS`; they and eager
        drivers run an eighth of the steps, and the compiled one only the smallest context, because
        it compiles anew for each.
    driver, device, cap_gb, seed: as in `Evaluate`.
    """

    wants_specs = True

    def __init__(
        self, model, contexts: list[int], batches: list[int], steps: int = 128,
        peers: list[str] = (), driver: Driver = "auto", device: str = "auto",
        cap_gb: float | None = None, seed: int = 0,
    ):
        check_driver(driver)
        if steps < 16:
            raise BadInput("steps", steps, "must be at least 16")
        for name, counts in (("contexts", contexts), ("batches", batches)):
            if not counts or min(counts) < 1:
                raise BadInput(name, counts, "must name positive numbers")
        for peer in peers:
            if peer not in PEERS:
                raise BadInput("peers", peer, f"known: {', '.join(PEERS)}")
        self.model, self.contexts, self.batches, self.steps = model, contexts, batches, steps
        self.peers, self.driver = list(peers), driver
        self.device, self.cap_gb, self.seed = device, cap_gb, seed

    @torch.inference_mode()
    def run(self, folder, variants: list[Variant]) -> None:
        """Measure whatever `folder` does not hold yet."""
        device = prepare_device(self.device, self.cap_gb)
        check_driver(self.driver, device)
        loaded = self.model.load(device)
        self.cuda = device.type == "cuda"
        for variant in variants:
            variant.spec.checked_for(model_geometry(loaded.model, variant.spec))
        self.weights, self.ceiling = weight_bytes(loaded.model), copy_ceiling(device)
        shared = {**loaded.about(), "steps": self.steps}
        if not folder.done("device", {}):
            rate = self.ceiling / 1e9
            folder.add("device", {}, [Measurement(
                "copy_gigabytes_per_second", rate, "GB/s", "higher")])
        for rows in self.batches:
            for tokens in self.contexts:
                place = shared | {"tokens": tokens, "batch": rows}
                for variant in variants:
                    params = variant.params | place | {"block_size": variant.spec.block_size}
                    call = partial(self._ours, loaded.model, variant.spec, rows, tokens)
                    self._measure(folder, variant.name, params, call)
                for name in self._peers_at(rows, tokens):
                    call = partial(self._peer, loaded.model, name, rows, tokens)
                    self._measure(folder, name, place | {"peer": name}, call)

    def _peers_at(self, rows: int, tokens: int) -> list[str]:
        first = (rows, tokens) == (min(self.batches), min(self.contexts))
        return [name for name in self.peers
                if (self.cuda or "graph" not in name) and (first or "compiled" not in name)]

    def _measure(self, folder, name: str, params: dict, call: Callable) -> None:
        if folder.done(name, params):
            return
        with folder.surviving(name, params):
            try:
                rows = list(call())
            except (torch.cuda.OutOfMemoryError, ImportError) as error:
                reason = "does not fit" if isinstance(error, RuntimeError) else "is not installed"
                place = f"{params['batch']} x {params['tokens']}"
                print(f"{name}, {place}: {reason}, left out", flush=True)
                rows = []
            folder.add(name, params, rows)
        if self.cuda:
            torch.cuda.empty_cache()

    def _ours(self, model, spec, rows: int, tokens: int) -> Iterator[Measurement]:
        cache = PagedCache.for_model(model, spec)
        fill(cache, rows, tokens, self._random(model, rows, cache.dtype))
        decoder = Decoder(model, cache, driver=self.driver)
        steps = self.steps if decoder.why_eager is None else self.steps // 8
        untimed = WARM_UP if decoder.why_eager else WARM_UP + spec.block_size  # a seal among them
        seconds = self._loop(decoder.step, rows, model, steps, untimed)
        yield from self._rows(seconds, rows, cache.stats().logical_bytes)
        if decoder.captured:
            yield replay_ms(decoder.timed(self._clock))
        cache.check()

    def _peer(self, model, name: str, rows: int, tokens: int) -> Iterator[Measurement]:
        random = self._random(model, rows, model.dtype)
        peer: Peer = PEERS[name](model, lambda layer: random(layer, tokens), rows, tokens,
                                 3 * self.steps)
        seconds = self._loop(peer.step, rows, model, self.steps // 8)
        yield from self._rows(seconds, rows, peer.nbytes)
        if peer.replay is not None:
            yield replay_ms(self._clock(peer.replay))

    def _clock(self, replay: Callable[[], None]) -> float:
        return median_ms(replay, 9)

    def _rows(self, seconds: float, rows: int, cache_bytes: int) -> Iterator[Measurement]:
        size = self.weights + cache_bytes
        yield Measurement("decode_tokens_per_second", rows / seconds, "tokens/s", "higher")
        yield Measurement("decode_ms", 1e3 * seconds, "ms", "lower")
        yield Measurement("decode_bytes", size, "B", "lower")
        percent = 100 * size / seconds / self.ceiling
        yield Measurement("decode_percent_of_copy", percent, "%", "higher")

    def _loop(
        self, step: Callable[[Tensor], Tensor], rows: int, model, steps: int, untimed: int = WARM_UP
    ) -> float:
        """Seconds of one step, greedy tokens fed back; the first compile, capture, warm up."""
        tokens = torch.ones(rows, dtype=torch.long, device=model.device)
        for count in range(untimed + steps):
            if count == untimed:
                synchronize(model.device)
                started = time.perf_counter()
            tokens = step(tokens).argmax(-1)
        synchronize(model.device)
        return (time.perf_counter() - started) / steps

    def _random(self, model, rows: int, dtype) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        shapes = portrait(model).shapes
        source = torch.Generator(model.device).manual_seed(self.seed)

        def draw(layer: int, tokens: int) -> tuple[Tensor, Tensor]:
            heads, *widths = shapes[layer][:3]
            return tuple(torch.randn(rows, heads, tokens, width, dtype=dtype, device=model.device,
                                     generator=source) for width in widths)

        return draw


def fill(cache: PagedCache, rows: int, tokens: int, draw: Callable) -> None:
    """Take `tokens` random tokens into each of `rows` new rows of an empty cache."""
    cache.rows = [cache.open() for _ in range(rows)]
    for start in range(0, tokens, FILL_TOKENS):
        count = min(FILL_TOKENS, tokens - start)
        cache.begin(cache.rows, [count] * rows)
        for layer in range(cache.geometry.layers):
            cache.store(layer, *draw(layer, count))
        cache.commit()
        cache.seen += count


def weight_bytes(model) -> int:
    """Bytes of weights that one step must read: all but embedding rows, the head included."""
    embedding = model.get_input_embeddings().weight
    every = {id(p): p.nbytes for p in model.parameters()}
    head = model.get_output_embeddings().weight
    return sum(every.values()) - (embedding.nbytes if head is not embedding else 0)


def copy_ceiling(device: torch.device) -> float:
    """Bytes a second, read plus written, of a large copy on `device`."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target, times = torch.empty_like(source), []
    for _ in range(8):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size / median(times[3:])


def replay_ms(value: float) -> Measurement:
    """Device time of a captured step alone, without the host's work between steps."""
    return Measurement("decode_replay_ms", value, "ms", "lower")


def median_ms(replay: Callable[[], None], count: int) -> float:
    """Median device time of `replay`."""
    times = []
    for _ in range(count):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
