"""Random compositions of all axes on a tiny model, every account checked on the way.

    PYTHONPATH=. python tests/stress.py [--count 200] [--tokens 2000] [--seed 0]

Each composition draws a member and settings for every axis, then sends tokens in chunks and one at
a time, crops, and reorders rows. What may happen: a refusal before anything is built (drawn again),
or a budget too small for a step, which has to leave everything as it was. What may not: a
disagreement of ledger, tables and pool, bytes that do not add up, logits that are not finite,
anything left behind at the end.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib import import_module

import torch
from members import live

from kvlab import axes
from kvlab import format as formats
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, KvlabError, OutOfBlocks
from kvlab.model import PagedCache, model_geometry
from kvlab.model.prefill import forward_chunk
from kvlab.offload import HostStore, NoOffload, OutOfHost
from kvlab.window import NoWindow, SinkWindow

VOCABULARY = 128
SUMMARIZERS = [n for n in axes.names("summary") if axes.find("summary", n).makes]

TOKENS = [{"evict": "token", "groups": groups} for groups in ("all", "per_layer", "per_head")]


def draw(rng: random.Random) -> dict:
    """Settings of one composition, many of which make no sense together."""
    chunk, size = rng.choice((3, 16, 33, 64, 128)), rng.choice((1, 2, 4, 7, 16, 32, 64))
    sinks, recent = rng.choice((0, 1, 4, 20)), rng.choice((1, 8, 40, 100))
    need = -(-chunk // size) + -(-sinks // size) + -(-recent // size) + 4
    budget = rng.choice(({}, {"budget_percent": rng.choice((3.0, 20.0, 50.0, 100.0))},
                         {"budget_blocks": 2 * rng.randint(need, 3 * need)},
                         {"budget_bytes": rng.choice((20_000, 200_000, 1 << 22))}))  # fmt: skip
    policy = rng.choice(live())
    if rng.random() < 0.25:
        policy, budget = "none", {}
    return {
        "format": draw_format(rng), "block_size": size, **budget, "policy": policy,
        "window": draw_window(rng, sinks, recent), "summary": draw_summary(rng),
        "retrieval": draw_retrieval(rng), "offload": draw_offload(rng),
        **rng.choice(({}, {}, {"groups": "per_layer"}, *TOKENS)),
        "workspace_tokens": rng.choice((8, 100, 16384)), "chunk": chunk,
    }  # fmt: skip


def draw_format(rng):
    name = rng.choice(formats.NAMES)
    found = formats.by_name(name)
    scaled = found.key.scaled or found.value.scaled
    return formats.by_name(name, sinks=rng.choice((0, 0, 1, 4))) if scaled else found


def draw_window(rng, sinks: int, recent: int):
    kind = rng.choice(("none", "middle", "bare", "rerotate"))
    if kind == "none":
        return NoWindow()
    return SinkWindow(sinks, recent, middle=kind == "middle", rerotate=kind == "rerotate")


def draw_summary(rng):
    name = rng.choice(["none", "none", *SUMMARIZERS])
    if name == "none":
        return axes.by_name("summary", name)
    ratio, most = rng.choice((0.02, 0.1)), rng.choice((None, 2, 30))
    return axes.by_name("summary", name, ratio=ratio, max_entries=most)


def draw_retrieval(rng):
    name = rng.choice(["none", *axes.names("retrieval")])
    if name == "none":
        return axes.by_name("retrieval", name)
    return axes.by_name(
        "retrieval", name, budget_tokens=rng.choice((80, 300)),
        sinks=rng.choice((0, 4)), recent=rng.choice((0, 16)),
        group=rng.choice(("max", "sum")), per_head=rng.random() < 0.5,
        digests=rng.choice(("bf16", "fp8", "fp32")),
    )  # fmt: skip


def draw_offload(rng):
    if rng.random() < 0.5:
        return NoOffload()
    return HostStore(cap_gb=rng.choice((None, 0.05, 1e-4)), slab_tokens=rng.choice((64, 256)))


def composed(rng: random.Random, model) -> tuple[dict, CacheSpec, int]:
    """The first draw that is not refused, its spec, and how many were refused before it."""
    refused = 0
    while True:
        settings = draw(rng)
        try:
            spec = CacheSpec(**{k: v for k, v in settings.items() if k != "chunk"})
            spec.checked_for(model_geometry(model, spec))
            return settings, spec, refused
        except BadInput:
            refused += 1


def storages(cache: PagedCache) -> int:
    """Device bytes counted from the storages, not from the cache's own arithmetic."""
    stores = [s for g in cache.groups
              for s in (g.pool.sealed, g.pool.open, g.pool.apart.store)]
    stores += [g.sources.digests.store for g in cache.groups if cache.spec.retrieval.selects]
    slabs = [t for s in stores for t in s.slabs.values()]
    slabs += [s._base for s in stores if s._base is not None]
    stories = [s for g in cache.groups for s in g.summaries.stories.values()]
    parts = [entries for s in stories for entries in s.entries.values()]
    told = {x.data_ptr(): x.nbytes for part in parts for x in part}
    if cache.spec.by_token:
        parts = [x for g in cache.groups for x in (g.watch.standings.of, g.watch.standings.tails)]
        scores = [x for part in parts for s in part.values()
                  for x in (s.score, s.steps)]
        told |= {x.data_ptr(): x.untyped_storage().nbytes() for x in scores if x.numel()}
    return sum(t.untyped_storage().nbytes() for t in slabs) + sum(told.values())


def check(cache: PagedCache, rows: int, forked: bool) -> None:
    """Raises AssertionError or KvlabError where an account does not add up.

    forked: rows share blocks, which count once.
    """
    cache.check()
    stats = cache.stats()
    assert stats.tokens == rows * cache.get_seq_length()
    assert stats.allocated_bytes == storages(cache), "bytes on the device"
    assert 0 <= stats.logical_bytes <= stats.allocated_bytes
    assert stats.resident_tokens <= stats.tokens
    if not stats.evictions and not forked:
        assert stats.resident_tokens == stats.tokens


def step(model, cache: PagedCache, ids: torch.Tensor) -> bool:
    """One forward; False where it found no room and so must have changed nothing."""
    before = cache.get_seq_length()
    try:
        logits = forward_chunk(model, ids, cache)
    except (OutOfBlocks, OutOfHost):
        cache.abort()
        assert cache.get_seq_length() == before
        return False
    assert torch.isfinite(logits).all(), "logits are not finite"
    assert cache.get_seq_length() == before + ids.shape[1]
    return True


def crop(rng: random.Random, cache: PagedCache) -> None:
    """Forget some of the last tokens; refused where what would be cut was evicted."""
    count = rng.randint(1, min(40, cache.get_seq_length()))
    try:
        cache.crop(-count)
    except KvlabError:
        cache.check()


def run_one(model, rng: random.Random, settings: dict, spec: CacheSpec, tokens: int) -> str:
    """Send `tokens` tokens of one or two rows through a composition; returns how it ended.

    A step that finds no room is tried again at half its length; a composition that has none for a
    single token ends there.
    """
    cache, rows = PagedCache.for_model(model, spec), rng.choice((1, 1, 2))
    longest, checks, forked = settings["chunk"], 0, False
    while longest and cache.get_seq_length() < tokens:
        count = 1 if rng.random() < 0.2 else rng.randint(1, longest)
        ids = torch.tensor([[rng.randrange(1, VOCABULARY) for _ in range(count)]] * rows)
        if not step(model, cache, ids):
            longest = count // 2
            check(cache, rows, forked)
        elif rng.random() < 0.02:
            crop(rng, cache)
        if rows == 2 and cache.rows and rng.random() < 0.02:
            reorder(rng, cache)
            forked = True
        if cache.get_seq_length() > checks * tokens // 8:
            checks += 1
            check(cache, rows, forked)
    check(cache, rows, forked)
    cache.reset()
    cache.check()
    left = cache.stats()
    assert (left.blocks, left.host_bytes, left.tokens) == (0, 0, 0), "something was left behind"
    return "done" if longest else "out of room"


def reorder(rng: random.Random, cache: PagedCache) -> None:
    """Rows become copies of rows, as in a beam search; a fork may find no room."""
    try:
        cache.reorder_cache(torch.tensor([rng.randrange(2), rng.randrange(2)]))
    except (OutOfBlocks, OutOfHost):
        cache.check()


def run(model, count: int, tokens: int, seed: int, told: Callable[[str], None] = print) -> Counter:
    """`count` compositions; returns how they ended. An invariant that breaks is told and raised."""
    ends: Counter = Counter()
    for index in range(count):
        rng = random.Random(f"{seed}-{index}")
        settings, spec, refused = composed(rng, model)
        ends["refused"] += refused
        started = time.perf_counter()
        try:
            ended = run_one(model, rng, settings, spec, tokens)
        except BaseException:
            told(f"composition {index} of seed {seed}: {readable(settings)}")
            raise
        ends[ended] += 1
        told(f"{index:4d} {ended:12s} {time.perf_counter() - started:5.1f} s {readable(settings)}")
    return ends


def readable(settings: dict) -> str:
    words = [f"{k}={getattr(v, 'name', v)}" for k, v in settings.items()]
    return " ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    model = import_module("conftest").make_tiny_model()
    started = time.perf_counter()
    with torch.inference_mode():
        ends = run(model, told.count, told.tokens, told.seed)
    seconds = time.perf_counter() - started
    print(f"{told.count} compositions x {told.tokens} tokens in {seconds:.0f} s: {dict(ends)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
