"""How close the kernels come to the memory they read, beside their peers, in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from kvlab.core import BadInput, Measurement
from kvlab.eval.clock import copy_ceiling, replayed, timed
from kvlab.eval.kernel_peers import decode_peers, prefill_peers
from kvlab.eval.kernels import (
    Shape,
    causal_flops,
    decode_case,
    open_store,
    prefill_call,
    random_store,
)
from kvlab.eval.sweep import Point, Sweep, needs_cuda
from kvlab.format import by_name
from kvlab.pool import fused_kernels

SETS = 4  # lists of blocks that gather and seal take in turn, so that nothing stays in the cache


class KernelRoofline(Sweep):
    """Times every kernel on random values against the measured rate of a copy.

    formats: name -> block sizes. decode: [batch, tokens] of each decode attention. prefill: [new
    tokens, tokens of the past] or None; prefill_formats: those it is measured for. segment_tokens:
    of gather, seal and prefill. peers: whether others' kernels are measured too; FlashInfer is
    where it is installed. layers: that `seal_open` seals at once. kv_heads, group, head_dim: the
    model's attention.
    """

    def __init__(
        self, formats: dict[str, list[int]], decode: list[list[int]],
        prefill: list[int] | None = None, prefill_formats: list[str] = (),
        segment_tokens: int = 16_384, layers: int = 28, peers: bool = True, kv_heads: int = 8,
        group: int = 2, head_dim: int = 128, device: str = "auto",
    ):
        for name in (*formats, *prefill_formats):
            by_name(name)
        sizes = [size for every in formats.values() for size in every]
        if not sizes or min(sizes) < 1 or segment_tokens % max(sizes):
            raise BadInput("formats", formats, "names formats with block sizes that divide "
                           f"segment_tokens = {segment_tokens}")
        if any(len(pair) != 2 or min(pair) < 1 for pair in decode):
            raise BadInput("decode", decode, "must hold pairs of batch and tokens")
        self.formats, self.decode, self.prefill = formats, decode, prefill
        self.prefill_formats, self.segment, self.layers = prefill_formats, segment_tokens, layers
        self.peers, self.device, self.shape = peers, device, Shape(kv_heads, group, head_dim)

    def points(self, device: torch.device, variants) -> Iterator[Point]:
        needs_cuda(device, "kernel_roofline")
        self.kernels, self.ceiling = fused_kernels("cuda", "triton"), copy_ceiling(device)
        rate = Measurement("copy_gigabytes_per_second", self.ceiling / 1e9, "GB/s", "higher")
        yield Point("device", {}, lambda: [rate])
        for part in (self._decode, self._moves, self._small, self._prefill):
            yield from map(Point._make, part())

    def _decode(self) -> Iterator:
        for batch, tokens in self.decode:
            place = {"kernel": "decode", "batch": batch, "tokens": tokens}
            for peer, kind, call, size in decode_peers(self.shape, batch, tokens) if self.peers \
                    else ():
                yield (f"{peer} {kind}", place | {"peer": peer, "format": kind},
                       partial(self._rate, "decode_attention_us", call, size))
                del call
            for name, sizes in self.formats.items():
                for slots in sizes:
                    yield (f"{name} block {slots}", place | {"format": name, "block_size": slots},
                           partial(self._decode_rate, name, slots, batch, tokens))

    def _decode_rate(self, name: str, slots: int, batch: int, tokens: int) -> Iterator:
        case = decode_case(by_name(name), self.shape, slots, batch, tokens)
        yield from self._rate("decode_attention_us", case.call(self.kernels.paged_decode),
                              case.nbytes)

    def _moves(self) -> Iterator:
        for name, sizes in self.formats.items():
            for slots in sizes:
                for kernel in ("gather", "seal"):
                    params = {"kernel": kernel, "format": name, "block_size": slots,
                              "tokens": self.segment}
                    yield (f"{name} block {slots}", params,
                           partial(self._move_rate, kernel, name, slots))
                params = {"kernel": "seal_open", "format": name, "block_size": slots,
                          "layers": self.layers}
                yield f"{name} block {slots}", params, partial(self._seal_open_rate, name, slots)

    def _move_rate(self, kernel: str, name: str, slots: int) -> Iterator:
        """Of a segment, from blocks (gather) or into them (seal)."""
        format, count = by_name(name), self.segment // slots
        store = random_store(format, self.shape, slots, 2 * SETS * count)
        order = torch.randperm(2 * SETS * count, device="cuda").split(count)[:SETS]
        heads, planes, calls = self.shape.kv_heads, store.layer(0), []
        for ids in order:
            pair = [self.shape.random(self.segment, heads=heads) for _ in range(2)]
            if kernel == "gather":
                calls.append(partial(self.kernels.gather, planes, format, ids, *pair))
            else:
                calls.append(partial(self.kernels.seal, *pair, format, planes, ids))
        size = count * sum(p.nbytes for p in store.planes.values()) + 2 * pair[0].nbytes
        yield from self._rate(f"{kernel}_us", partial(_all, calls), size, SETS)

    def _seal_open_rate(self, name: str, slots: int) -> Iterator:
        """Of one full open block in all layers, into a sealed one."""
        format, shape, layers = by_name(name), self.shape, self.layers
        store, tail = random_store(format, shape, slots, 8, layers), open_store(shape, slots, 8,
                                                                                layers)
        ids = torch.tensor([3], device="cuda")
        call = partial(self.kernels.seal_open, tail.layer(0), store.layer(0), format, ids, ids,
                       layers)
        size = sum(p.nbytes for s in (store, tail) for p in s.planes.values()) * layers
        yield from self._rate("seal_open_us", call, size)

    def _small(self) -> Iterator:
        shape, heads = self.shape, self.shape.kv_heads * self.shape.group
        out = torch.randn(heads, 4096, shape.head_dim, device="cuda")
        lse, part = out[..., 0].contiguous(), shape.random(4096, heads=heads).transpose(0, 1)
        call = partial(self.kernels.merge_into, out, lse, part, lse.clone())
        size = 2 * out.nbytes + part.nbytes
        yield "merge", {"kernel": "merge", "tokens": 4096}, partial(
            self._rate, "merge_us", call, size)
        tail, k = open_store(shape, 64, 64), shape.random(64, heads=shape.kv_heads)
        slots, lens = (torch.arange(64, dtype=torch.int32, device="cuda") for _ in range(2))
        call = partial(self.kernels.append, k, k, tail.layer(0), slots, lens)
        yield "append", {"kernel": "append", "batch": 64}, partial(
            self._rate, "append_us", call, 4 * k.nbytes)

    def _prefill(self) -> Iterator:
        if self.prefill is None:
            return
        tokens, past = self.prefill
        place = {"kernel": "prefill", "tokens": tokens, "past": past}
        for name in self.prefill_formats:
            slots = max(self.formats.get(name, [64]))
            call = partial(prefill_call, self.kernels, by_name(name), self.shape, slots, tokens,
                           past, self.segment)
            params = {"format": name, "block_size": slots, "segment_tokens": self.segment}
            yield (f"{name} block {slots}", place | params,
                   lambda call=call: self._products(call()))
        for peer, kind, call, _ in prefill_peers(self.shape, tokens, past) if self.peers else ():
            yield (f"{peer} {kind}", place | {"peer": peer, "format": kind},
                   partial(self._products, call))

    def _products(self, call: Callable) -> Iterator[Measurement]:
        tokens, past = self.prefill
        heads = self.shape.kv_heads * self.shape.group
        us = timed(call, 7)
        flops = causal_flops(heads, self.shape.head_dim, tokens, past)
        yield Measurement("prefill_attention_ms", us / 1e3, "ms", "lower")
        yield Measurement("teraflops_per_second", flops / us / 1e6, "TFLOP/s", "higher")

    def _rate(self, name: str, call: Callable, size: int, times: int = 1) -> Iterator[Measurement]:
        """Of a call that moves `size` bytes, `times` times over."""
        us = replayed(call) / times
        yield Measurement(name, us, "us", "lower")
        yield Measurement("moved_bytes", size, "B", "lower")
        yield Measurement("gigabytes_per_second", size / us / 1e3, "GB/s", "higher")
        percent = 1e8 * size / us / self.ceiling
        yield Measurement("percent_of_copy", percent, "%", "higher")


def _all(calls: list[Callable]) -> None:
    for call in calls:
        call()
