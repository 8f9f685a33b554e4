"""The newest tokens are read as computed: against a plain model of what a query must read."""

from __future__ import annotations

import copy

import pytest
import torch
from driver import Driver, held_bytes, make
from hypothesis import given, settings
from hypothesis import strategies as st
from named import axes_id

from kvlab.core import BadInput
from kvlab.format import by_name
from kvlab.offload import HostStore
from kvlab.window import SinkWindow

SIZE = 4


def cache_of(name="int4", blocks=2, size=SIZE, **axes):
    return make(**{"format": by_name(name, residual=blocks * size), "block_size": size} | axes)


class Computed(Driver):
    """Remembers which whole blocks of a sequence must be read as they were computed, and how.

    computed[seq]: logical block -> keys and values of each layer, [S, H, D].
    """

    def __init__(self, cache, seed=0):
        super().__init__(cache, seed)
        self.computed = {}
        self.most = cache.groups[0].pool.format.residual // cache.geometry.block_size

    def open(self):
        seq = super().open()
        self.computed[seq] = {}
        return seq

    def fork(self, seq):
        child = super().fork(seq)
        self.computed[child] = dict(self.computed[seq])
        return child

    def close(self, seq):
        super().close(seq)
        del self.computed[seq]

    def truncate(self, seq, length):
        super().truncate(seq, length)
        whole = length // self.cache.geometry.block_size
        self.computed[seq] = {i: x for i, x in self.computed[seq].items() if i < whole}

    def settle(self, seq):
        size, raw = self.cache.geometry.block_size, list(self.past[seq])
        whole = len(raw[0][0]) // size
        super().settle(seq)
        known = self.computed[seq]
        last = max(known, default=self.seen.get(seq, 0) - 1)
        for index in range(last + 1, whole):
            known[index] = [[x[index * size : (index + 1) * size] for x in pair] for pair in raw]
        known = {i: x for i, x in known.items() if i >= whole - self.most}
        self.computed[seq], self.seen[seq] = known, whole
        for layer, pair in enumerate(self.past[seq]):
            for index, layers in known.items():
                for x, y in zip(pair, layers[layer]):
                    x[index * size : (index + 1) * size] = y

    @property
    def seen(self):
        return vars(self).setdefault("_seen", {})


def residual_of(cache, seq):
    """Logical blocks of a sequence that are read as computed."""
    return list(cache.groups[0].recent.held[seq])


STEPS = st.lists(st.one_of(
    st.tuples(st.just("step"), st.integers(1, 14)), st.tuples(st.just("step"), st.just(1)),
    st.tuples(st.just("cut"), st.integers(0, 9)), st.tuples(st.just("fork"), st.just(0)),
    st.tuples(st.just("fail"), st.integers(1, 9))), min_size=1, max_size=12)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(STEPS, st.integers(1, 3))
def test_a_query_reads_what_the_model_says(steps, blocks):
    """Chunks, single tokens, crops, forks and steps undone, each checked by the oracle."""
    driver = Computed(cache := cache_of(blocks=blocks, layers=1))
    seqs = [driver.open()]
    for verb, n in steps:
        if verb == "step":
            counts = [n if i == 0 else 1 + n % 5 for i in range(len(seqs))]
            driver.step(seqs, counts)
        elif verb == "cut":
            length = max(0, cache.length(seqs[0]) - n)
            driver.truncate(seqs[0], length)
            driver.seen[seqs[0]] = length // SIZE
        elif verb == "fork" and len(seqs) < 3:
            seqs.append(driver.fork(seqs[0]))
            driver.seen[seqs[-1]] = driver.seen.get(seqs[0], 0)
        elif verb == "fail":
            driver.step(seqs, [n] * len(seqs), layers=0)
            cache.abort()
        for seq in seqs:
            assert residual_of(cache, seq) == list(driver.computed[seq])
        cache.check()
        assert cache.stats().allocated_bytes == held_bytes(cache)
    for seq in seqs:
        driver.close(seq)
    assert not held_bytes(cache)


def test_a_cut_within_the_residual_is_exact():
    """Tokens of a whole block that were never read as stored are not rounded by a crop."""
    driver = Computed(cache := cache_of())
    seq = driver.open()
    driver.step([seq], [11])
    raw = [[x.clone() for x in pair] for pair in driver.past[seq]]
    driver.truncate(seq, 6)
    k, v = cache.groups[0].pool.read_open(0, cache.groups[0].tables[seq].ids[1], 2)
    assert torch.equal(k.float(), raw[0][0][4:6]) and torch.equal(v.float(), raw[0][1][4:6])


@pytest.mark.parametrize("name, size, blocks", [("int8", 16, 1), ("int2g", 8, 2)])
def test_kernels_read_what_torch_reads(name, size, blocks):
    ragged(cache_of(name, blocks, size, kernels="triton", head_dim=32, layers=1))


@pytest.mark.gpu
@pytest.mark.parametrize("name, size, blocks", [("int8", 64, 2), ("int2g", 32, 1), ("int4", 16, 3)])
def test_kernels_on_a_gpu(name, size, blocks):
    ragged(cache_of(name, blocks, size, head_dim=64, device="cuda", dtype=torch.bfloat16))


def ragged(cache):
    """Two rows of unlike lengths, of which one fills blocks while the other does not."""
    driver, size = Computed(cache), cache.geometry.block_size
    seqs = [driver.open(), driver.open()]
    driver.step(seqs, [3 * size + 3, size - 1])
    for _ in range(3):
        driver.step(seqs, [1, 1])
    driver.step(seqs, [size, 2])
    driver.step([seqs[1]], [1])
    driver.cache.check()


def test_bytes_are_those_of_the_places():
    """What is held twice is counted twice where bytes are; its nominal bits are the model's."""
    full, cache = (cache_of(blocks=n, dtype=torch.bfloat16) for n in (0, 2))
    for c in (full, cache):
        driver = Computed(c)
        driver.step([driver.open()], [5 * SIZE])
    token = cache.geometry.elements_per_token
    extra = 2 * SIZE * token * 2  # 16 bits
    new, old = cache.stats(), full.stats()
    assert new.residual_bytes == extra and old.residual_bytes == 0
    assert new.allocated_bytes - old.allocated_bytes == extra
    assert new.logical_bytes - old.logical_bytes == extra
    assert new.nominal_bytes - old.nominal_bytes == 2 * SIZE * token * (16 - 4) // 8
    assert new.tokens == old.tokens == new.resident_tokens
    assert new.bits_per_element > old.bits_per_element


def test_a_copy_has_its_own():
    driver = Computed(cache := cache_of())
    seq = driver.open()
    driver.step([seq], [14])
    other = copy.deepcopy(cache)
    driver.step([seq], [5])
    other.check()
    assert residual_of(other, seq) == [1, 2]
    assert other.stats().allocated_bytes == held_bytes(other)


@pytest.mark.parametrize("axes", [
    {"policy": "fifo", "budget_blocks": 6},
    {"policy": "attention_mass", "budget_percent": 40, "evict": "block"},
    {"policy": "fifo", "budget_blocks": 6, "offload": HostStore(slab_tokens=4)},
    {"policy": "fifo", "budget_percent": 30, "window": SinkWindow(sinks=2, recent=6)},
    {"window": SinkWindow(sinks=2, recent=6, middle=False)},
    {"window": SinkWindow(sinks=2, recent=16, middle=False)},
], ids=axes_id)
def test_what_leaves_is_never_of_the_residual(axes):
    driver = Computed(cache := cache_of(**axes))
    seq = driver.open()
    for count in (9, 7, 1, 1, 1, 1, 8, 1, 13):
        driver.step([seq], [count])
        table, kept = cache.groups[0].tables[seq], residual_of(cache, seq)
        assert all(table.ids[i] is not None for i in kept)
        whole = table.length // SIZE
        if "window" not in axes or axes["window"].middle or axes["window"].recent > 12:
            assert kept == list(range(max(0, whole - 2), whole))
        else:  # the window is shorter, and lets go of the rest
            driver.computed[seq] = {i: driver.computed[seq][i] for i in kept}
        cache.check()
    assert cache.stats().evictions


def test_a_models_own_window_cuts_it():
    driver = Computed(cache := cache_of())
    seq = driver.open()
    for count in (9, 1, 1, 1, 6):
        driver.step([seq], [count], window=5)
    cache.check()


@pytest.mark.parametrize("settings", [
    {"budget_percent": 40}, {"budget_blocks": 5}, {"budget_percent": 40, "groups": "all"},
], ids=axes_id)
def test_chosen_tokens_end_with_the_residual(settings):
    """Where heads choose tokens the newest are every head's, as computed."""
    cache = make(format=by_name("int4", residual=2 * SIZE), policy="snapkv", evict="token",
                 **settings)  # fmt: skip
    random, seq, group = torch.Generator().manual_seed(0), cache.open(), cache.groups[0]
    came = [torch.zeros(0, 2, 16) for _ in range(4)]
    for count in (30, 9, *[1] * 30, 17):
        cache.begin([seq], [count])
        for layer in range(2):
            q = torch.randn(1, 4, count, 16, generator=random)
            pair = [torch.randn(1, 2, count, 16, generator=random) for _ in range(2)]
            cache.attend(layer, q, *pair, scale=0.25)
            for i, x in enumerate(pair):
                at = 2 * layer + i
                came[at] = torch.cat([came[at], x[0].transpose(0, 1)])
        cache.commit()
        cache.check()
        fill, places = group.tables[seq].length % SIZE, group.recent.places(seq)
        assert len(places) == min(2, group.tables[seq].length // SIZE)
        for layer in range(2):
            for end, place in zip((len(came[0]) - fill, len(came[0]) - fill - SIZE), places[::-1]):
                for i, x in enumerate(group.pool.read_open(layer, place, SIZE)):
                    assert torch.equal(x, came[2 * layer + i][end - SIZE : end])


def test_a_known_prefix_is_read_as_stored():
    """Sealed blocks are shared; the residual is of what a sequence computed itself."""
    cache = cache_of(prefix="hash", policy="lru", budget_blocks=16)
    driver = Computed(cache)
    first = cache.open(list(range(13)))
    empty = torch.zeros(0, 2, 16)
    driver.past[first], driver.computed[first] = [(empty, empty)] * 2, {}
    driver.step([first], [13])
    second = cache.open(list(range(13)))
    assert cache.length(second) == 12 and residual_of(cache, second) == []
    assert residual_of(cache, first) == [1, 2]
    cache.close(first)
    cache.check()


@pytest.mark.parametrize("axes, told", [
    ({"format": by_name("int4", residual=6)}, "take a multiple of it"),
    ({"retrieval": "quest"}, "has each choose among all whole blocks"),
    ({"policy": "snapkv", "budget": "adakv", "budget_percent": 50}, "blocks of its own"),
    ({"policy": "lru", "budget_blocks": 2}, "a smaller residual or a larger budget"),
])
def test_what_cannot_be_right_is_refused(axes, told):
    with pytest.raises(BadInput, match=told):
        cache_of(**axes)


def test_formats_without_loss_have_none():
    with pytest.raises(BadInput, match="without scales"):
        by_name("bf16", residual=64)
    with pytest.raises(BadInput, match="0 or more"):
        by_name("int4", residual=-64)
    with pytest.raises(BadInput, match="no layer"):
        by_name("by_layer", layers=["bf16*"], residual=64)
    mixed = by_name("by_layer", layers=["bf16", "int4*"], residual=64)
    assert [f.residual for f in mixed.each(3)] == [0, 64, 64]
