"""Captured prefill chunks beside eager ones: tokens a second, bytes, logits, in one process.

    python experiments/token_eviction/captured.py --out OUT [--models smollm2 qwen] [--seconds 60]

Random weights in the models' shapes, fused layers, batch 1, chunks of 512, blocks of 16; a tenth of
the tokens stays but for `none`. `eager` and `fresh` fill a new cache each time (fresh: captured
chunks, recording included), `kept` the same cache again. Arms alternate, rows are medians. Rows go
to OUT/captured.jsonl as they come. Runs on the CPU, too (static chunks), for a look at whether it
runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from copy import deepcopy
from pathlib import Path

import torch
from count import axes, model
from phases import LAYERS, wait
from torch.profiler import ProfilerActivity, profile

from kvlab.cache import CacheSpec
from kvlab.model import PagedCache, prefill
from kvlab.model.fuse import fused
from kvlab.window import SinkWindow

TOKENS = {"smollm2": 8192, "qwen": 8192}
POLICIES = ("none", "snapkv", "window", "tova")


def spec_of(policy: str, tokens: int, given) -> CacheSpec:
    if policy == "window":
        window = SinkWindow(4, tokens // 10 - 4, middle=False)
        return CacheSpec(format=given.format, block_size=16, window=window, kernels=given.kernels)
    return CacheSpec(format=given.format, kernels=given.kernels,
                     **axes(None if policy == "none" else policy))  # fmt: skip


def timed(of, cache, ids, driver: str, chunk: int):
    wait(ids.device)
    started = time.perf_counter()
    found = prefill(of, ids, cache, chunk_tokens=chunk, driver=driver)
    wait(ids.device)
    return time.perf_counter() - started, found


def profiled(of, cache, ids, driver: str, chunk: int) -> dict:
    """Launches, device and wall milliseconds of a chunk, the mean over `ids`."""
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ids.is_cuda
    with profile(activities=kinds) as seen:
        seconds, _ = timed(of, cache, ids, driver, chunk)
    count = ids.shape[1] // chunk
    events = seen.events()
    there = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    waits = sum(e.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize") for e in events)
    kernels = [e for e in there if not e.name.startswith("Mem")]
    return {"kernels": len(kernels) / count, "host_waits": waits / count,
            "launches": sum("aunch" in e.name and e.name.startswith("cu") for e in events) / count,
            "device_ms": sum(e.time_range.elapsed_us() for e in there) / 1e3 / count,
            "wall_ms_profiled": seconds * 1e3 / count}


def arm(of, name: str, policy: str, ids, given, out) -> None:
    fast = "auto" if ids.is_cuda else "static"
    spec, took = spec_of(policy, ids.shape[1], given), {"eager": [], "fresh": [], "kept": []}
    chunk = given.chunk
    for driver in ("eager", fast):  # compiles
        timed(of, PagedCache.for_model(of, spec), ids[:, : 5 * chunk], driver, chunk)
    kept = PagedCache.for_model(of, spec)
    timed(of, kept, ids, fast, chunk)
    for _ in range(given.rounds):
        eager, fresh = (PagedCache.for_model(of, spec) for _ in range(2))
        seconds, want = timed(of, eager, ids, "eager", chunk)
        took["eager"].append(seconds)
        took["fresh"].append(timed(of, fresh, ids, fast, chunk)[0])
        kept.finish()
        seconds, got = timed(of, kept, ids, fast, chunk)
        took["kept"].append(seconds)
    a, b = eager.stats(), kept.stats()
    rate = {key: ids.shape[1] / statistics.median(x) for key, x in took.items()}
    row = {"model": name, "policy": policy, "tokens": ids.shape[1], "chunk": chunk, **rate,
           "seconds": took, "replayed": got.replayed, "why_eager": got.why_eager,
           "bytes": [a.logical_bytes, b.logical_bytes],
           "allocated": [a.allocated_bytes, b.allocated_bytes],
           "logits_of_eager": float((got.logits - want.logits).abs().max()),
           "largest_logit": float(want.logits.abs().max())}
    print(f"{name} {policy}: eager {rate['eager']:,.0f}, captured {rate['kept']:,.0f} tokens/s "
          f"(recording included {rate['fresh']:,.0f}), {got.replayed} replayed, "
          f"{got.why_eager or ''} logits apart {row['logits_of_eager']:.3f} of "
          f"{row['largest_logit']:.1f}, bytes {a.logical_bytes} {b.logical_bytes}", flush=True)
    write(out, row)
    for driver, cache in (("eager", eager), (fast, kept)):
        cache.finish()
        found = profiled(of, cache, ids[:, : 8 * chunk], driver, chunk)
        print(f"  {driver}: " + ", ".join(f"{k} {v:.1f}" for k, v in found.items()), flush=True)
        write(out, {"model": name, "policy": policy, "driver": driver, **found})


def distances(of, name: str, ids, given, out) -> None:
    """Of the logits after a short prompt, to the same computed in fp32 by plain torch."""
    exact_of = deepcopy(of).float()
    fast = "auto" if ids.is_cuda else "static"
    for policy in ("none", "window"):
        spec = spec_of(policy, ids.shape[1], given)
        logits = [prefill(of, ids, PagedCache.for_model(of, spec), chunk_tokens=given.chunk,
                          driver=driver).logits.float() for driver in ("eager", fast)]
        plain = CacheSpec(format="fp32", block_size=16, window=spec.window, kernels="torch")
        want = prefill(exact_of, ids, PagedCache.for_model(exact_of, plain),
                       chunk_tokens=given.chunk).logits
        apart = [float((x - want).abs().max()) for x in logits]
        print(f"{name} {policy}: largest distance to fp32: eager {apart[0]:.4f}, captured "
              f"{apart[1]:.4f}, of {float(want.abs().max()):.2f}", flush=True)
        write(out, {"model": name, "policy": policy, "to_fp32": apart})


def write(folder: Path, row: dict) -> None:
    with (folder / "captured.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + "\n")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--out", default="outputs/captured")
    asked.add_argument("--models", nargs="+", default=list(LAYERS))
    asked.add_argument("--policies", nargs="+", default=list(POLICIES))
    asked.add_argument("--layers", type=int)
    asked.add_argument("--tokens", type=int)
    asked.add_argument("--chunk", type=int, default=512)
    asked.add_argument("--distances", action="store_true", help="to fp32, of a short prompt")
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--seconds", type=float, default=60, help="no arm begins after these")
    asked.add_argument("--format", default="bf16")
    asked.add_argument("--kernels", default="auto")
    given = asked.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out, started = Path(given.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        with device:
            of = model(name, given.layers or LAYERS[name]).to(torch.bfloat16)
        ids = torch.randint(512, (1, given.tokens or TOKENS[name]), device=device)
        short = ids[:, : 4 * given.chunk]
        jobs = [(distances, (of, name, short, given, out))] * given.distances
        jobs[:0] = [(arm, (of, name, p, ids, given, out)) for p in given.policies]
        for job, of_it in jobs:
            if time.perf_counter() - started > given.seconds:
                print("out of time before", name, job.__name__, flush=True)
                continue
            try:
                with fused(of), torch.inference_mode():
                    job(*of_it)
            except Exception as error:  # the others shall run
                print(f"{name} {job.__name__}: {error!r}", flush=True)


if __name__ == "__main__":
    main()
