"""Times of one machine for the cost model: prefill by length, decode by rows, and copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

import numpy as np
import torch
from scipy.optimize import nnls

from kvlab.core import BadInput, Measurement, Variant
from kvlab.eval.clock import synchronize
from kvlab.eval.parts import Parts, uneven
from kvlab.eval.speed import fill
from kvlab.model import (
    Decoder,
    Driver,
    PagedCache,
    check_driver,
    model_geometry,
    portrait,
    prefill,
    prepare_device,
)
from kvlab.sim import Calibration


class Calibrate:
    """Measures what `service.calibration` reads, and writes it as `calibration.json`.

    model: a loader; spec: the cache, whose format and block size the times are of. lengths: tokens
    of cold prompts. contexts x rows: tokens of a row and rows of a step of decode. steps: decoded
    at each. prompts: more numbers of prompts of each length that share a chunk, if it holds them.
    spread: longest rows, in means of a step's rows. With either, all is timed through the engine of
    `serve.Loop`, and longer prompts than a chunk are left out: what its steps take. With neither,
    prompts are computed one at a time by `prefill`, rows alike are decoded by a `Decoder`.
    copies: bytes of copies between host and device, large ones tell the bandwidth, small ones the
    latency; on a CPU both are copies of its memory. repeats: of each time, the median counts.
    chunk_tokens, driver, device, cap_gb, seed: as in `Evaluate`. write: a second place for the
    file.

    The fits are non-negative least squares of relative errors; how far they miss the measured times
    is `fit_error_percent`, the largest.
    """

    wants_specs = True

    def __init__(
        self, model, lengths: Sequence[int] = (512, 2048, 8192),
        contexts: Sequence[int] = (512, 4096), rows: Sequence[int] = (1, 4), steps: int = 16,
        copies: Sequence[int] = (1 << 16, 1 << 24),
        repeats: int = 3, chunk_tokens: int = 4096, driver: Driver = "auto", device: str = "auto",
        cap_gb: float | None = None, seed: int = 0, write: str | None = None,
        prompts: Sequence[int] = (), spread: Sequence[float] = (),
    ):  # fmt: skip
        check_driver(driver)
        given = {"lengths": lengths, "contexts": contexts, "rows": rows, "copies": copies}
        for name, values in given.items():
            if len(set(values)) < 2 and name in ("lengths", "copies") or min(values, default=0) < 1:
                raise BadInput(name, list(values), "must name at least two positive numbers"
                               if name in ("lengths", "copies") else "must name positive numbers")
        for name, value in (("steps", steps), ("repeats", repeats), ("chunk_tokens", chunk_tokens)):
            if value < 1:
                raise BadInput(name, value, "must be at least 1")
        self.model, self.lengths, self.contexts, self.rows = model, lengths, contexts, rows
        self.steps, self.copies, self.repeats = steps, copies, repeats
        self.chunk_tokens, self.driver, self.device = chunk_tokens, driver, device
        self.cap_gb, self.seed, self.write = cap_gb, seed, write
        for name, values in (("prompts", prompts), ("spread", spread)):
            if min(values, default=2) <= 1:
                raise BadInput(name, list(values), "must name numbers above 1")
        self.prompts, self.spread = prompts, spread

    @torch.inference_mode()
    def run(self, folder, variants: list[Variant]) -> None:
        """One variant's times; more of them are refused, since one file holds one cache's."""
        if len(variants) != 1:
            names = [variant.name for variant in variants]
            raise BadInput("variants", names, "calibrate one cache at a time: a file has one")
        (variant,) = variants
        device = prepare_device(self.device, self.cap_gb)
        check_driver(self.driver, device)
        loaded = self.model.load(device)
        geometry = model_geometry(loaded.model, variant.spec)
        variant.spec.checked_for(geometry)
        params = {**loaded.about(), **variant.params, "chunk_tokens": self.chunk_tokens}
        if folder.done(variant.name, params):
            return
        with folder.surviving(variant.name, params):
            found = self._measure(loaded, variant.spec, device)
            token_bytes = variant.spec.format.block_bytes(geometry) / variant.spec.block_size
            about = {"device": _name(device), "variant": variant.name, **params}
            calibration = Calibration(*(tuple(c) for _, _, c in found), token_bytes, about)
            for path in (folder.path / "calibration.json", *([self.write] if self.write else ())):
                calibration.write(path)
                print(f"written: {path}")
            for place, rows in self._told(found):
                folder.add(variant.name, params | place, rows)
            folder.add(variant.name, params, [_error(found)])

    def _measure(self, loaded, spec, device) -> list[tuple]:
        """(points, ms of each, coefficients) of prefill, decode, copies to the host and back."""
        live = self.prompts or self.spread
        found = list((self._in_loop if live else self._alone)(loaded, spec))
        for to_device in (False, True):
            timed = [self._copy(size, device, to_device) for size in self.copies]
            terms = [(1, size) for size in self.copies]
            found.append(([(size,) for size in self.copies], timed, fit(terms, timed)))
        return found

    def _alone(self, loaded, spec) -> Iterator[tuple]:
        prompts = [(n, 1) for n in self.lengths]
        timed = [self._prefill(loaded, spec, n) for n in self.lengths]
        yield prompts, timed, fit([chunk_terms(*point) for point in prompts], timed)
        grid = [(r, c, c) for r in self.rows for c in self.contexts]
        timed = [self._decode(loaded.model, spec, *point[:2]) for point in grid]
        yield grid, timed, fit([step_terms(*point)[:3] for point in grid], timed)

    def _in_loop(self, loaded, spec) -> Iterator[tuple]:
        parts = Parts(loaded, spec, self.driver, self.repeats, self.seed)
        counts = (1, *self.prompts) if parts.packs else (1,)
        chunks = [(n, p) for n in self.lengths for p in counts if n * p <= self.chunk_tokens]
        if len(chunks) < 2:
            raise BadInput("prefill.chunk_tokens", self.chunk_tokens,
                           "holds less than two of the lengths to be timed in one chunk")
        timed = [parts.chunk_ms(*point) for point in chunks]
        yield chunks, timed, fit([chunk_terms(*point) for point in chunks], timed)
        shapes = [uneven(c, r, s) for r in self.rows for c in self.contexts
                  for s in (1, *self.spread) if r > 1 or s == 1]  # fmt: skip
        grid = [(len(rows), sum(rows) // len(rows), max(rows)) for rows in shapes]
        timed = [parts.step_ms(rows, self.steps) for rows in shapes]
        yield grid, timed, fit([step_terms(*point) for point in grid], timed)

    def _prefill(self, loaded, spec, tokens: int) -> float:
        source = torch.Generator(loaded.model.device).manual_seed(self.seed)
        ids = torch.randint(
            len(loaded.tokenizer), (1, tokens), generator=source, device=loaded.model.device
        )

        def call():
            cache = PagedCache.for_model(loaded.model, spec)
            prefill(loaded.model, ids, cache, chunk_tokens=self.chunk_tokens)

        return self._median_ms(call, loaded.model.device)

    def _decode(self, model, spec, rows: int, tokens: int) -> float:
        """ms of a step, of a decoder over a cache filled at random."""
        cache = PagedCache.for_model(model, spec)
        shapes = portrait(model).shapes
        fill(cache, rows, tokens, partial(_draw, shapes, rows, cache.dtype, model.device))
        decoder = Decoder(model, cache, driver=self.driver)
        ids = torch.ones(rows, dtype=torch.long, device=model.device)
        for _ in range(3):  # compile, capture, warm up
            decoder.step(ids)
        synchronize(model.device)
        started = time.perf_counter()
        for _ in range(self.steps):
            ids = decoder.step(ids).argmax(-1)
        synchronize(model.device)
        return 1e3 * (time.perf_counter() - started) / self.steps

    def _copy(self, size: int, device: torch.device, to_device: bool) -> float:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        there = torch.empty(size, dtype=torch.uint8, device=device)
        source, target = (host, there) if to_device else (there, host)
        return self._median_ms(lambda: target.copy_(source, non_blocking=True), device)

    def _median_ms(self, call: Callable, device: torch.device) -> float:
        times = []
        for _ in range(self.repeats + 1):  # the first warms up
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            times.append(1e3 * (time.perf_counter() - started))
        return median(times[1:])

    def _told(self, found: list[tuple]) -> Iterator[tuple[dict, list[Measurement]]]:
        (prompts, prefills, _), (grid, steps, _), *copies = found
        for (tokens, count), ms in zip(prompts, prefills):
            rows = [Measurement("prefill_seconds", ms / 1e3, "s", "lower"),
                    Measurement("prefill_tokens_per_second", 1e3 * tokens * count / ms, "tokens/s",
                                "higher")]  # fmt: skip
            yield {"tokens": tokens} | ({"prompts": count} if count > 1 else {}), rows
        for (count, tokens, longest), ms in zip(grid, steps):
            rows = [Measurement("decode_ms", ms, "ms", "lower"),
                    Measurement("decode_tokens_per_second", 1e3 * count / ms, "tokens/s",
                                "higher")]  # fmt: skip
            more = {"longest": longest} if longest > tokens else {}
            yield {"batch": count, "tokens": tokens} | more, rows
        for way, (sizes, times, _) in zip(("to_host", "to_device"), copies):
            for (size,), ms in zip(sizes, times):
                rate = Measurement("copy_gigabytes_per_second", size / ms / 1e6, "GB/s", "higher")
                yield {"copy": way, "bytes": size}, [rate]


def fit(terms: Sequence[Sequence[float]], ms: Sequence[float]) -> list[float]:
    """Coefficients of at least 0 whose sum over `terms` is nearest to `ms`, in relative error."""
    rows = np.asarray(terms, dtype=float) / np.asarray(ms, dtype=float)[:, None]
    scale = np.maximum(rows.max(0), 1e-300)
    solution, _ = nnls(rows / scale, np.ones(len(ms)))
    return (solution / scale).tolist()


def chunk_terms(tokens: int, prompts: int) -> tuple[int, ...]:
    """What `Calibration.prefill` is of: a chunk of so many prompts of so many tokens each."""
    return 1, tokens * prompts, tokens * tokens * prompts, prompts - 1


def step_terms(rows: int, mean: int, longest: int) -> tuple[int, ...]:
    """What `Calibration.decode` is of."""
    return 1, rows, rows * mean, longest


def _error(found: list[tuple]) -> Measurement:
    """The largest miss of any fit, in percent of the measured time."""
    (prompts, prefills, a), (grid, steps, b), *copies = found
    pairs = [(np.dot(a, chunk_terms(*p)), ms) for p, ms in zip(prompts, prefills)]
    pairs += [(np.dot(b, step_terms(*p)[: len(b)]), ms) for p, ms in zip(grid, steps)]
    pairs += [
        (c[0] + c[1] * size, ms) for sizes, times, c in copies for (size,), ms in zip(sizes, times)
    ]
    worst = max(abs(told / ms - 1) for told, ms in pairs)
    return Measurement("fit_error_percent", 100 * worst, "%", "lower", count=len(pairs))


def _draw(shapes, rows: int, dtype, device, layer: int, tokens: int):
    heads, *widths = shapes[layer][:3]
    sizes = ((rows, heads, tokens, width) for width in widths)
    return tuple(torch.randn(size, dtype=dtype, device=device) for size in sizes)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
