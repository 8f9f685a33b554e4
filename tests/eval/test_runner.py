"""A runner: what it held at most counts, and what it raises is its own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvlab.cache import CacheSpec, CacheStats
from kvlab.core import Measurement, RunFailed
from kvlab.eval.rows import awaited_last
from kvlab.eval.runner import Runner, alive
from kvlab.window import SinkWindow


class Cache:
    """Holds nothing, and says what it held."""

    def __init__(self, allocated: int, peak: int):
        self.account = CacheStats(8, 8, 1, 0, 1, 1, allocated, 0, 16.0, peak_allocated_bytes=peak)
        self.freed = False

    def stats(self) -> CacheStats:
        return self.account

    def check(self) -> None:
        pass

    def reset(self) -> None:
        self.freed = True


def test_the_peak_is_the_most_within_any_document_and_not_what_is_left_at_its_end():
    runner = Runner("int4", {}, CacheSpec())
    for allocated, peak in ((10, 30), (25, 26)):
        runner.cache = Cache(allocated, peak)
        runner.finish()
        assert runner.cache.freed
    assert runner.peak_bytes == 30
    assert [s.allocated_bytes for s in runner.stats] == [10, 25]


def test_what_a_runner_raises_is_kept_as_text_and_its_cache_is_given_up():
    runner, other = Runner("int4", {}, CacheSpec()), Runner("int8", {}, CacheSpec())
    cache = runner.cache = Cache(1, 1)
    with runner.surviving("document 2 of 3"):
        raise RuntimeError("singular\n  matrix")
    assert runner.failure.reason == "RuntimeError: singular matrix (document 2 of 3)"
    assert "singular" in runner.failure.trace
    assert cache.freed and runner.cache is None and alive([runner, other]) == [other]
    with pytest.raises(RunFailed, match=r"int8, the full cache .*ValueError: x \(document 1\)"), \
            other.leading("document 1"):
        raise ValueError("x")
    with pytest.raises(KeyboardInterrupt), Runner("a", {}, CacheSpec()).surviving("now"):
        raise KeyboardInterrupt


def test_what_says_that_a_batch_is_whole_is_written_last():
    rows = [Measurement(name, 0.0, "") for name in ("perplexity", "a", "b")]
    assert [r.name for r in awaited_last(rows, "perplexity")] == ["a", "b", "perplexity"]


@pytest.mark.parametrize("axes", [
    {"policy": "random", "budget_percent": 30, "evict": "token"},
    {"policy": "snapkv", "budget_percent": 30},
    {"policy": "tova", "budget_percent": 30}, {"format": "int8"},
    {"policy": "snapkv", "budget_percent": 30, "budget": "adakv"},
    {"policy": "attention_mass", "budget_percent": 30, "budget": "pyramid"},
])
def test_an_item_behind_another_is_as_it_would_be_alone(axes, tiny_model):
    """Though cache and step stay; a cache that may not stay is a new one."""
    window = SinkWindow(2, 4) if "policy" in axes else "none"
    spec = CacheSpec(block_size=4, window=window, **axes)
    items = [torch.randint(1, 128, (n,)) for n in (50, 33, 50)]

    def said(runner, ids):
        runner.start()
        runner.fill(ids)
        return runner.generate(runner.read(ids[:5])[-1], 20)

    loaded = SimpleNamespace(model=tiny_model(), tokenizer=None)
    runners = [Runner("", {}, spec, loaded=loaded, chunk_tokens=16, driver="static")
               for _ in range(1 + len(items))]  # fmt: skip
    together = [said(runners[0], ids) for ids in items]
    cache = runners[0].cache
    assert [said(runner, ids) for runner, ids in zip(runners[1:], items)] == together
    assert cache.stats() == runners[3].cache.stats()._replace(
        peak_allocated_bytes=cache.stats().peak_allocated_bytes)
    runners[0].start()
    assert runners[0].cache is cache and not cache.rows
    runners[0].leave()
    assert runners[0].cache is None


def test_a_cache_that_keeps_anything_is_made_anew(tiny_model):
    loaded = SimpleNamespace(model=tiny_model(), tokenizer=None)
    for axes in ({"policy": "lru", "budget_percent": 50}, {"prefix": "hash"}):
        runner = Runner("", {}, CacheSpec(block_size=4, **axes), loaded=loaded, driver="static")
        runner.start()
        runner.fill(torch.ones(9, dtype=torch.long))
        runner.decode(torch.ones(1, dtype=torch.long))
        cache = runner.cache
        runner.start()
        assert runner.cache is not cache
