"""Budgets by head, against a plain account of the tokens that each head holds, list by list."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.budget import AdaKV, DuoAttention
from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.window import SinkWindow
from tests.cache.driver import SCALE, held_bytes, make

LAYERS, QUERY_HEADS, HEADS, DIM, SIZE = 2, 4, 2, 32, 4
SINKS, RECENT = 2, 3
GATES = [[0.1, 0.9], [0.7, 0.2]]
BASE = {"policy": "attention_mass", "head_dim": DIM, "window": SinkWindow(SINKS, RECENT)}


class Head:
    """Tokens of one head of one layer: keys and values, and how the sealed ones stand."""

    def __init__(self):
        self.k = self.v = torch.zeros(0, DIM)
        self.score, self.steps, self.scored = [], [], 0  # steps: queries that saw each
        self.tail = [], []  # the same of tokens behind the sealed ones

    def attend(self, q, k, v):
        """q [G, T, D] over what there is and k, v [T, D]; out, and each token's share."""
        self.k, self.v = torch.cat((self.k, k)), torch.cat((self.v, v))
        x = torch.einsum("gtd,nd->gtn", q, self.k) * SCALE
        w = x.masked_fill(torch.ones_like(x[0]).triu(len(self.k) - len(k) + 1).bool(), -torch.inf)
        w = w.softmax(-1)
        self.share = w.mean(0).sum(0).tolist()
        return torch.einsum("gtn,nd->tgd", w, self.v)

    def rank(self, fill):
        """The sealed tokens, the best first, with their scores; what the window keeps is first."""
        n = len(self.score)
        kept = {i for i in range(n) if i < SINKS or i >= n + fill - RECENT}
        worth = [torch.inf if i in kept else s for i, s in enumerate(self.score)]
        return sorted(range(n), key=lambda i: -worth[i]), worth

    def keep(self, places):
        sealed = len(self.score)
        places = sorted(places)
        stay = [*places, *range(sealed, len(self.k))]
        self.k, self.v = self.k[stay], self.v[stay]
        self.score = [self.score[i] for i in places]
        self.steps = [self.steps[i] for i in places]


class Pair:
    """A cache and an account of each of its sequences, driven by the same queries and keys."""

    def __init__(self, cache, seed=0):
        self.cache, self.random = cache, torch.Generator().manual_seed(seed)
        self.heads = {}

    def open(self):
        seq = self.cache.open()
        self.heads[seq] = [[Head() for _ in range(HEADS)] for _ in range(LAYERS)]
        return seq

    def step(self, seq, count):
        cache = self.cache
        cache.begin([seq], [count])
        looks = count > 1 or any(g.watch.looking for g in cache.groups)
        for layer in range(LAYERS):
            q = torch.randn(1, QUERY_HEADS, count, DIM, generator=self.random)
            k, v = torch.randn(2, 1, HEADS, count, DIM, generator=self.random)
            k = k * torch.tensor([1, 3.0])[:, None, None]  # one head looks at few
            out = cache.attend(layer, q, k, v, scale=SCALE)[0]
            want = [self.heads[seq][layer][h].attend(q[0, 2 * h : 2 * h + 2], k[0, h], v[0, h])
                    for h in range(HEADS)]  # fmt: skip
            atol = 2e-3 if cache.spec.kernels == "triton" else 2e-5
            torch.testing.assert_close(out, torch.cat(want, 1), rtol=0, atol=atol)
        cache.commit()
        ((keep, *_),) = [cache.shares.kept([seq])]
        self.choose(seq, keep[seq], count, looks, cache.sequences.length(seq))
        self.check()

    def choose(self, seq, keep, count, looks, seen):
        slack = count == 1
        heads = [head for layer in self.heads[seq] for head in layer]
        for head in heads:
            sealed = len(head.score) + (len(head.k) - len(head.score)) // SIZE * SIZE
            fill = len(head.k) - sealed
            score, steps = head.score + head.tail[0], head.steps + head.tail[1]
            mean = sum(score) / max(1, len(score))
            new = len(head.k) - len(score)
            score, steps = score + new * [mean], steps + new * [0]
            if looks:
                queries = seen - head.scored if slack else count
                saw = [min(len(head.k) - i, queries) for i in range(len(head.k))]
                score = [(s * n + w * (c if slack else 1)) / (n + c)
                         for s, n, c, w in zip(score, steps, saw, head.share)]
                steps = [n + c for n, c in zip(steps, saw)]
                head.scored = seen
            head.score, head.steps = score[:sealed], steps[:sealed]
            head.tail = score[sealed:], steps[sealed:]
        held = -(-sum(len(head.score) for head in heads) // SIZE // len(heads))
        total = sum(len(head.score) for head in heads) // SIZE
        keep = max(0, keep - fill) // SIZE
        over = held - keep
        if over <= (max(4, self.kept // 8) if slack else 0) or (not slack and
                                                                keep * len(heads) >= total):
            return
        self.divide(self.heads[seq], keep, fill)

    def divide(self, layers, keep, fill):
        floor = self.cache.spec.budget.floor
        for layer in layers:
            offers, least = [], min(keep, -(-int(floor * keep * SIZE) // SIZE))
            for h, head in enumerate(layer):
                order, worth = head.rank(fill)
                for j in range(len(order) // SIZE):
                    mean = sum(worth[i] for i in order[j * SIZE : (j + 1) * SIZE]) / SIZE
                    offers.append((-(torch.inf if j < least else mean), h, j))
            taken = [h for _, h, _ in sorted(offers)[: HEADS * keep]]
            for h, head in enumerate(layer):
                head.keep(head.rank(fill)[0][: SIZE * taken.count(h)])

    @property
    def kept(self):
        return self.cache.shares.kept([next(iter(self.heads))])[0][next(iter(self.heads))] // SIZE

    def check(self):
        self.cache.check()
        (group,) = self.cache.groups
        for seq, layers in self.heads.items():
            table = group.tables[seq]
            whole = table.ids[: table.length // SIZE]
            rows = group.pool.rows(whole)
            for layer in range(LAYERS):
                k, v = group.pool.read(layer, whole)
                for h, head in enumerate(layers[layer]):
                    there = torch.from_numpy(rows[:, layer, h] >= 0).repeat_interleave(SIZE)
                    n = len(head.score)
                    assert torch.equal(k[there, h], head.k[:n])
                    assert torch.equal(v[there, h], head.v[:n])


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_each_head_holds_the_best_of_its_layer(kernels):
    pair = Pair(make(**BASE, budget=AdaKV(), budget_blocks=5, kernels=kernels), seed=0)
    seq = pair.open()
    held = set()
    for count in (33, 1, 1) if kernels == "triton" else (20, 7, 33, 1, 5, *(30 * (1,)), 9):
        pair.step(seq, count)
        held.add(len({len(head.score) for layer in pair.heads[seq] for head in layer}))
    assert max(held) > 1, "heads hold unlike numbers of tokens"
    assert pair.cache.stats().resident_tokens <= 20 + 4 * SIZE


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=7), st.integers(0, 99),
       st.sampled_from([5, 20, 50, 100]), st.sampled_from([0.0, 0.2, 1.0]))
def test_any_steps(counts, seed, percent, floor):
    pair = Pair(make(**BASE, budget=AdaKV(floor), budget_percent=percent), seed)
    seq = pair.open()
    for count in counts:
        pair.step(seq, count)
    pair.cache.close(seq)
    assert pair.cache.stats().allocated_bytes == 0 and held_bytes(pair.cache) == 0


def prefilled(count=400, steps=1, seed=0, **axes):
    """A cache after chunks of drawn tokens."""
    cache, g = make(**BASE | axes), torch.Generator().manual_seed(seed)
    seq = cache.open()
    for _ in range(steps):
        cache.begin([seq], [count])
        for layer in range(LAYERS):
            q = torch.randn(1, QUERY_HEADS, count, DIM, generator=g)
            k, v = torch.randn(2, 1, HEADS, count, DIM, generator=g)
            cache.attend(layer, q, k * torch.tensor([1, 3.0])[:, None, None], v, scale=SCALE)
        cache.commit()
        cache.check()
    return cache, seq


@pytest.mark.parametrize("format", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("policy", ["snapkv", "expected_attention", "key_diff", "compactor"])
def test_bytes_are_those_of_the_equal_budget(policy, format):
    """Allocated is the sum over heads: dividing unlike costs nothing but a part of one slab."""
    how = {"policy": policy, "format": format, "budget_percent": 25, "block_size": 4}
    equal, unlike = (prefilled(**how, budget=budget)[0].stats() for budget in ("equal", "adakv"))
    assert unlike.allocated_bytes <= 1.1 * equal.allocated_bytes
    assert abs(unlike.resident_tokens - equal.resident_tokens) <= 4


def test_a_floor_of_one_keeps_what_equal_budgets_keep():
    caches = [prefilled(budget=b, budget_percent=20) for b in ("equal", AdaKV(floor=1.0))]
    (a, b) = (cache.groups[0] for cache, _ in caches)
    for layer in range(LAYERS):
        kept = [g.pool.read(layer, g.tables[seq].ids)[0] for g, (_, seq) in zip((a, b), caches)]
        assert torch.equal(*kept)


def test_pyramid_and_heads_compose():
    cache, seq = prefilled(budget=AdaKV(layers="pyramid"), budget_percent=20)
    first, last = (g.pool.held(g.tables[seq].ids).sum() for g in cache.groups)
    assert first > 3 * last
    unlike = cache.groups[0].pool.held(cache.groups[0].tables[seq].ids)[0]
    assert unlike[0] != unlike[1]


def test_retrieving_heads_keep_everything_and_the_others_the_window():
    cache, seq = prefilled(budget=DuoAttention(GATES), budget_percent=51)
    (group,) = cache.groups
    held = group.pool.held(group.tables[seq].ids)
    assert held[0, 1] == held[1, 0] == 100  # of 400 tokens in blocks of 4
    assert held[0, 0] <= 4 and held[1, 1] <= 4
    assert cache.stats().resident_tokens <= 0.51 * 400


def test_duo_goes_on_over_chunks():
    cache, seq = prefilled(100, 4, budget=DuoAttention(GATES), budget_percent=60)
    (group,) = cache.groups
    held = group.pool.held(group.tables[seq].ids)
    assert held[0, 1] == held[1, 0] == 100 and held.sum() <= 0.6 * 400


def test_a_fork_and_a_copy_go_their_own_way():
    pair = Pair(make(**BASE, budget=AdaKV(), budget_blocks=5))
    seq = pair.open()
    pair.step(seq, 40)
    other = pair.cache.fork(seq)
    pair.heads[other] = copy.deepcopy(pair.heads[seq])
    twin = copy.deepcopy(pair.cache)
    pair.cache.close(other)
    del pair.heads[other]
    pair.step(seq, 9)
    assert twin.meter.now == twin.stats().allocated_bytes
    twin.check()


def test_gates_come_from_a_file(tmp_path):
    path = tmp_path / "gates.json"
    path.write_text(json.dumps(GATES))
    assert DuoAttention(str(path)).gates == ((0.1, 0.9), (0.7, 0.2))


@pytest.mark.parametrize("axes, sentence", [
    ({"budget": "adakv", "evict": "block"}, "a number of tokens of its own"),
    ({"budget": "adakv", "groups": "per_layer"}, "a number of tokens of its own"),
    ({"budget": "adakv", "policy": "lru"}, "a policy that scores"),
    ({"budget": lambda: AdaKV(floor=2)}, "from 0 to 1"),
    ({"budget": lambda: AdaKV(layers="adakv")}, "divides among heads itself"),
    ({"budget": lambda: DuoAttention()}, "a number for each key/value head"),
    ({"budget": lambda: DuoAttention("no.json")}, "cannot be read"),
    ({"budget": lambda: DuoAttention([[1.0, 2.0]])}, "must be 2 layers of 2"),
])  # fmt: skip
def test_what_cannot_be_right_is_refused(axes, sentence):
    axes = {"policy": "snapkv", "budget_percent": 10} | axes
    with pytest.raises(BadInput, match=sentence):
        budget = axes["budget"]
        spec = CacheSpec(**axes | {"budget": budget() if callable(budget) else budget})
        spec.checked_for(spec.geometry(2, 4, 2, 32))
