"""Summaries in the live cache: bytes counted, sequences independent, nothing broken."""

from __future__ import annotations

import pytest
import torch
from driver import make

from kvlab.core import BadInput, KvlabError
from kvlab.source.entries import OBSERVED_QUERIES
from kvlab.summary import Fitted, Merged, MergeMean, RandomTokens
from kvlab.window import SinkWindow

MEMBERS = {
    "merged": Merged(ratio=0.25), "fitted": Fitted(ratio=0.25, solver_steps=10),
    "merge_mean": MergeMean(ratio=0.25), "random": RandomTokens(ratio=0.25),
    "bounded": Merged(ratio=0.5, max_entries=6),
}  # fmt: skip


def step(cache, seqs, counts, seed=0):
    """One step of random contents through all layers, [layers, B, T, Hq, D]."""
    g, rows, most = cache.geometry, len(seqs), max(counts)
    draw = torch.Generator().manual_seed(seed)
    cache.begin(seqs, counts)
    outs = []
    for layer in range(g.layers):
        q, k, v = (
            torch.randn(rows, h, most, g.head_dim, generator=draw)
            for h in (g.query_heads, g.kv_heads, g.kv_heads)
        )
        outs.append(cache.attend(layer, q, k, v, scale=0.25))
    cache.commit()
    cache.check()
    return torch.stack(outs)


def held(cache) -> tuple[int, int]:
    """Every byte of entries, and of queries, counted from the storages."""
    stories = [s for g in cache.groups for s in g.summaries.stories.values()]
    return tuple(
        sum({x.data_ptr(): x.untyped_storage().nbytes()
             for s in stories for p in getattr(s, part).values() for x in p}.values())
        for part in ("entries", "queries")
    )


def entries(cache, seq, layer=0, group=0):
    return cache.groups[group].summaries.stories[seq].entries.get(layer)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("format", ["fp32", "int8"])
@pytest.mark.parametrize("groups", ["all", "per_layer"])
@pytest.mark.parametrize("budget", [{"budget_blocks": 14}, {"budget_percent": 50.0}], ids=str)
def test_members_live(name, format, groups, budget):
    member = MEMBERS[name] if format == "fp32" else type(MEMBERS[name])(ratio=0.1)
    cache = make(format=format, policy="fifo", groups=groups, summary=member, **budget)
    seqs = [cache.open(), cache.open()]
    for number, counts in enumerate(([9, 12], [1, 1], [12, 3], *[[1, 1]] * 9, [7, 8])):
        assert torch.isfinite(step(cache, seqs, counts, number)).all()
        stats, own = cache.stats(), sum(g.summaries.nbytes for g in cache.groups)
        pools = sum(g.pool.nbytes for g in cache.groups)
        assert (own, stats.workspace_bytes) == held(cache)
        assert stats.allocated_bytes == pools + own <= stats.peak_allocated_bytes
        cache.check()
        assert stats.logical_bytes <= stats.allocated_bytes
    assert stats.evictions and own
    if member.max_entries:
        assert all(len(s.ends) <= 6 for g in cache.groups for s in g.summaries.stories.values())
    for seq in seqs:
        cache.close(seq)
    assert cache.stats().allocated_bytes == cache.stats().workspace_bytes == sum(held(cache)) == 0


def test_as_many_entries_as_tokens_lose_only_the_rounding_to_bf16():
    """ratio=1 keeps every evicted token as an entry: the output is that of the full cache."""
    full, kept = make(), make(policy="fifo", budget_blocks=4, summary=Merged(ratio=1.0))
    seqs = [full.open()], [kept.open()]
    for number, count in enumerate((8, 8, 1, 8, 5, 1, 1, 9)):
        want, got = (step(c, s, [count], number) for c, s in zip((full, kept), seqs))
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
    assert kept.stats().evictions and entries(kept, seqs[1][0]).count == 4 * kept.stats().evictions


def test_an_evicted_block_leaves_a_trace():
    outs = {}
    for name in ("none", "merged"):
        cache = make(policy="fifo", budget_blocks=4, summary=name)
        seq = cache.open()
        step(cache, [seq], [16])
        assert cache.groups[0].summaries.stories[seq].seen == 0
        outs[name] = step(cache, [seq], [8], 1)
    assert entries(cache, seq).count == 1 and not torch.allclose(outs["none"], outs["merged"])


def test_nothing_evicted_nothing_summarized():
    cache = make(policy="fifo", budget_blocks=40, summary="fitted")
    seq = cache.open()
    cache.groups[0].summaries.spill(seq, [], [])  # an empty chunk is a plain no-op
    step(cache, [seq], [16])
    assert entries(cache, seq) is None and cache.stats().evictions == 0


def test_the_share_of_a_budget_includes_the_entries():
    sizes = {}
    for name, summary in (("plain", "none"), ("random", RandomTokens(0.1)), ("full", None)):
        axes = {} if summary is None else {"policy": "fifo", "budget_percent": 20.0}
        cache = make(format="bf16", dtype=torch.bfloat16, head_dim=64, summary=summary or "none",
                     **axes)  # fmt: skip
        seq, g = cache.open(), cache.geometry
        for _ in range(20):
            cache.begin([seq], [64])
            for layer in range(g.layers):
                x = torch.randn(1, 4, 64, 64).bfloat16()
                cache.attend(layer, x, x[:, :2], x[:, :2], scale=0.1)
            cache.commit()
        sizes[name] = cache.stats().logical_bytes
    assert 0.18 * sizes["full"] < sizes["random"] <= sizes["plain"] == 0.2 * sizes["full"]


def test_a_fork_shares_entries_until_it_evicts():
    cache = make(policy="fifo", budget_blocks=12, summary=Merged(ratio=0.25))
    seq = cache.open()
    step(cache, [seq], [40])
    cache.groups[0].held.room.evict(3)
    child, before = cache.fork(seq), cache.groups[0].summaries.nbytes
    assert entries(cache, child) is entries(cache, seq)
    assert cache.groups[0].summaries.nbytes == before == held(cache)[0]
    for number in range(4):
        step(cache, [child], [8], number)
    assert entries(cache, child).count > entries(cache, seq).count == 3
    cache.close(seq)
    assert torch.isfinite(step(cache, [child], [1])).all()


def test_crop_drops_entries_that_stand_for_cropped_tokens():
    cache = make(policy="fifo", budget_blocks=5, summary=Merged(ratio=0.25))
    seq = cache.open()
    for number in range(6):
        step(cache, [seq], [8], number)
    story = cache.groups[0].summaries.stories[seq]
    assert story.ends == sorted(story.ends) and story.ends[-1] == 28
    cache.truncate(seq, 40)
    assert len(story.ends) == 7  # nothing of them was cropped
    cache.truncate(seq, 16)
    cache.check()
    assert story.ends and max(story.ends) <= 16
    cache.truncate(seq, 0)
    assert not story.ends and not story.entries
    assert torch.isfinite(step(cache, [seq], [3])).all()


def test_what_stands_for_a_cut_goes_with_it_and_what_stands_before_stays():
    """An entry that ends where the crop does stays; one that ends a token behind it goes."""
    cache = make(policy="fifo", budget_blocks=2, summary=Merged(ratio=0.25))
    seq = cache.open()
    step(cache, [seq], [8])
    for number in range(3):
        step(cache, [seq], [4], number)
    story = cache.groups[0].summaries.stories[seq]
    assert story.ends == [4, 8, 12]
    first = entries(cache, seq).k[:2].clone()
    cache.truncate(seq, 8)
    cache.check()
    assert story.ends == [4, 8] and torch.equal(entries(cache, seq).k, first)
    assert all(entries(cache, seq, layer).count == 2 for layer in range(2))
    cache.groups[0].summaries.crop(seq, 7)
    assert story.ends == [4]


def test_a_crop_into_what_an_entry_stands_for_is_refused_and_changes_nothing():
    cache = make(policy="fifo", budget_blocks=2, summary=Merged(ratio=0.25))
    seq = cache.open()
    step(cache, [seq], [8])
    step(cache, [seq], [8], 1)
    story = cache.groups[0].summaries.stories[seq]
    with pytest.raises(KvlabError, match="cannot crop to 7 tokens: block 1 of them was evicted"):
        cache.truncate(seq, 7)
    assert story.ends == [8, 8] and cache.length(seq) == 16


def test_fits_that_fail_are_counted(monkeypatch):
    """One for each KV head of each layer of each piece, by the cache that made it."""
    member = Fitted(ratio=0.25, solver_steps=5)
    caches = [make(policy="fifo", budget_blocks=4, summary=member) for _ in range(2)]
    monkeypatch.setattr(member, "fit", lambda start, *_: start._replace(v=start.v * torch.nan))
    for cache, steps in zip(caches, (1, 3)):
        seq = cache.open()
        for number in range(1 + steps):
            step(cache, [seq], [16 if not number else 4], number)
    assert [c.stats().summary_fallbacks for c in caches] == [2 * 2, 3 * 2 * 2]
    assert member.fallbacks == 16


def test_a_window_that_frees_blocks_leaves_them_to_the_summary():
    cache = make(window=SinkWindow(4, 8, middle=False), summary="merged")
    seq = cache.open()
    for number in range(5):
        step(cache, [seq], [8], number)
    assert entries(cache, seq).count >= 1


def test_observed_queries_are_bounded_and_the_newest():
    cache = make(policy="fifo", budget_blocks=200, summary="fitted")
    seq, g = cache.open(), cache.geometry
    step(cache, [seq], [500])
    for number in range(3):
        step(cache, [seq], [1], number)
    queries = cache.groups[0].summaries.stories[seq].queries[1]
    assert queries.q.shape == (g.kv_heads, g.group * OBSERVED_QUERIES, g.head_dim)
    assert queries.lse.shape == queries.q.shape[:2] and queries.lse.isfinite().all()


def test_a_failed_step_keeps_the_entries():
    cache = make(policy="fifo", budget_blocks=5, summary="merged")
    seq = cache.open()
    step(cache, [seq], [16])
    step(cache, [seq], [8], 1)
    cache.begin([seq], [2])
    cache.abort()
    cache.check()
    assert torch.isfinite(step(cache, [seq], [4], 2)).all()


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({}, "none are evicted"),
        ({"window": SinkWindow(4, 8, middle=False, rerotate=True)}, "rerotate"),
        ({"policy": "fifo", "budget_percent": 4.0, "summary": Merged(ratio=0.1)}, "no room"),
        ({"policy": "fifo", "budget_blocks": 9, "format": "int2", "summary": Merged(ratio=0.5)},
         "no room"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(axes, text):
    inv_freq = torch.ones(8)
    with pytest.raises(BadInput, match=f"summary.*{text}"):
        make(**{"summary": "merged", "inv_freq": inv_freq} | axes)


def test_a_sliding_window_is_refused():
    cache = make(policy="fifo", budget_blocks=9, summary="merged")
    x = torch.randn(1, 4, 2, 16)
    cache.begin([cache.open()], [2])
    with pytest.raises(BadInput, match="sliding window"):
        cache.attend(0, x, x[:, :2], x[:, :2], scale=0.25, window=8)
    cache.abort()


def test_decode_through_the_kernels_reads_the_entries():
    pytest.importorskip("triton")
    outs = []
    for kernels in ("torch", "triton"):
        cache = make(head_dim=32, block_size=16, kernels=kernels, policy="fifo", budget_blocks=6,
                     summary=Merged(ratio=0.25))  # fmt: skip
        seqs = [cache.open(), cache.open()]
        step(cache, seqs, [40, 35])
        step(cache, seqs, [40, 35], 1)
        outs.append(torch.cat([step(cache, seqs, [1, 1], n) for n in range(2, 6)]))
    assert entries(cache, seqs[0]).count
    torch.testing.assert_close(*outs, rtol=2e-3, atol=2e-3)


def test_entries_share_no_memory_with_what_the_pool_reads(monkeypatch):
    """On CUDA the pool reads into a workspace, which the next piece overwrites."""
    cache = make(format="bf16", dtype=torch.bfloat16, policy="fifo", budget_blocks=16,
                 block_size=1, summary="merged")  # fmt: skip
    pool, seen = cache.groups[0].pool, []
    read = pool.read

    def noted(*args):
        seen.extend(read(*args))
        return seen[-2:]

    monkeypatch.setattr(pool, "read", noted)
    seq = cache.open()
    cache.begin([seq], [16])
    for layer in range(2):
        x = torch.randn(1, 4, 16, 16).bfloat16()
        cache.attend(layer, x, x[:, :2], x[:, :2], scale=0.25)
    cache.commit()
    cache.groups[0].held.room.evict(1)  # one token is its own entry
    kept = [entries(cache, seq, layer).k.clone() for layer in range(2)]
    for tensor in seen:
        tensor.zero_()
    assert all(torch.equal(entries(cache, seq, n).k, k) and k.any() for n, k in enumerate(kept))


@pytest.mark.parametrize("member", ["merged", "fitted"])
def test_a_failed_step_leaves_no_queries(member):
    """Of a step that is undone nothing is asked: what comes is as if it had not begun."""

    def run(failing):
        cache = make(policy="fifo", budget_percent=50.0, summary=MEMBERS[member])
        seq, out, g = cache.open(), [], cache.geometry
        for number, count in enumerate((6, 1, 1, 24, 1, 24, 1)):
            if failing:
                cache.begin([seq], [count])
                q, k, v = (torch.ones(1, h, count, g.head_dim)
                           for h in (g.query_heads, g.kv_heads, g.kv_heads))
                cache.attend(0, q, k, v, scale=0.25)
                cache.abort()
            out.append(step(cache, [seq], [count], number))
        return torch.cat(out, 2), cache

    whole, cache = run(failing=False)
    assert cache.stats().evictions
    assert torch.equal(run(failing=True)[0], whole)
