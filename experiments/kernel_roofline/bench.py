"""Time the kernels and their peers in one run, against the measured copy ceiling.

    python experiments/kernel_roofline/bench.py --out results.jsonl [--sweep] [--store]

--sweep tries several launch settings per format and shape; --store keeps the fastest in the user's
table (kvlab.kernel.tune). FlashInfer is measured where it is installed. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvlab.core import CacheGeometry
from kvlab.format import Dense, KVFormat, by_name
from kvlab.kernel import tune
from kvlab.kernel.decode_triton import paged_decode
from kvlab.kernel.gather_triton import gather
from kvlab.kernel.merge_triton import merge_into
from kvlab.kernel.seal_triton import append, seal
from kvlab.pool import SlabStore

try:
    import flashinfer
except ImportError:
    flashinfer = None

HEADS, GROUP, DIM = 8, 2, 128  # Qwen3-0.6B, one layer
SHAPES = [(1, 4096), (1, 32_768), (1, 200_000), (16, 32_768), (64, 8192)]
CASES = [("bf16", 16), ("bf16", 64), ("fp8", 16), ("fp8", 64), ("fp8", 128), ("int8", 32),
         ("int8", 64), ("int8", 128), ("int4", 32), ("int4", 64), ("int4", 128), ("k8v4", 128),
         ("int3", 128), ("int2", 128)]
SWEEP = {  # block size -> (tile, warps, stages, programs per multiprocessor)
    16: [(64, 4, 3, 3), (128, 4, 3, 2), (128, 4, 3, 3), (32, 1, 3, 12)],
    32: [(32, 1, 3, 8), (32, 1, 3, 12), (32, 2, 3, 8)],
    64: [(64, 4, 3, 3), (64, 4, 3, 4), (64, 4, 3, 6), (64, 2, 3, 4), (64, 2, 3, 6)],
    128: [(128, 4, 3, 2), (128, 4, 3, 3), (128, 4, 3, 4), (128, 4, 3, 5), (128, 4, 2, 3),
          (128, 4, 2, 4), (128, 2, 3, 6)],
}


def microseconds(call, count: int = 21) -> float:
    """Median time of replaying `call` as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return timed(graph.replay, count)


def timed(call, count: int = 21) -> float:
    """Median time between events around `call`."""
    times = []
    for _ in range(count + 3):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return median(times[3:])


def replayed(call) -> float:
    """As `microseconds`; a library whose call cannot be captured is timed around the call."""
    try:
        return microseconds(call)
    except RuntimeError:
        torch.cuda.synchronize()
        return timed(call)


def noise(view: torch.Tensor, name: str) -> None:
    """Random stored values: bytes for codes, small positive scales, no NaN."""
    if name.endswith(("scale", "zero")):
        view.copy_(torch.rand(view.shape, device=view.device) * 0.01 + 0.001)
    elif view.dtype == torch.uint8:
        view.random_(0, 256)
    else:
        view.copy_((100 * torch.randn(view.shape, device=view.device)).clamp(-448, 448))


def filled(format: KVFormat, slots: int, blocks: int) -> SlabStore:
    geometry = CacheGeometry(1, HEADS * GROUP, HEADS, DIM, slots)
    store = SlabStore(format.planes(geometry), 1, max(1, 1024 // slots), "cuda")
    store.commit(list(range(blocks)))
    for block in range(blocks):
        if block % store.slab_rows == 0:  # a row's view spans its slab: fill whole slabs at once
            for name, view in store._views[block // store.slab_rows].items():
                noise(view, name)
    return store


def decode_call(store: SlabStore, format: KVFormat, tail: SlabStore, rows: int, blocks: int,
                setting=None):
    """A closure over one layer's decode attention on a random block table."""
    q = torch.randn(rows, HEADS * GROUP, DIM, device="cuda").bfloat16()
    table = torch.randperm(rows * blocks, device="cuda").int().view(rows, blocks)
    counts, slot, tail_len = (
        torch.full((rows,), n, dtype=torch.int32, device="cuda") for n in (blocks, 0, 5)
    )
    planes, open_planes = store.layer(0), tail.layer(0)
    return lambda: paged_decode(
        q, planes, format, table, counts, open_planes, slot, tail_len, scale=DIM**-0.5,
        setting=setting,
    )


def decode_rows(report, args) -> None:
    for name, slots in CASES:
        format = by_name(name)
        for rows, tokens in SHAPES:
            blocks = tokens // slots
            store, tail = filled(format, slots, rows * blocks), filled(by_name("bf16"), slots, 1)
            size = rows * blocks * sum(p.nbytes for p in store.planes.values())
            best = None
            for setting in [None, *(SWEEP[slots] if args.sweep else [])]:
                us = microseconds(decode_call(store, format, tail, rows, blocks, setting))
                report(what="decode", peer="kvlab", format=name, block_size=slots, rows=rows,
                       tokens=tokens, us=us, bytes=size, setting=setting)
                best = min(best or (us, setting), (us, setting), key=lambda x: x[0])
            if args.store and best[1] and (rows, tokens) == (1, 200_000):
                key = f"decode {format.identity} S{slots} D{DIM} G{GROUP}"
                tune.store(torch.cuda.get_device_name(), key, list(best[1]))
            del store
            torch.cuda.empty_cache()


def dense_attention(rows: int, tokens: int, backend) -> tuple[float, int]:
    """Microseconds and bytes of torch's own attention, one query token."""
    q = torch.randn(rows, HEADS * GROUP, 1, DIM, device="cuda").bfloat16()
    k, v = (torch.randn(rows, HEADS, tokens, DIM, device="cuda", dtype=torch.bfloat16)
            for _ in range(2))
    with sdpa_kernel(backend):
        call = partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
        return replayed(call), 2 * k.nbytes


def sdpa_rows(report) -> None:
    for rows, tokens in SHAPES:
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            us, size = dense_attention(rows, tokens, backend)
            report(what="decode", peer=backend.name.lower(), format="bf16", rows=rows,
                   tokens=tokens, us=us, bytes=size)
            torch.cuda.empty_cache()


def flashinfer_paged(rows: int, tokens: int, dtype, page: int = 16) -> tuple[float, int]:
    """Microseconds and bytes of FlashInfer's paged decode on random pages."""
    pages = rows * (tokens // page)
    kv = torch.randn(pages, 2, page, HEADS, DIM, device="cuda", dtype=torch.bfloat16).to(dtype)
    work = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "NHD", use_tensor_cores=True)
    starts = torch.arange(0, pages + 1, tokens // page, dtype=torch.int32, device="cuda")
    last = torch.full((rows,), page, dtype=torch.int32, device="cuda")
    wrapper.plan(
        starts, torch.randperm(pages, device="cuda").int(), last, HEADS * GROUP, HEADS, DIM, page,
        q_data_type=torch.bfloat16, kv_data_type=dtype,
    )
    q = torch.randn(rows, HEADS * GROUP, DIM, device="cuda", dtype=torch.bfloat16)
    return replayed(partial(wrapper.run, q, kv)), kv.nbytes


def flashinfer_rows(report) -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn) if flashinfer else ():
        for rows, tokens in SHAPES:
            us, size = flashinfer_paged(rows, tokens, dtype)
            report(what="decode", peer="flashinfer", format=str(dtype)[6:], block_size=16,
                   rows=rows, tokens=tokens, us=us, bytes=size)
            torch.cuda.empty_cache()


def workspace_rows(report, tokens: int = 16_384, sets: int = 4) -> None:
    """Gather and seal, rotating among `sets` lists of blocks so that nothing stays in the cache."""
    for name, slots in CASES:
        format, store = by_name(name), filled(by_name(name), slots, 8 * tokens // slots)
        planes, count = store.layer(0), tokens // slots
        lists = [torch.randperm(8 * count, device="cuda")[:count] for _ in range(sets)]
        pairs = [[torch.randn(tokens, HEADS, DIM, device="cuda").bfloat16() for _ in range(2)]
                 for _ in range(sets)]
        size = count * sum(p.nbytes for p in store.planes.values()) + 4 * tokens * HEADS * DIM

        gathers = [partial(gather, planes, format, ids, *pair) for ids, pair in zip(lists, pairs)]
        seals = [partial(seal, *pair, format, planes, ids) for ids, pair in zip(lists, pairs)]
        for what, calls in (("gather", gathers), ("seal", seals)):
            us = microseconds(partial(one_after_another, calls)) / sets
            report(what=what, format=name, block_size=slots, tokens=tokens, us=us, bytes=size)


def one_after_another(calls) -> None:
    for call in calls:
        call()


def copy_ceiling() -> float:
    """GB/s of a device copy, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(partial(target.copy_, source)) / 1e3


def small_rows(report) -> None:
    out, lse = torch.randn(16, 4096, 128, device="cuda"), torch.randn(16, 4096, device="cuda")
    part = torch.randn(4096, 16, 128, device="cuda").bfloat16().transpose(0, 1)
    us = microseconds(lambda: merge_into(out, lse, part, lse.clone()))
    report(what="merge", tokens=4096, us=us, bytes=2 * out.nbytes + part.nbytes)
    tail = filled(KVFormat(Dense(), Dense()), 64, 64)
    slots, lens = (torch.arange(64, dtype=torch.int32, device="cuda") for _ in range(2))
    k = torch.randn(64, HEADS, DIM, device="cuda").bfloat16()
    us = microseconds(lambda: append(k, k, tail.layer(0), slots, lens % 64))
    report(what="append", rows=64, us=us, bytes=4 * k.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--store", action="store_true")
    args = parser.parse_args()
    ceiling = copy_ceiling()
    with open(args.out, "a") as file:
        def report(**row):
            if "bytes" in row:
                row["gigabytes_per_second"] = round(row["bytes"] / row["us"] / 1e3, 1)
                row["percent_of_copy"] = round(100 * row["gigabytes_per_second"] / ceiling, 1)
            file.write(json.dumps({"device": torch.cuda.get_device_name(), **row}) + "\n")
            file.flush()

        report(what="copy", gigabytes_per_second=round(ceiling, 1))
        sdpa_rows(report)
        flashinfer_rows(report)
        decode_rows(report, args)
        workspace_rows(report)
        small_rows(report)


if __name__ == "__main__":
    main()
