"""How fast a model decodes from each cache, beside the library's own, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kvlab.core import Measurement, Variant
from kvlab.eval.clock import copy_ceiling, event_ms, seconds
from kvlab.eval.sweep import Point, Sweep, at_least, check_peers, check_variants
from kvlab.model import Decoder, Driver, PagedCache, check_driver, portrait
from kvlab.model.peers import PEERS, Peer

FILL_TOKENS = 16384  # of a row, that a cache takes over at a time
WARM_UP = 3  # steps


@dataclass
class DecodeSpeed(Sweep):
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

    model: object
    contexts: list[int]
    batches: list[int]
    steps: int = 128
    peers: Sequence[str] = ()
    driver: Driver = "auto"
    device: str = "auto"
    cap_gb: float | None = None
    seed: int = 0

    wants_specs = True
    may_not_fit = True

    def __post_init__(self):
        check_driver(self.driver)
        at_least(16, steps=self.steps)
        at_least(1, contexts=self.contexts, batches=self.batches)
        check_peers(self.peers, PEERS)

    def ahead(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[tuple]:
        for rows in self.batches:
            for tokens in self.contexts:
                names = [*(v.name for v in variants), *self._peers_at(device, rows, tokens)]
                yield from ((name, {"tokens": tokens, "batch": rows}) for name in names)

    def weight(self, params: dict) -> float:
        """A cache is filled and stepped through; to compile takes as long as 100,000 tokens."""
        return 1e5 + params["batch"] * params["tokens"] if "tokens" in params else 0.0

    def points(self, device: torch.device, variants: Sequence[Variant]) -> Iterator[Point]:
        check_driver(self.driver, device)
        loaded = self.model.load(device)
        check_variants(loaded, variants)
        model, self.ceiling = loaded.model, copy_ceiling(device)
        rate = Measurement("copy_gigabytes_per_second", self.ceiling / 1e9, "GB/s", "higher")
        yield Point("device", {}, lambda: [rate])
        shared = {**loaded.about(), "steps": self.steps}
        for rows in self.batches:
            for tokens in self.contexts:
                place = shared | {"tokens": tokens, "batch": rows}
                for name, params, spec in variants:
                    own = params | place | loaded.about(spec) | {"block_size": spec.block_size}
                    yield Point(name, own, partial(self._ours, model, spec, rows, tokens))
                for name in self._peers_at(device, rows, tokens):
                    yield Point(name, place | {"peer": name},
                                partial(self._peer, model, name, rows, tokens))

    def _peers_at(self, device: torch.device, rows: int, tokens: int) -> list[str]:
        first = (rows, tokens) == (min(self.batches), min(self.contexts))
        return [name for name in self.peers
                if (device.type == "cuda" or "graph" not in name)
                and (first or "compiled" not in name)]

    def _ours(self, model, spec, rows: int, tokens: int) -> Iterator[Measurement]:
        cache = PagedCache.for_model(model, spec)
        fill(cache, rows, tokens, self._random(model, rows, cache.dtype))
        yield Measurement("cache_allocated_bytes", cache.stats().allocated_bytes, "B", "lower")
        decoder = Decoder(model, cache, driver=self.driver)
        steps = self.steps if decoder.why_eager is None else self.steps // 8
        untimed = WARM_UP if decoder.why_eager else WARM_UP + spec.block_size  # a seal among them
        took = greedy(decoder.step, rows, model.device, steps, untimed)
        yield from self._rows(model, took, rows, cache.stats().logical_bytes)
        if decoder.captured:
            yield replay_row(decoder.timed(clock))
        cache.check()

    def _peer(self, model, name: str, rows: int, tokens: int) -> Iterator[Measurement]:
        random = self._random(model, rows, model.dtype)
        peer: Peer = PEERS[name](model, lambda layer: random(layer, tokens), rows, tokens,
                                 3 * self.steps)
        took = greedy(peer.step, rows, model.device, self.steps // 8)
        yield from self._rows(model, took, rows, peer.nbytes)
        if peer.replay is not None:
            yield replay_row(clock(peer.replay))

    def _rows(self, model, took: float, rows: int, cache_bytes: int) -> Iterator[Measurement]:
        size = step_weight_bytes(model) + cache_bytes
        yield Measurement("decode_tokens_per_second", rows / took, "tokens/s", "higher")
        yield Measurement("decode_ms", 1e3 * took, "ms", "lower")
        yield Measurement("decode_bytes", size, "B", "lower")
        yield Measurement("decode_percent_of_copy", 100 * size / took / self.ceiling, "%", "higher")

    def _random(self, model, rows: int, dtype) -> Callable[[int, int], tuple[Tensor, Tensor]]:
        shapes = portrait(model).shapes
        source = torch.Generator(model.device).manual_seed(self.seed)

        def draw(layer: int, tokens: int) -> tuple[Tensor, Tensor]:
            heads, *widths = shapes[layer][:3]
            return tuple(torch.randn(rows, heads, tokens, width, dtype=dtype, device=model.device,
                                     generator=source) for width in widths)

        return draw


def greedy(
    step: Callable[[Tensor], Tensor], rows: int, device: torch.device, steps: int,
    untimed: int = WARM_UP,
) -> float:
    """Seconds of one step, the likeliest token fed back; the first compile, capture, warm up."""
    tokens = torch.ones(rows, dtype=torch.long, device=device)

    def run(count: int) -> None:
        nonlocal tokens
        for _ in range(count):
            tokens = step(tokens).argmax(-1)

    run(untimed)
    return seconds(device, lambda: run(steps))[0] / steps


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


def step_weight_bytes(model) -> int:
    """Bytes of weights that one step must read: all but embedding rows, the head included."""
    embedding = model.get_input_embeddings().weight
    every = {id(p): p.nbytes for p in model.parameters()}
    head = model.get_output_embeddings().weight
    return sum(every.values()) - (embedding.nbytes if head is not embedding else 0)


def clock(replay: Callable[[], None]) -> float:
    return event_ms(replay, 9)


def replay_row(value: float) -> Measurement:
    """Device time of a captured step alone, without the host's work between steps."""
    return Measurement("decode_replay_ms", value, "ms", "lower")
