"""Prefill in chunks: same answer, and a cache that can go on wherever it stopped."""

from __future__ import annotations

import signal

import pytest
import torch

import kvlab
from kvlab.cache import CacheSpec
from kvlab.cache import PagedCache as CorePagedCache
from kvlab.core import BadInput, OutOfBlocks
from kvlab.model import PagedCache, room
from kvlab.model.prefill import chunk_size
from kvlab.model.room import LARGEST, SMALLEST, adaptive_budget, adaptive_chunk

PROMPT = 40


@pytest.fixture
def model(tiny_model):
    return tiny_model()


@pytest.fixture
def ids():
    return torch.randint(1, 128, (2, PROMPT))


def fresh(model, **axes):
    return PagedCache.for_model(model, **{"format": "fp32", "block_size": 8} | axes)


@pytest.fixture
def expected(model, ids):
    """Last logits of the whole prompt in one forward, without any cache of ours."""
    model.set_attn_implementation("sdpa")
    return model(ids).logits[:, -1]


def same(logits, expected):
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 8, 40, 1000, "adaptive"])
def test_every_chunk_gives_the_same_logits(model, ids, expected, chunk):
    cache = fresh(model)
    result = kvlab.prefill(model, ids, cache, chunk_tokens=chunk)
    same(result.logits, expected)
    assert result.tokens == PROMPT and not result.stopped and result.seconds > 0
    assert [cache.length(row) for row in cache.rows] == [PROMPT, PROMPT]
    cache.check()


@pytest.mark.parametrize("chunk", [0, -3, 2.5, True, "large", None])
def test_impossible_chunks_are_refused_before_anything_happens(model, ids, chunk):
    cache = fresh(model)
    with pytest.raises(BadInput, match="chunk_tokens"):
        kvlab.prefill(model, ids, cache, chunk_tokens=chunk)
    assert not cache.rows


def test_should_stop_is_asked_between_chunks(model, ids, expected):
    cache, asked = fresh(model), []

    def stop():
        asked.append(cache.get_seq_length())
        return len(asked) == 3

    first = kvlab.prefill(model, ids, cache, chunk_tokens=7, should_stop=stop)
    assert asked == [0, 7, 14] and first.stopped and first.tokens == 14
    cache.check()
    rest = kvlab.prefill(model, ids[:, first.tokens :], cache, chunk_tokens=7)
    same(rest.logits, expected)


def test_stopped_before_the_first_chunk(model, ids, expected):
    cache = fresh(model)
    result = kvlab.prefill(model, ids, cache, should_stop=lambda: True)
    assert result.logits is None and result.tokens == 0 and result.stopped
    same(kvlab.prefill(model, ids, cache).logits, expected)


@pytest.fixture
def ctrl_c():
    """SIGINT as a terminal's program has it; what starts in the background has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_between_chunks(model, ids, expected, ctrl_c):
    cache, before = fresh(model), signal.getsignal(signal.SIGINT)

    def interrupt(done, total):
        if done == 16:
            signal.raise_signal(signal.SIGINT)

    result = kvlab.prefill(model, ids, cache, chunk_tokens=8, progress=interrupt)
    assert result.stopped and result.tokens == 16
    assert signal.getsignal(signal.SIGINT) is before
    cache.check()
    same(kvlab.prefill(model, ids[:, 16:], cache, chunk_tokens=8).logits, expected)


def test_the_second_ctrl_c_interrupts_at_once(model, ids, expected, ctrl_c):
    cache, before = fresh(model), signal.getsignal(signal.SIGINT)

    def insist(done, total):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        kvlab.prefill(model, ids, cache, chunk_tokens=8, progress=insist)
    assert signal.getsignal(signal.SIGINT) is before
    cache.check()
    same(kvlab.prefill(model, ids[:, 8:], cache).logits, expected)


def test_progress_is_told_after_every_chunk(model, ids):
    seen = []
    kvlab.prefill(
        model, ids, fresh(model), chunk_tokens=15, progress=lambda *now: seen.append(now)
    )
    assert seen == [(15, PROMPT), (30, PROMPT), (40, PROMPT)]


def test_a_log_gets_a_line_now_and_then(model, ids, capsys, monkeypatch):
    monkeypatch.setattr("kvlab.model.progress.LOG_SECONDS", 0.0)
    kvlab.prefill(model, ids, fresh(model), chunk_tokens=20, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("prefill 20/40 tokens, ")
    assert lines[1].endswith("0 s left")


def test_a_short_prefill_logs_nothing(model, ids, capsys):
    kvlab.prefill(model, ids, fresh(model), chunk_tokens=20, progress=True)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(model, ids, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    kvlab.prefill(model, ids, fresh(model), chunk_tokens=20, progress=True)
    assert "40/40 tokens" in capsys.readouterr().err


def test_a_failing_layer_leaves_a_cache_that_goes_on(model, ids, expected, monkeypatch):
    cache = fresh(model)
    kvlab.prefill(model, ids[:, :13], cache)
    before = cache.stats()

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", broken)
        patch.setattr(model.model.layers[1].self_attn, "forward", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            kvlab.prefill(model, ids[:, 13:], cache)
    same(kvlab.prefill(model, ids[:, 13:], cache).logits, expected)
    assert cache.stats().tokens == 2 * PROMPT > before.tokens
    cache.check()


def test_a_budget_too_small_stops_with_what_was_done(model, ids):
    cache = fresh(model, budget_blocks=5)
    with pytest.raises(OutOfBlocks):
        kvlab.prefill(model, ids, cache, chunk_tokens=16)
    assert cache.get_seq_length() == 16 and cache.length(cache.rows[0]) == 16
    cache.abort()
    cache.check()


def test_adaptive_is_the_smallest_on_the_cpu(model):
    assert adaptive_chunk(model, fresh(model)) == SMALLEST
    assert chunk_size("adaptive", model, fresh(model))() == SMALLEST


def test_an_adaptive_budget_is_what_is_free_less_what_else_is_needed(model, monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda device: 8_000_000)
    activations = room.ASSUMED * room.activation_bytes(model.config)
    cache = fresh(model, budget_bytes="adaptive", policy="lru", workspace_tokens=100)
    g = cache.geometry
    workspace = 100 * 2 * g.kv_heads * g.head_dim * 4
    assert cache.spec.budget_bytes == 7_000_000 - workspace - activations
    assert cache.groups[0].ledger.capacity == cache.spec.budget_bytes // (
        cache.spec.format.block_bytes(g))  # fmt: skip
    staged = fresh(model, budget_bytes="adaptive", policy="lru", workspace_tokens=100,
                   offload="host")  # fmt: skip
    assert cache.spec.budget_bytes - staged.spec.budget_bytes == workspace


def test_an_adaptive_budget_needs_room_and_a_model(model, monkeypatch):
    spec = CacheSpec(budget_bytes="adaptive", policy="lru")
    with pytest.raises(BadInput, match="for_model"):
        CorePagedCache(fresh(model).geometry, spec)
    monkeypatch.setattr(room, "free_bytes", lambda device: 1_000)
    with pytest.raises(BadInput, match="finds no room: 1000 bytes are free"):
        adaptive_budget(model, spec)
    with pytest.raises(BadInput, match="more than 0"):
        CacheSpec(budget_bytes="much", policy="lru")


@pytest.mark.gpu
def test_an_adaptive_budget_is_most_of_what_is_free(model):
    model = model.to("cuda", torch.bfloat16)
    free = room.free_bytes(model.device)
    cache = fresh(model, format="bf16", budget_bytes="adaptive", policy="fifo")
    assert free // 2 < cache.spec.budget_bytes < free


@pytest.mark.gpu
def test_adaptive_follows_the_free_memory(model):
    model = model.to("cuda", torch.bfloat16)
    cache = fresh(model, format="bf16")
    size = adaptive_chunk(model, cache)
    assert SMALLEST <= size <= LARGEST and size & (size - 1) == 0
    prompt = torch.randint(1, 128, (1, 2000), device="cuda")
    result = kvlab.prefill(model, prompt, cache, chunk_tokens="adaptive")
    assert result.tokens == 2000 and torch.isfinite(result.logits).all()
