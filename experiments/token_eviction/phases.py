"""Where the time of a prompt goes while tokens are chosen: wall, host, device and launches.

    python experiments/token_eviction/phases.py --out OUT [--model smollm2|qwen] [--tokens 8192]
        [--chunks 512 4096] [--policies none snapkv ...] [--format bf16]

Random weights in the shapes of SmolLM2-135M or Qwen2.5-Coder-0.5B, fused layers, batch 1. Each arm
fills a cache once to compile, then `--rounds` times; the median is the row. After that the last
chunk runs once more under torch's profiler (launches, device time) and under cProfile (host). Rows
are written to OUT/rows.jsonl as they come, profiles to OUT/profiles.txt. Runs on the CPU, too, for
a look at whether it runs.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import time
from pathlib import Path

import torch
from count import POLICIES, axes, model
from torch.profiler import ProfilerActivity, profile

from kvlab.cache import CacheSpec
from kvlab.model import PagedCache, prefill
from kvlab.model.fuse import fused
from kvlab.model.prefill import forward_chunk

LAYERS = {"smollm2": 30, "qwen": 24}


def wait(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def filled(of, spec: CacheSpec, ids, chunk: int) -> tuple[PagedCache, float]:
    """A cache with `ids`, and the seconds that it took."""
    cache = PagedCache.for_model(of, spec)
    wait(ids.device)
    started = time.perf_counter()
    prefill(of, ids, cache, chunk_tokens=chunk, driver="eager")
    wait(ids.device)
    return cache, time.perf_counter() - started


def last_chunk(of, cache: PagedCache, ids, chunk: int, out) -> dict:
    """Launches, device and host milliseconds of one more chunk; its profiles go to `out`."""
    device, more = ids.device, ids[:, :chunk]
    for _ in range(2):  # warm: shapes like those that are timed
        forward_chunk(of, more, cache, last=True)
    wait(device)
    started = time.perf_counter()
    forward_chunk(of, more, cache, last=True)
    host = time.perf_counter() - started  # the device may still be at it
    wait(device)
    whole = time.perf_counter() - started
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=kinds) as torchs:
        forward_chunk(of, more, cache, last=True)
        wait(device)
    events = [e for e in torchs.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    pythons = cProfile.Profile()
    pythons.enable()
    forward_chunk(of, more, cache, last=True)
    pythons.disable()
    wait(device)
    text = io.StringIO()
    pstats.Stats(pythons, stream=text).sort_stats("tottime").print_stats(28)
    on = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    try:
        table = torchs.key_averages().table(sort_by=on, row_limit=22, max_name_column_width=60)
    except Exception as error:  # a column's name may differ between versions
        table = str(error)
    out.write(f"{table}\n{text.getvalue()}\n")
    out.flush()
    return {"host_ms": host * 1e3, "chunk_ms": whole * 1e3, "launches": len(events),
            "device_ms": sum(e.time_range.elapsed_us() for e in events) / 1e3}


def arm(of, name: str, given, chunk: int, ids, out) -> dict:
    spec = CacheSpec(**axes(None if name == "none" else name, given.percent),
                     format=given.format)  # fmt: skip
    filled(of, spec, ids[:, : 2 * chunk + 100], chunk)[0].reset()
    took = []
    for _ in range(given.rounds):
        cache, seconds = filled(of, spec, ids, chunk)
        took.append(seconds)
        stats = cache.stats()
        if len(took) < given.rounds:
            cache.reset()
    seconds, tokens = statistics.median(took), ids.shape[1]
    row = {"model": given.model, "tokens": tokens, "chunk": chunk, "policy": name,
           "seconds": seconds, "tokens_per_second": tokens / seconds, "spread": took,
           "allocated_of_logical": stats.allocated_bytes / max(1, stats.logical_bytes)}
    out.write(f"\n==== {given.model} {tokens} chunk {chunk} {name}\n")
    return row | last_chunk(of, cache, ids, chunk, out)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--out", default="outputs/phases")
    asked.add_argument("--model", default="smollm2", choices=tuple(LAYERS))
    asked.add_argument("--layers", type=int)
    asked.add_argument("--tokens", type=int, default=8192)
    asked.add_argument("--chunks", type=int, nargs="+", default=[512, 4096])
    asked.add_argument("--policies", nargs="+", default=[p or "none" for p in POLICIES])
    asked.add_argument("--percent", type=float, default=10)
    asked.add_argument("--format", default="bf16")
    asked.add_argument("--rounds", type=int, default=3)
    given = asked.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    with device:
        of = model(given.model, given.layers or LAYERS[given.model]).to(torch.bfloat16)
    ids = torch.randint(512, (1, given.tokens), device=device)
    with (folder / "profiles.txt").open("a") as out, fused(of), torch.inference_mode():
        for chunk in given.chunks:
            plain = None
            for name in given.policies:
                try:
                    row = arm(of, name, given, chunk, ids, out)
                except Exception as error:  # the others shall run
                    print(f"{given.model} chunk {chunk} {name}: {error!r}", flush=True)
                    continue
                plain = row["seconds"] if name == "none" else plain
                row["times_plain"] = row["seconds"] / plain if plain else None
                with (folder / "rows.jsonl").open("a") as rows:
                    rows.write(json.dumps(row) + "\n")
                print(f"{given.model} {given.tokens} chunk {chunk} {name}: "
                      f"{row['tokens_per_second']:,.0f} tokens/s, x{row['times_plain'] or 0:.2f}, "
                      f"alloc/logical {row['allocated_of_logical']:.3f}; last chunk: host "
                      f"{row['host_ms']:.2f} ms, whole {row['chunk_ms']:.2f} ms, device "
                      f"{row['device_ms']:.2f} ms, {row['launches']} launches", flush=True)


if __name__ == "__main__":
    main()
