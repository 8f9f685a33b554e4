"""Captured serving beside the library's forward on a few requests: same tokens, and how fast.

    python experiments/serving/smoke.py            # a CUDA device, about 40 s
    python experiments/serving/smoke.py --tiny     # anywhere, seconds; steps are not captured

Exact part: fp32, four layers, blocks of 16, prefixes shared, users who leave, a budget that
preempts; outputs must be equal. Margin part: bf16, all layers; the logit of each output token may
lie `TOLERANCE` below the best of a cold run.
"""

from __future__ import annotations

import argparse
import time

import torch

from kvlab.cache import CacheSpec
from kvlab.eval.load import Load
from kvlab.model import PagedCache
from kvlab.model.load import RandomModel
from kvlab.serve import Limits, Loop, TraceRequests, WallClock, with_cancellations
from kvlab.sim import load_trace

TOLERANCE = 0.05
TINY = {"hidden_size": 64, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 32,
        "mlp_size": 64, "vocabulary": 8192}  # fmt: skip


def say(*words) -> None:
    print(f"[{time.perf_counter() - BEGAN:6.1f}]", *words, flush=True)


def served(loaded, requests, spec, limits, driver):
    """What became of the requests, all of which come at once; the cache is checked."""
    cache = PagedCache.for_model(loaded.model, spec)
    loop = Loop(loaded, cache, limits, WallClock(), driver=driver)
    began = time.perf_counter()
    found = loop.run([r._replace(arrival_ms=0.0) for r in requests])
    wall, ran = time.perf_counter() - began, loop.clock.now_ms / 1e3
    cache.check()
    cache.drop_prefixes()
    assert not cache.groups[0].ledger.held_count, "blocks are left"
    lanes = getattr(loop.engine, "lanes", None)
    tokens = sum(len(s.output) for s in found)
    say(f"  {driver}: {tokens} tokens in {ran:.2f} s ({tokens / ran:.0f}/s), {wall - ran:.2f} s "
        f"before; {loop.steps} steps, {lanes and lanes.captures} captures, "
        f"{sum(s.preemptions for s in found)} preemptions, why eager: {loop.why_eager}")
    return found


def exact(device, requests, shape) -> None:
    say("exact: fp32")
    loaded = RandomModel(**shape).load(device, torch.float32)
    longest = max(len(r.prompt) + r.output_tokens for r in requests)
    spec = CacheSpec(format="fp32", block_size=16, policy="lru", prefix="hash",
                     budget_blocks=2 * -(-longest // 16))  # fmt: skip
    limits = Limits(running=6, chunk_tokens=1024, reserve=False)
    leaving = with_cancellations(requests, 0.3, 1)
    drivers = "eager", "auto"
    one, other = ([(s.state, s.output) for s in served(loaded, leaving, spec, limits, driver)]
                  for driver in drivers)  # fmt: skip
    whole = [(a[1], b[1]) for a, b in zip(one, other) if a[0] == b[0] == "done"]
    both = [(a[1], b[1]) for a, b in zip(one, other)]
    alike = sum(all(x == y for x, y in zip(*pair)) for pair in both)
    say(f"  done in both {len(whole)}, of them equal {sum(a == b for a, b in whole)}; "
        f"one a beginning of the other {alike} of {len(one)}")


def margin(loaded, requests, running: int, chunk: int, check: int, **axes) -> None:
    spec = CacheSpec(format="bf16", block_size=64, **axes)
    say("bf16", axes, f"{len(requests)} requests, {running} at a time, chunks of {chunk}")
    found = served(loaded, requests, spec, Limits(running=running, chunk_tokens=chunk), "auto")
    first = sorted(s.first_ms for s in found)
    say(f"  first tokens: median {first[len(first) // 2]:.0f} ms, last {first[-1]:.0f} ms")
    if check:
        job = Load(RandomModel(), None, CacheSpec(format="bf16", block_size=64, prefix="hash",
                                                  policy="lru", budget_blocks=8))  # fmt: skip
        job.spec = spec
        pairs = list(zip(found, requests))[:check]
        gaps = [gap for s, r in pairs for gap in job._gaps(loaded, r.prompt, s)]
        say(f"  gaps over {len(gaps)} tokens: largest {max(gaps):.4f}, wrong "
            f"{sum(g > TOLERANCE for g in gaps)}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    device = torch.device("cpu" if tiny or not torch.cuda.is_available() else "cuda")
    trace = load_trace("conversation")
    of = {"block_tokens": 2 if tiny else 64}
    few = TraceRequests(trace, 16, output_tokens=8 if tiny else 24, **of).make(None, 8192)
    say(f"{len(few)} requests, {sum(len(r.prompt) for r in few)} prompt tokens")
    exact(device, few, TINY if tiny else {"layers": 4})
    loaded = RandomModel(**(TINY if tiny else {})).load(device)
    say("loaded")
    margin(loaded, few, 16, 8192, 6)
    margin(loaded, few, 16, 8192, 6, prefix="hash")
    count, output = (6, 8) if tiny else (96, 64)
    many = TraceRequests(trace, count, output_tokens=output, **of).make(None, 8192)
    for chunk in (4096, 8192, 16384):
        margin(loaded, many, 64, chunk, 0)
    margin(loaded, many, 64, 8192, 0, prefix="hash")
    if device.type == "cuda":
        profile(loaded, many)


def profile(loaded, requests) -> None:
    """Where the host's time goes in one run."""
    import cProfile
    import pstats

    spec = CacheSpec(format="bf16", block_size=64)
    cache = PagedCache.for_model(loaded.model, spec)
    loop = Loop(loaded, cache, Limits(running=64, chunk_tokens=8192), WallClock())
    profiler = cProfile.Profile()
    profiler.runcall(loop.run, [r._replace(arrival_ms=0.0) for r in requests])
    for order in ("cumulative", "tottime"):
        pstats.Stats(profiler).strip_dirs().sort_stats(order).print_stats(45)


BEGAN = time.perf_counter()
if __name__ == "__main__":
    main()
