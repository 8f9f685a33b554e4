"""PagedCache without a model: attention, bytes, and books that stay straight."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from driver import Driver, held_bytes, make
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvlab import policy as policies
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, KvlabError, OutOfBlocks
from kvlab.format import NAMES, by_name
from kvlab.window import NoWindow, SinkWindow


def store_tokens(cache, seq, tokens, chunk=8192):
    """Fill without the cost of attention: the store half of `attend`."""
    g = cache.geometry
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        cache.begin([seq], [count])
        x = torch.zeros(count, g.kv_heads, g.head_dim, dtype=cache.dtype)
        for layer in range(g.layers):
            cache.groups[0]._seal(layer, cache.sequences.under_way[0][0], x, x)
        cache.commit()


@pytest.mark.parametrize("tokens", [100, 1_000, 10_000, 100_000])
def test_allocated_bytes_follow_the_tokens(tokens):
    """Reference-model shape in int4: within one slab and one open block; freeing gives it back."""
    cache = make(6, 8, 2, 128, format="int4", block_size=64, dtype=torch.bfloat16)
    assert cache.stats().allocated_bytes == held_bytes(cache) == 0
    seq = cache.open()
    store_tokens(cache, seq, tokens)
    stats, pool = cache.stats(), cache.groups[0].pool
    assert stats.tokens == stats.resident_tokens == tokens
    assert stats.allocated_bytes == held_bytes(cache)
    sealed = tokens // 64 * cache.spec.format.block_bytes(cache.geometry)
    slack = stats.allocated_bytes - sealed
    assert 0 <= slack <= pool.sealed.slab_bytes + pool.open.slab_bytes
    assert stats.logical_bytes <= stats.allocated_bytes
    assert stats.nominal_bytes == tokens * cache.geometry.elements_per_token // 2
    cache.truncate(seq, tokens // 2)
    assert held_bytes(cache) <= sealed / 2 + pool.sealed.slab_bytes + pool.open.slab_bytes
    cache.close(seq)
    assert cache.stats().allocated_bytes == held_bytes(cache) == 0
    cache.check()


@pytest.mark.parametrize("groups", ["all", "per_layer"])
def test_the_peak_is_what_was_held_within_a_step(groups):
    """A window frees only when the step is done. Four blocks are a slab."""
    window = SinkWindow(sinks=0, recent=1024, middle=False)
    cache = make(block_size=256, window=window, groups=groups)
    g, seq = cache.geometry, cache.open()
    slab = 4 * cache.spec.format.block_bytes(g)
    x = torch.zeros(1, g.kv_heads, 2048, g.head_dim)
    for peak in (2, 3, 3):
        cache.begin([seq], [2048])
        for layer in range(g.layers):
            cache.store(layer, x, x)
        cache.commit()
        stats = cache.stats()
        assert stats.allocated_bytes == held_bytes(cache) == slab
        assert stats.peak_allocated_bytes == peak * slab
        cache.check()
    cache.reset_peak()
    assert cache.stats().peak_allocated_bytes == slab
    cache.close(seq)
    assert cache.stats().allocated_bytes == 0 and cache.stats().peak_allocated_bytes == slab


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_attention_reads_the_dequantized_past(name, block_size):
    """Every output equals one fp32 softmax over what the blocks hold (the driver checks each)."""
    axes = {"head_dim": 32, "block_size": block_size, "workspace_tokens": 8}
    if by_name(name).sinks > block_size:
        with pytest.raises(BadInput, match="must lie within a block"):
            make(format=name, **axes)
        name = by_name(name, sinks=0)  # as the sentence says
    driver = Driver(make(format=name, **axes))
    seq = driver.open()
    for count in (5, 1, 1, 17, 1, 16, 2):
        driver.step([seq], [count])
    assert driver.cache.length(seq) == 43
    driver.cache.check()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_attention_in_the_compute_dtype(name):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    driver = Driver(make(head_dim=32, format=name, dtype=dtype))
    seq = driver.open()
    for count in (9, 1, 6):
        driver.step([seq], [count])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_attention_on_cuda(name):
    """bf16 goes through the library's attention, not the reference."""
    driver = Driver(make(head_dim=128, format=name, block_size=16, device="cuda",
                         dtype=torch.bfloat16))  # fmt: skip
    seq = driver.open()
    for count in (50, 1, 1, 17):
        driver.step([seq], [count])
    driver.close(seq)
    assert held_bytes(driver.cache) == 0


def test_rows_of_a_ragged_batch_do_not_see_each_other():
    driver = Driver(make())
    seqs = [driver.open() for _ in range(3)]
    for counts in ([7, 2, 0], [1, 1, 1], [0, 5, 9], [4, 4, 4], [1, 0, 1]):
        driver.step(seqs, counts)
    assert [driver.cache.length(s) for s in seqs] == [13, 12, 15]
    driver.cache.check()


@pytest.mark.parametrize("window", [1, 3, 8, 100])
def test_sliding_window_bounds_what_is_read(window):
    driver = Driver(make(workspace_tokens=8))
    seq = driver.open()
    for count in (6, 1, 13, 1, 1, 9):
        driver.step([seq], [count], window=window)
    driver.cache.begin([seq], [1])
    (extent,) = driver.cache.sequences.under_way[0]
    group = driver.cache.groups[0]
    pieces = group.sources.sealed.pieces(extent, window)
    assert sum(len(piece.blocks) for piece in pieces) <= -(-window // 4) + 1
    driver.cache.abort()


def test_segments_are_bounded_by_the_workspace():
    driver = Driver(make(workspace_tokens=12))
    seq = driver.open()
    driver.step([seq], [50])
    driver.cache.begin([seq], [1])
    group = driver.cache.groups[0]
    pieces = group.sources.sealed.pieces(driver.cache.sequences.under_way[0][0])
    assert [len(piece.blocks) for piece in pieces] == [3, 3, 3, 3]
    assert [piece.start for piece in pieces] == [0, 12, 24, 36]


def test_out_of_blocks_in_begin_changes_nothing():
    driver = Driver(make(budget_blocks=4))
    a, b = driver.open(), driver.open()
    driver.step([a, b], [6, 4])
    before = driver.cache.stats()
    with pytest.raises(OutOfBlocks):
        driver.cache.begin([a, b], [4, 4])  # the first row still fits, the second does not
    assert driver.cache.stats() == before
    driver.cache.check()
    driver.step([a, b], [1, 3])
    driver.close(a)
    driver.step([b], [5])
    driver.cache.check()


def test_fifo_punches_holes_from_the_oldest_on():
    driver = Driver(make(policy="fifo", budget_blocks=5))
    seq = driver.open()
    for count in (9, 1, 12, 1, 6, 1, 1):
        driver.step([seq], [count])
        driver.cache.check()
    stats, table = driver.cache.stats(), driver.cache.groups[0].tables[seq]
    assert stats.blocks <= 5 and stats.evictions == len(table.holes) == 3
    assert table.holes == [0, 1, 2]
    assert stats.tokens == 31 and stats.resident_tokens == 31 - 12
    assert stats.resident_tokens_percent == pytest.approx(100 * 19 / 31)
    assert stats.effective_bits == pytest.approx(stats.bits_per_element * 19 / 31)
    assert held_bytes(driver.cache) == stats.allocated_bytes


def test_a_relative_budget_keeps_its_share():
    driver = Driver(make(policy="fifo", budget_percent=50))
    seq = driver.open()
    for _ in range(20):
        driver.step([seq], [4])
        assert driver.cache.stats().blocks <= max(1, driver.cache.length(seq) // 8)
    driver.cache.check()


def test_a_window_keeps_sinks_and_recent_tokens():
    window = SinkWindow(sinks=4, recent=8)
    driver = Driver(make(policy="fifo", budget_blocks=6, window=window))
    seq = driver.open()
    for count in (9, 1, 8, 1, 1, 5, 1, 9, 1):
        driver.step([seq], [count])
        driver.cache.check()
        holes = set(driver.cache.groups[0].tables[seq].holes)
        kept = {t // 4 for span in window.protected(driver.cache.length(seq)) for t in range(*span)}
        assert not holes & kept
    assert holes and 0 not in holes


def test_a_window_without_middle_frees_at_once():
    driver = Driver(make(window=SinkWindow(sinks=4, recent=8, middle=False)))
    seq = driver.open()
    for count in (9, 1, 8, 1, 20, 2):
        driver.step([seq], [count])
        driver.cache.check()
    assert driver.cache.stats().blocks == 1 + 3
    driver.close(seq)
    assert held_bytes(driver.cache) == 0


def rotated(x, positions, inv_freq):
    """Rotary embedding of x [T, D] at `positions` [T], halves paired as in Llama and Qwen."""
    angle = positions[:, None].float() * inv_freq
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


@pytest.mark.parametrize("count", [1, 3])
def test_rerotated_keys_stand_where_evicted_ones_were(count):
    """Sinks attended as if the tokens between them and the recent ones had never been."""
    inv_freq = 1.0 / 100 ** torch.linspace(0, 1, 8)
    window = SinkWindow(sinks=4, recent=8, middle=False, rerotate=True)
    cache = make(layers=1, query_heads=1, kv_heads=1, window=window, inv_freq=inv_freq)
    seq, k = cache.open(), torch.randn(40, 16)
    plain = rotated(k, torch.arange(40), inv_freq)
    q = torch.randn(count, 16)
    for start, n in ((0, 30), (30, 40 - count - 30), (40 - count, count)):
        turned = rotated(q, torch.arange(start, start + count), inv_freq)
        turned = turned if n == count else torch.randn(n, 16)
        new = plain[start : start + n][None, None]
        cache.begin([seq], [n])
        kept = [i for i in range(start) if cache.groups[0].tables[seq].ids[i // 4] is not None]
        out = cache.attend(0, turned[None, None], new, k[start : start + n][None, None], scale=0.3)
        cache.commit()
    seen = kept + list(range(40 - count, 40))
    assert seen[:4] == [0, 1, 2, 3] and len(seen) < 20
    keys = rotated(k[seen], torch.arange(len(seen)), inv_freq)
    queries = rotated(q, torch.arange(len(seen) - count, len(seen)), inv_freq)
    mask = torch.ones(count, len(seen)).tril(len(seen) - count).bool()
    weights = (queries @ keys.T * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(out[0, :, 0], weights @ k[seen], rtol=0, atol=1e-5)


def test_rerotation_needs_the_models_frequencies():
    with pytest.raises(BadInput, match="rotary"):
        make(window=SinkWindow(middle=False, rerotate=True))
    with pytest.raises(BadInput, match=r"middle=false"):
        SinkWindow(rerotate=True)


def test_layers_that_evict_for_themselves():
    driver = Driver(make(layers=3, policy="attention_mass", budget_blocks=9, groups="per_layer",
                         evict="block"))
    seq = driver.open()
    for count in (29, 1, 12, 1, 6, 1, 1, 9):
        driver.step([seq], [count])
        driver.cache.check()
    holes = [tuple(group.tables[seq].holes) for group in driver.cache.groups]
    assert len(holes) == 3 and len(set(holes)) > 1, "layers choose differently"
    assert all(group.ledger.held_count <= 9 for group in driver.cache.groups)
    driver.close(seq)
    assert held_bytes(driver.cache) == 0


@pytest.mark.parametrize("name", ["fp32", "fp8", "int8", "int4"])
def test_steps_through_the_kernels(name):
    """Chunks through gather, seal and merge, single tokens through append and paged decode."""
    pytest.importorskip("triton")
    driver = Driver(make(head_dim=32, block_size=16, kernels="triton", format=name))
    a, b = driver.open(), driver.open()
    for counts in ([17, 40], [1, 1], [14, 1], [1, 1]):
        driver.step([a, b], counts)
    driver.cache.check()


def test_policies_hear_the_same_through_the_kernels():
    pytest.importorskip("triton")
    chosen = []
    for kernels in ("torch", "triton"):
        axes = {"kernels": kernels, "policy": "attention_mass", "budget_blocks": 5,
                "evict": "block"}
        driver = Driver(make(head_dim=32, block_size=16, **axes))
        seq = driver.open()
        for count in (70, 1, 3, 1, 5, 1, 20, 1):
            driver.step([seq], [count])
        chosen.append(driver.cache.groups[0].tables[seq].ids)
    assert chosen[0] == chosen[1] and None in chosen[0]


@pytest.mark.parametrize("axes", [{"policy": "lru"}, {"window": SinkWindow()}])
def test_axes_that_would_never_act_are_refused(axes):
    with pytest.raises(BadInput, match="evict"):
        make(**axes)


def test_shared_blocks_are_never_evicted():
    driver = Driver(make(policy="fifo", budget_blocks=6))
    a = driver.open()
    driver.step([a], [8])
    b = driver.fork(a)
    for _ in range(4):
        driver.step([b], [4])
    with pytest.raises(OutOfBlocks):
        driver.step([b], [24])
    assert driver.cache.groups[0].tables[a].holes == []
    driver.step([a], [1])
    driver.cache.check()


def test_an_aborted_step_leaves_no_trace():
    driver = Driver(make())
    seq = driver.open()
    driver.step([seq], [6])
    before = driver.cache.stats()
    for count in (1, 2, 3, 11):
        driver.step([seq], [count], layers=1)
        with pytest.raises(KvlabError, match="neither committed nor aborted"):
            driver.cache.begin([seq], [1])
        driver.cache.abort()
        driver.cache.check()
        driver.cache.reset_peak()  # which remembers that the step had taken its memory
        assert driver.cache.stats() == before
    driver.cache.abort()  # nothing to undo
    driver.step([seq], [7])


def test_truncate_reopens_the_cut_block():
    driver = Driver(make(format="int8"))
    seq = driver.open()
    driver.step([seq], [15])
    for length in (13, 12, 10, 9, 4, 0):
        driver.truncate(seq, length)
        driver.cache.check()
        driver.step([seq], [1])
        driver.truncate(seq, length)
    with pytest.raises(KvlabError, match="cannot crop"):
        driver.cache.truncate(seq, 1)
    assert held_bytes(driver.cache) == 0


def test_every_sequence_closed_gives_all_bytes_back():
    driver = Driver(make(format="int4", head_dim=32))
    a = driver.open()
    driver.step([a], [13])
    b = driver.fork(a)
    c = driver.fork(b)
    driver.step([a, b, c], [3, 1, 9])
    for seq in (a, c, b):
        driver.cache.check()
        driver.close(seq)
    driver.cache.check()
    assert held_bytes(driver.cache) == 0


@pytest.mark.parametrize("axes", [
    {"block_size": 0}, {"block_size": 257}, {"budget_blocks": 0}, {"budget_percent": 101.0},
    {"budget_blocks": 2, "budget_percent": 5.0}, {"budget_bytes": 10}, {"format": "int5"},
    {"policy": "magic"}, {"workspace_tokens": 0}, {"format": "int3", "head_dim": 12},
    {"dtype": torch.float64}, {"query_heads": 3},
])  # fmt: skip
def test_impossible_caches_are_refused(axes):
    with pytest.raises(BadInput):
        make(**axes)


class Life(RuleBasedStateMachine):
    """Sequences come, fork, grow, shrink, fail and go; books and attention stay right."""

    window = NoWindow()

    def __init__(self):
        super().__init__()
        axes = {"policy": "fifo", "budget_blocks": 14, "window": self.window}
        self.driver = Driver(make(layers=1, block_size=3, workspace_tokens=6, **axes))

    def pick(self, index):
        seqs = sorted(self.driver.past)
        return seqs[index % len(seqs)]

    def guarded(self, act):
        before = self.driver.cache.groups[0].ledger.held_count
        try:
            act()
        except OutOfBlocks:
            assert self.driver.cache.groups[0].ledger.held_count == before

    @precondition(lambda self: len(self.driver.past) < 4)
    @rule()
    def open(self):
        self.driver.open()

    @precondition(lambda self: self.driver.past)
    @rule(index=st.integers(0, 3), count=st.integers(1, 8))
    def step(self, index, count):
        self.guarded(lambda: self.driver.step([self.pick(index)], [count]))

    @precondition(lambda self: len(self.driver.past) > 1)
    @rule(counts=st.lists(st.integers(0, 4), min_size=4, max_size=4))
    def batch(self, counts):
        seqs = sorted(self.driver.past)
        if any(counts[: len(seqs)]):
            self.guarded(lambda: self.driver.step(seqs, counts[: len(seqs)]))

    @precondition(lambda self: self.driver.past)
    @rule(index=st.integers(0, 3), count=st.integers(1, 8), layers=st.integers(0, 1))
    def fail(self, index, count, layers):
        self.guarded(lambda: self.driver.step([self.pick(index)], [count], layers=layers))
        self.driver.cache.abort()

    @precondition(lambda self: 0 < len(self.driver.past) < 4)
    @rule(index=st.integers(0, 3))
    def fork(self, index):
        self.guarded(lambda: self.driver.fork(self.pick(index)))

    @precondition(lambda self: self.driver.past)
    @rule(index=st.integers(0, 3), share=st.floats(0, 1))
    def truncate(self, index, share):
        seq = self.pick(index)
        length = int(self.driver.cache.length(seq) * share)
        if length % 3 and self.driver.cache.groups[0].tables[seq].ids[length // 3] is None:
            with pytest.raises(KvlabError, match="was evicted"):
                self.driver.truncate(seq, length)
        else:
            self.guarded(lambda: self.driver.truncate(seq, length))

    @precondition(lambda self: self.driver.past)
    @rule(index=st.integers(0, 3))
    def close(self, index):
        self.driver.close(self.pick(index))

    @invariant()
    def books(self):
        cache = self.driver.cache
        cache.check()
        stats = cache.stats()
        assert stats.allocated_bytes == held_bytes(cache) >= 0
        assert stats.tokens == sum(len(p[0][0]) for p in self.driver.past.values())
        if not self.driver.past:
            assert held_bytes(cache) == 0


class WindowedLife(Life):
    """Pins come and go as well."""

    window = SinkWindow(sinks=2, recent=5)


Life.TestCase.settings = WindowedLife.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True,
    phases=[Phase.generate],
)
TestLife, TestWindowedLife = Life.TestCase, WindowedLife.TestCase


def test_axes_are_taken_as_names_or_as_they_are():
    lru = policies.by_name("lru")
    spec = CacheSpec(policy=lru)
    assert spec.member is lru and type(spec.policy()) is type(lru) and spec.policy() is not lru
    assert CacheSpec(window="sink").window.sinks == 4
    with pytest.raises(BadInput, match="needs an eviction policy"):
        CacheSpec(budget_percent=50.0)


@pytest.mark.parametrize("axes", [{}, {"prefix": "hash", "policy": "lru", "budget_blocks": 20},
                                  {"offload": "host", "policy": "fifo", "budget_blocks": 5}])
def test_a_cache_that_is_let_go_waits_for_no_collection(axes):
    gc.disable()
    try:
        driver = Driver(make(**axes))
        driver.step([driver.open()], [9])
        store = weakref.ref(driver.cache.groups[0].pool.sealed)
        del driver
        assert store() is None
    finally:
        gc.enable()
