"""SimLayerKV: which layers are lazy, what they hold, and what the others do."""

from __future__ import annotations

import pytest
import torch

from kvlab.budget import AdaKV, SimLayer
from kvlab.cache import CacheSpec
from kvlab.cache.lazy import window_share
from kvlab.core import BadInput, KvlabError
from kvlab.window import SinkWindow
from tests.cache.driver import SCALE, make

LAYERS, HEADS, DIM, WINDOW = 4, 2, 16, 4 + 8
BASE = {"policy": "snapkv", "block_size": 1, "window": SinkWindow(4, 8)}


def step(cache, seq, count, seed=0):
    """Layers 1 and 2 look at the first tokens, the others anywhere."""
    g = torch.Generator().manual_seed(seed)
    first = cache.length(seq) == 0
    cache.begin([seq], [count])
    for layer in range(LAYERS):
        q = torch.randn(1, 4, count, DIM, generator=g)
        k, v = torch.randn(2, 1, HEADS, count, DIM, generator=g)
        if layer in (1, 2):
            q[..., 0] = 20.0
            k[..., 0] = 0.0
            if first:
                k[:, :, :2, 0] = 4.0 - layer
        cache.attend(layer, q, k, v, scale=SCALE)
    cache.commit()
    cache.check()


def held(cache, seq):
    return [group.tables[seq].length for group in cache.groups]


def filled(*counts, budget, percent=100, **axes):
    cache = make(layers=LAYERS, head_dim=DIM, budget=budget, budget_percent=percent, **BASE | axes)
    seq = cache.open()
    for n, count in enumerate(counts):
        step(cache, seq, count, n)
    return cache, seq


@pytest.mark.parametrize("counts", [(200,), (120, 80), (50, 50, 50, 50)])
def test_lazy_layers_hold_the_window_and_others_everything(counts):
    """As published: no budget but the threshold."""
    cache, seq = filled(*counts, budget=SimLayer())
    assert held(cache, seq) == [200, WINDOW, WINDOW, 200]
    for group in cache.groups[1:3]:
        assert group.watch.standings.lazy[seq] > 0.9
    step(cache, seq, 1)
    assert sum(held(cache, seq)) <= 2 * 201 + 2 * (WINDOW + 1)
    child = cache.fork(seq)
    step(cache, child, 30)
    assert held(cache, child) == [231, WINDOW, WINDOW, 231]


def test_the_budget_ends_with_the_laziest_and_bytes_go():
    cache, seq = filled(200, budget=SimLayer(threshold=None), percent=60)
    first, *middle, last = held(cache, seq)
    assert (first, last) == (200, 200) and sum(middle) == 480 - 400
    lazy = [group.watch.standings.lazy[seq] for group in cache.groups]
    assert min(middle) == WINDOW == middle[lazy[1:3].index(max(lazy))]
    equal, _ = filled(200, budget="equal", percent=60, groups="per_layer")
    assert cache.stats().allocated_bytes <= 1.1 * equal.stats().allocated_bytes
    short, seq = filled(200, budget=SimLayer(), percent=5)
    assert set(held(short, seq)) == {10}  # less than the window: equal


def test_the_share_of_the_window_is_that_of_each_query():
    g, n, asked = torch.Generator().manual_seed(1), 60, 40
    q, k = torch.randn(4, asked, DIM, generator=g), torch.randn(n, HEADS, DIM, generator=g)
    x = torch.einsum("htd,nhd->htn", q, k.repeat_interleave(2, 1)) * SCALE
    at, own = torch.arange(n), torch.arange(n - asked, n)[:, None]
    w = x.masked_fill(at > own, -torch.inf)
    inside = (at < 4) | (at > own - 8)
    want = (w.softmax(-1) * inside)[:, -32:].sum(-1).mean()
    found = window_share(q, k, w.logsumexp(-1), SinkWindow(4, 8), scale=SCALE)
    torch.testing.assert_close(found, want)


def test_a_first_step_of_one_token_is_refused():
    with pytest.raises(KvlabError, match="first step needs several tokens"):
        filled(1, budget=SimLayer())


@pytest.mark.parametrize("axes, sentence", [
    ({"evict": "block"}, "single tokens; cache.evict=token"), ({"window": "none"}, "window=sink"),
    ({"policy": "lru"}, "a policy that scores"),
    ({"groups": "all"}, "only one; cache.groups=per_layer"),
    ({"budget_percent": None, "budget_blocks": 9}, "cache.budget_percent"),
    ({"budget": lambda: SimLayer(2)}, "from 0 to 1"),
    ({"budget": lambda: AdaKV(layers="simlayer")}, "nothing is left to divide among heads"),
])  # fmt: skip
def test_what_cannot_be_right_is_refused(axes, sentence):
    axes = BASE | {"budget": SimLayer, "budget_percent": 10} | axes
    with pytest.raises(BadInput, match=sentence):
        spec = CacheSpec(**axes | {"budget": axes["budget"]()})
        spec.checked_for(spec.geometry(2, 4, 2, 32))
