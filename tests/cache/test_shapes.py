"""Layers of unlike shape: key width apart from value width, groups by shape, windows that free."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlab.blocks import Alone, BlockLedger, Ground, Holding, Sequences, check_reach
from kvlab.blocks.sliding import SPARE
from kvlab.cache import CacheSpec, PagedCache
from kvlab.core import BadInput, CacheGeometry, KvlabError, LayerShape, first_seen
from kvlab.format import NAMES, by_name
from kvlab.kernel import attend_ref, attend_sdpa
from kvlab.pool import BlockPool, Workspace
from kvlab.sim.sizes import ModelShape, seen_pairs, token_bytes

WIDE, NARROW = LayerShape(1, 24, 8), LayerShape(2, 16, 16, window=6)
UNLIKE = CacheGeometry.of((NARROW, WIDE, NARROW), query_heads=4, block_size=4)


def test_the_uniform_constructor_says_the_same():
    plain = CacheGeometry(3, 4, 2, 16, 4)
    assert plain == CacheGeometry.of([LayerShape(2, 16, 16)] * 3, 4, 4)
    assert (plain.layers, plain.kv_heads, plain.head_dim, plain.group) == (3, 2, 16, 2)
    assert by_name("fp16").groups(plain) == [(0, 1, 2)]
    assert plain.elements_per_token == 2 * 3 * 2 * 16


def test_layers_of_one_shape_are_a_group():
    assert by_name("fp16").groups(UNLIKE) == [(0, 2), (1,)]
    assert UNLIKE.part((0, 2)).shape == NARROW
    with pytest.raises(KvlabError, match="no shape in common"):
        _ = UNLIKE.shape
    with pytest.raises(KvlabError, match="cannot be stored"):
        _ = UNLIKE.stored


@pytest.mark.parametrize(
    ("shape", "key"),
    [(LayerShape(0, 8, 8), "kv_heads"), (LayerShape(1, 8, 0), "v_width"),
     (LayerShape(1, 8, 8, 0), "window"), (LayerShape(3, 8, 8), "query_heads")],
)  # fmt: skip
def test_impossible_shapes_are_refused(shape, key):
    with pytest.raises(BadInput, match=f"geometry.{key}"):
        CacheGeometry.of([shape], 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_pool_stores_values_narrower_than_keys(name):
    pool = BlockPool(UNLIKE.part([1]), by_name(name), "cpu", torch.float32)
    k, v = torch.randn(8, 1, 24), torch.randn(8, 1, 8)
    pool.seal(0, [0, 1], k, v)
    keys, values = pool.read(0, [0, 1])
    assert keys.shape == k.shape and values.shape == v.shape
    want = by_name(name).dequantize(by_name(name).quantize(
        k.view(2, 4, 1, 24), v.view(2, 4, 1, 8)), torch.float32)  # fmt: skip
    assert torch.equal(keys, want[0].flatten(0, 1)) and torch.equal(values, want[1].flatten(0, 1))
    assert by_name(name).block_bytes(pool.geometry) == sum(
        plane.nbytes for plane in pool.sealed.planes.values())  # fmt: skip


@pytest.mark.parametrize(("k_width", "v_width"), [(24, 8), (8, 24), (16, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_library_attends_over_unlike_widths_as_the_reference(k_width, v_width, causal):
    q, k, v = torch.randn(4, 6, k_width), torch.randn(6, 2, k_width), torch.randn(6, 2, v_width)
    want = attend_ref.attend(q, k, v, scale=0.3, causal=causal)
    got = attend_sdpa.attend(q, k, v, scale=0.3, causal=causal)
    assert got[0].shape == (4, 6, v_width)
    torch.testing.assert_close(got, want)


def test_one_workspace_serves_unlike_layers():
    space = Workspace()
    for shape in (WIDE, NARROW, WIDE._replace(v_width=64)):
        k, v = space.take(5, shape, torch.float32, "cpu")
        assert k.shape == (5, shape.kv_heads, shape.k_width)
        assert v.shape == (5, shape.kv_heads, shape.v_width)


def filled(cache, seq, count, random):
    """A step of random contents; returns what each layer answered and what it was asked."""
    cache.begin([seq], [count])
    asked, out = [], []
    for layer, s in enumerate(cache.geometry.shapes):
        q, k, v = (torch.randn(1, heads, count, width, generator=random) for heads, width in (
            (4, s.k_width), (s.kv_heads, s.k_width), (s.kv_heads, s.v_width)))
        out.append(cache.attend(layer, q, k, v, scale=0.3, window=s.window))
        asked.append((q[0], k[0].transpose(0, 1), v[0].transpose(0, 1)))
    cache.commit()
    return asked, out


@pytest.mark.parametrize("groups", ["all", "per_layer"])
def test_a_cache_of_unlike_layers_is_the_reference_and_its_windows_free_blocks(groups):
    random = torch.Generator().manual_seed(0)
    cache = PagedCache(UNLIKE, CacheSpec(format="fp32", block_size=4, groups=groups))
    seq, past = cache.open(), [[], [], []]
    for count in (30, 1, 17, 1, 5, 40, 3):
        asked, out = filled(cache, seq, count, random)
        for layer, (q, k, v) in enumerate(asked):
            past[layer].append((k, v))
            keys, values = (torch.cat(x) for x in zip(*past[layer]))
            want, _ = attend_ref.attend(
                q, keys, values, scale=0.3, causal=True, window=UNLIKE.shapes[layer].window,
                q_start=len(keys) - count,
            )
            torch.testing.assert_close(out[layer][0].transpose(0, 1), want)
        cache.check()
    held = {group.pool.shape: group.ledger.held_count for group in cache.groups}
    assert held[WIDE] == -(-97 // 4)
    assert held[NARROW] <= (6 + SPARE) // 4 + 2 < held[WIDE]
    assert cache.stats().logical_bytes < cache.stats().nominal_bytes
    cache.close(seq)
    assert cache.stats().blocks == 0


def test_a_crop_behind_a_window_is_refused_and_a_short_one_is_not():
    cache = PagedCache(UNLIKE, CacheSpec(format="fp32", block_size=4))
    seq = cache.open()
    filled(cache, seq, 90, torch.Generator().manual_seed(0))
    cache.truncate(seq, 90 - SPARE)
    with pytest.raises(KvlabError, match="sliding window of 6 would reach back"):
        cache.truncate(seq, 20)
    child = cache.fork(seq)
    with pytest.raises(KvlabError, match="would reach back"):
        cache.truncate(child, 20)
    cache.truncate(seq, 0)
    filled(cache, seq, 10, torch.Generator().manual_seed(1))
    cache.check()


def test_a_call_that_wants_more_than_the_window_is_refused_once_it_is_gone():
    cache = PagedCache(UNLIKE.part([0]), CacheSpec(format="fp32", block_size=4))
    seq, x = cache.open(), torch.randn(1, 4, 90, 16)
    cache.begin([seq], [90])
    cache.attend(0, x, x[:, :2], x[:, :2], scale=1.0)  # as a 4D mask of the caller's may ask
    cache.commit()
    cache.begin([seq], [1])
    with pytest.raises(KvlabError, match="more than the sliding window of 6"):
        cache.attend(0, x[:, :, :1], x[:, :2, :1], x[:, :2, :1], scale=1.0)
    cache.abort()


def test_shared_prefixes_keep_what_a_window_left_behind():
    spec = CacheSpec(format="fp32", block_size=4, prefix="hash")
    cache = PagedCache(UNLIKE, spec)
    ids = list(range(60))
    seq = cache.open(ids)
    cache.tell(seq, ids)
    filled(cache, seq, 60, torch.Generator().manual_seed(0))
    cache.close(seq)
    assert cache.length(cache.open(ids)) == 56
    cache.check()


@pytest.mark.parametrize(
    ("axes", "sentence"),
    [({"window": "sink", "summary": "merged"}, "cannot tell which entries"),
     ({"evict": "token", "policy": "snapkv", "budget_percent": 50}, "stand side by side")],
)  # fmt: skip
def test_what_a_window_leaves_no_room_for_is_refused(axes, sentence):
    more = {"policy": "lru", "budget_percent": 50} | axes
    with pytest.raises(BadInput, match=sentence):
        CacheSpec(block_size=4, **more).checked_for(UNLIKE)


windows = st.one_of(st.none(), st.integers(1, 40), st.integers(-40, -1))


@given(st.integers(0, 200), windows)
def test_the_first_position_seen_is_that_of_the_mask(position, window):
    seen = attend_ref.visible(1, position + 1, position, 0, True, window, "cpu")[0]
    assert int(seen.nonzero()[0]) == max(0, first_seen(position, window))
    if window is not None:
        other = [k // -window == position // -window if window < 0 else k > position - window
                 for k in range(position + 1)]  # fmt: skip
        assert seen.tolist() == other
    assert LayerShape(1, 8, 8, window).seen(position + 1) == int(seen.sum())
    assert seen_pairs(np.array(position + 1.0), window) == sum(
        LayerShape(1, 8, 8, window).seen(n + 1) for n in range(position + 1))  # fmt: skip


@given(windows, st.integers(1, 16), st.lists(st.integers(1, 60), max_size=8))
def test_a_window_lets_go_only_what_no_later_token_sees(window, size, counts):
    holding, length = Holding(Alone(Ground(BlockLedger(None), size)), reach=window), 0
    sequences = Sequences([holding])
    seq, _ = sequences.open()
    for count in counts:
        check_reach(holding, seq, length, window)  # the first of the step looks back farthest
        sequences.begin([seq], [count])
        sequences.commit()
        length += count
        behind = max(0, first_seen(length, window) - SPARE)
        assert holding.tables[seq].holes == list(range(behind // size))
        assert holding.claims[seq].let_go == behind // size * size


@pytest.mark.parametrize("name", NAMES)
def test_the_simulator_counts_unlike_layers_as_the_formats_do(name):
    g = CacheGeometry.of((LayerShape(2, 32, 16), LayerShape(1, 64, 64, 9)), 4, 32)
    counted = token_bytes(name, ModelShape.of(g, 1.0), 32) * 32
    assert counted == pytest.approx(by_name(name).block_bytes(g))
    layers = [ModelShape.of(g.part([i]), 0.0).prefill_flops(50) for i in (0, 1)]
    assert ModelShape.of(g, 0.0).prefill_flops(50) == pytest.approx(sum(layers))
    seen = sum(min(i + 1, 9) for i in range(50))
    assert layers[1] == pytest.approx(4 * (64 + 64) * 2 * seen)


@pytest.mark.parametrize("observed", [False, True])
def test_sinks_join_what_the_kernels_read(observed):
    listens = {"policy": "attention_mass", "budget_blocks": 9, "evict": "block"} if observed else {}
    spec = CacheSpec(format="fp32", block_size=4, kernels="triton", **listens)
    if torch.cuda.is_available():
        pytest.skip("kernels run on the CPU only where Triton interprets them")
    cache, random = PagedCache(CacheGeometry(1, 4, 2, 32, 4), spec), torch.Generator()
    assert cache.groups[0].pool.why_plain is None
    seq, sinks, past = cache.open(), torch.randn(4), []
    for count in (13, 1, 1):
        q, k, v = (torch.randn(1, h, count, 32, generator=random) for h in (4, 2, 2))
        past.append((k[0].transpose(0, 1), v[0].transpose(0, 1)))
        cache.begin([seq], [count])
        assert cache.running.decodes == (count == 1)
        out = cache.attend(0, q, k, v, scale=0.2, sinks=sinks)
        cache.commit()
        keys, values = (torch.cat(x) for x in zip(*past))
        want = attend_ref.attend(q[0], keys, values, scale=0.2, causal=True,
                                 q_start=len(keys) - count)  # fmt: skip
        want = attend_ref.with_sinks(want, sinks)[0].transpose(0, 1)
        torch.testing.assert_close(out[0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [(LayerShape(2, 32, 64), "keys of width 32 and values of 64 differ"),
     (LayerShape(2, 24, 24), "24 is no power of two"),
     (LayerShape(2, 32, 32, None, 5.0), "softly capped at 5"), (LayerShape(2, 256, 256), None)],
)  # fmt: skip
def test_a_pool_says_why_plain_torch_serves_it(shape, reason):
    geometry = CacheGeometry.of([shape], 4, 16)
    pool = BlockPool(geometry, by_name("bf16"), "cpu", torch.float32, "triton")
    assert (pool.fused is None) == bool(reason) and (pool.why_plain or "").find(reason or "") >= 0
