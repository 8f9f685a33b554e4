"""A runner: what it held at most counts, and what it raises is its own."""

from __future__ import annotations

import pytest

from kvlab.cache import CacheSpec, CacheStats
from kvlab.core import Measurement, RunFailed
from kvlab.eval.rows import awaited_last
from kvlab.eval.runner import Runner, alive


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
