"""Find and keep launch settings of the decode kernel for this device: done once, by hand.

Kernels only look settings up (`kernel.tune.choose`); measuring happens here and nowhere else, so
never while a graph is captured. The table lies in the user's cache folder, by device name and
shape: another device gets its own entries, and the defaults until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch

from kvlab.core import BadInput, Measurement
from kvlab.eval.clock import replayed
from kvlab.eval.kernels import Decode, Shape, decode_case
from kvlab.eval.sweep import Batch, Point, Sweep, needs_cuda
from kvlab.format import Grouped, KVFormat, Rotated, by_name
from kvlab.kernel import tune

WARPS = {32: (1, 2), 64: (1, 2, 4), 128: (1, 2, 4)}
STAGES = (2, 3)
QWEN = Shape()


def candidates(slots: int, fills: tuple[int, ...] = (3, 4, 6, 8, 12)) -> list[tuple[int, ...]]:
    """Settings worth trying for blocks of `slots` tokens: tile, warps, stages, programs per
    multiprocessor (of one warp at least 8, of four at most 6)."""
    tiles = [32] if slots <= 32 else [64] if slots <= 64 else [64, 128]
    every = [(t, w, s, f) for t in tiles for w, s, f in product(WARPS[t], STAGES, fills)]
    return [c for c in every if 8 <= c[1] * c[3] <= 24]


def measure(
    format: KVFormat | str, slots: int, shape: Shape = QWEN, tokens: int = 200_000,
    rows: int = 1, store: bool = True, tried: list[tuple[int, ...]] | None = None,
    clock: Callable[[Callable], float] = replayed, device_name: str | None = None,
) -> list[tuple[float, tuple[int, ...] | None]]:
    """Time the decode kernel with each setting; keep the fastest for this device and shape.

    slots: block size; tried: settings, default `candidates`; the standing choice (None) always
    comes along. Returns (microseconds, setting), the fastest first. Raises `BadInput` while a graph
    is captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise BadInput("measure", "called", "must not run while a CUDA graph is captured")
    from kvlab.kernel.decode_triton import paged_decode, setting_key

    format = by_name(format) if isinstance(format, str) else format
    case = decode_case(format, shape, slots, rows, tokens)
    settings = [None, *(candidates(_most(format, slots)) if tried is None else tried)]
    times = [(_time(case, paged_decode, s, clock), s) for s in settings]
    times.sort(key=lambda pair: pair[0])
    if store and times[0][1]:
        name = device_name or tune.device_facts(torch.device(shape.device)).name
        key = setting_key(format, slots, shape.head_dim, shape.group)
        tune.store(name, key, list(times[0][1]))
    return times


def _most(format: KVFormat, slots: int) -> int:
    """Tokens that may share a tile: those of a block; where groups of tokens are made numbers in
    registers, those of a group. Groups of both sides that fold need not (`decode_triton.folds`)."""
    value = format.value.codec if isinstance(format.value, Rotated) else format.value
    sides = [codec for codec in (format.key, value) if isinstance(codec, Grouped)]
    axes = [codec.axis_of(slots) for codec in sides]
    if axes == ["channel", "token"]:
        return slots
    return min([slots, *(c.group for c, axis in zip(sides, axes) if axis == "channel")])


def _time(case: Decode, paged_decode: Callable, setting, clock: Callable) -> float:
    try:
        return clock(case.call(paged_decode, setting))
    except Exception as error:  # a tile too large for this device's shared memory or registers
        if "OutOfResources" not in type(error).__name__:
            raise
        return float("inf")


class Tune(Sweep):
    """Measure and store settings: formats x block sizes for one shape, on this device.

    formats, block_sizes: what to tune; kv_heads, group, head_dim: the model's attention; tokens,
    batch: what to tune it for. The standing choice has the setting null.
    """

    holds_nothing = True

    def __init__(
        self, formats: list[str], block_sizes: list[int], kv_heads: int = 8, group: int = 2,
        head_dim: int = 128, tokens: int = 200_000, batch: int = 1, device: str = "auto",
    ):
        self.formats, self.block_sizes = [by_name(f) for f in formats], block_sizes
        if not block_sizes or min(block_sizes) < 1 or tokens < max(block_sizes):
            raise BadInput("block_sizes", block_sizes, f"must lie between 1 and tokens = {tokens}")
        self.shape = Shape(kv_heads, group, head_dim)
        self.tokens, self.batch, self.device = tokens, batch, device

    def points(self, device: torch.device, variants) -> Iterator[Point]:
        needs_cuda(device, "tune")
        for format, slots in product(self.formats, self.block_sizes):
            params = {"format": format.name, "block_size": slots, "tokens": self.tokens,
                      "batch": self.batch}
            yield Point(f"{format.name} block {slots}", params, partial(self._all, format, slots))

    def _all(self, format: KVFormat, slots: int) -> Iterator[Batch]:
        for us, setting in measure(format, slots, self.shape, self.tokens, self.batch):
            told = {"setting": setting and list(setting)}
            yield Batch(told, [Measurement("decode_attention_us", us, "us", "lower")])
