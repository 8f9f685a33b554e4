"""Tokens chosen by layer and head, against a plain account of every token that each head holds."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, KvlabError
from kvlab.window import SinkWindow
from tests.cache.driver import SCALE, make

LAYERS, QUERY_HEADS, HEADS, DIM, SIZE = 2, 4, 2, 16, 4
RECENT, SINKS = 3, 2
BASE = {"policy": "attention_mass", "evict": "token", "groups": "per_head", "budget_blocks": 4,
        "window": SinkWindow(SINKS, RECENT)}  # fmt: skip


class Account:
    """What one sequence should hold: for each layer and head its tokens, in order.

    Scores are the share of attention, the mean over the query heads of a key/value head, and over
    all queries that saw a token; a decoded token that is looked at stands for those since the last.
    """

    def __init__(self, choice="head", sealed_only=True):
        self.choice = choice
        self.k = [[torch.zeros(0, DIM) for _ in range(HEADS)] for _ in range(LAYERS)]
        self.v = copy.deepcopy(self.k)
        self.score = torch.zeros(LAYERS, HEADS, 0)
        self.steps = torch.zeros(LAYERS, HEADS, 0)
        self.seen = self.scored = 0

    def attend(self, layer, q, k, v):
        """q [Hq, T, D], k, v [T, H, D] -> out [T, Hq, D]; takes the tokens over."""
        out, self.weights = [], getattr(self, "weights", {})
        tokens, shares = q.shape[1], []
        for head in range(HEADS):
            self.k[layer][head] = torch.cat((self.k[layer][head], k[:, head]))
            self.v[layer][head] = torch.cat((self.v[layer][head], v[:, head]))
            keys, values = self.k[layer][head], self.v[layer][head]
            mine = q[head * 2 : head * 2 + 2]
            x = torch.einsum("htd,nd->htn", mine, keys) * SCALE
            hidden = torch.ones(tokens, len(keys)).triu(len(keys) - tokens + 1).bool()
            w = x.masked_fill(hidden, -torch.inf).softmax(-1)
            out.append(torch.einsum("htn,nd->thd", w, values))
            shares.append(w.mean(0).sum(0))
        self.weights[layer] = torch.stack(shares)
        return torch.cat(out, 1)

    def commit(self, count, keep, slack=False, scored=True):
        self.seen += count
        tokens = len(self.k[0][0])
        sealed, fill = tokens // SIZE * SIZE, tokens % SIZE
        over = sealed // SIZE - max(0, keep - fill) // SIZE
        if over <= (max(4, keep // SIZE // 8) if slack else 0):
            over = 0
        if over <= 0 and not scored:
            return
        old = self.score.shape[-1]
        grown = tokens if scored else max(old, sealed)  # those of an open block, too
        if grown > old:
            mean = self.score.mean(-1, keepdim=True) if old else self.score.sum(-1, True)
            self.score = torch.cat((self.score, mean.expand(-1, -1, grown - old)), -1)
            self.steps = torch.nn.functional.pad(self.steps, (0, grown - old))
        if scored:
            new = torch.stack([self.weights[n] for n in range(LAYERS)])
            queries = self.seen - self.scored if count == 1 else count
            saw = (tokens - torch.arange(tokens)).clamp_max(queries)
            if count == 1:
                new = new * saw
            self.score = (self.score * self.steps + new) / (self.steps + saw)
            self.steps, self.scored = self.steps + saw, self.seen
        if over <= 0:
            return
        score = self.score[..., :sealed].clone()
        if self.choice != "head":
            score = score.mean(1, keepdim=True).expand(-1, HEADS, -1).clone()
        if self.choice == "all":
            score = score.mean(0, keepdim=True).expand(LAYERS, -1, -1).clone()
        score[..., :SINKS] = torch.inf
        score[..., max(SINKS, tokens - RECENT) : sealed] = torch.inf
        best = score.argsort(dim=-1, descending=True, stable=True)[..., : sealed - over * SIZE]
        best = best.sort(-1).values
        self.score, self.steps = (torch.cat((x.gather(-1, best), x[..., sealed:]), -1)
                                  for x in (self.score, self.steps))  # fmt: skip
        for layer in range(LAYERS):
            for head in range(HEADS):
                stay = torch.cat((best[layer, head], torch.arange(sealed, tokens)))
                self.k[layer][head] = self.k[layer][head][stay]
                self.v[layer][head] = self.v[layer][head][stay]


class Pair:
    """A cache and the accounts of its sequences, driven by the same queries and keys."""

    def __init__(self, cache, seed=0):
        self.cache, self.accounts = cache, {}
        self.random = torch.Generator().manual_seed(seed)

    def open(self):
        seq = self.cache.open()
        self.accounts[seq] = Account(self.cache.spec.choice)
        return seq

    def step(self, seqs, counts):
        longest, cache = max(counts), self.cache
        cache.begin(seqs, counts)
        looks = longest > 1 or any(g.watch.looking for g in cache.groups)
        for layer in range(LAYERS):
            q = torch.randn(len(seqs), QUERY_HEADS, longest, DIM, generator=self.random)
            k, v = torch.randn(2, len(seqs), HEADS, longest, DIM, generator=self.random)
            out = cache.attend(layer, q, k, v, scale=SCALE)
            for row, (seq, count) in enumerate(zip(seqs, counts)):
                if count:
                    new = slice(longest - count, longest)
                    want = self.accounts[seq].attend(
                        layer, q[row, :, new], *(x[row, :, new].transpose(0, 1) for x in (k, v))
                    )
                    torch.testing.assert_close(out[row, new], want, rtol=0, atol=2e-5)
        cache.commit()
        (keep,) = cache.shares.kept(self.accounts)
        stepped = dict(zip(seqs, counts))
        for seq, account in self.accounts.items():
            count = stepped.get(seq, 0)
            account.commit(count, keep[seq], longest == 1, looks and count > 0)
        self.check()

    def check(self):
        self.cache.check()
        for seq, account in self.accounts.items():
            (group,) = self.cache.groups
            table = group.tables[seq]
            assert table.length == len(account.k[0][0]) and None not in table.ids
            for layer in range(LAYERS):
                whole = table.length // SIZE
                k, v = group.pool.read(layer, table.ids[:whole]) if whole else (None, None)
                for head in range(HEADS if whole else 0):
                    assert torch.equal(k[:, head], account.k[layer][head][: whole * SIZE])
                    assert torch.equal(v[:, head], account.v[layer][head][: whole * SIZE])


@pytest.mark.parametrize("groups", ["all", "per_layer", "per_head"])
def test_each_head_holds_what_it_looks_at(groups):
    pair = Pair(make(**BASE | {"groups": groups}))
    seq = pair.open()
    for count in (20, 7, 33, 1, 5):
        pair.step([seq], [count])
        assert pair.cache.stats().resident_tokens <= 16 + (count == 1)
    assert pair.cache.length(seq) == 66


def test_tova_keeps_what_the_last_token_looks_at():
    cache = make(**BASE | {"policy": "tova", "budget_blocks": 3, "window": SinkWindow(0, 1)})
    seq = cache.open()
    q, (k, v) = torch.randn(1, QUERY_HEADS, 40, DIM), torch.randn(2, 1, HEADS, 40, DIM)
    cache.begin([seq], [40])
    for layer in range(LAYERS):
        cache.attend(layer, q, k, v, scale=SCALE)
    cache.commit()
    (group,) = cache.groups
    found, _ = group.pool.read(0, group.tables[seq].ids)
    keys = k[0].repeat_interleave(QUERY_HEADS // HEADS, 0)
    looks = (torch.einsum("hd,hnd->hn", q[0, :, -1], keys) * SCALE).softmax(-1).mean(0)
    looks[-1] = 1.0  # one choice for all heads of a layer, as in the paper
    stay = looks.topk(12).indices.sort().values
    for head in range(HEADS):
        assert torch.equal(found[:, head], k[0, head, stay])


def test_decoded_tokens_may_exceed_the_budget_by_a_margin():
    pair = Pair(make(**BASE))
    seq = pair.open()
    pair.step([seq], [20])
    most = 0
    for _ in range(60):
        pair.step([seq], [1])
        most = max(most, pair.cache.stats().resident_tokens)
    assert 16 < most <= 16 + 5 * SIZE
    assert pair.cache.stats().resident_tokens < 16 + 5 * SIZE


def test_rows_share_a_budget_by_what_they_have_seen():
    pair = Pair(make(**BASE | {"budget_blocks": 8}))
    a, b = pair.open(), pair.open()
    pair.step([a, b], [40, 10])
    pair.step([a, b], [9, 17])
    pair.step([b], [5])
    assert pair.cache.stats().resident_tokens <= 32


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=8), st.integers(0, 99),
       st.sampled_from(["attention_mass"]), st.sampled_from([5, 20, 50, 100]))
def test_any_steps(counts, seed, policy, percent):
    axes = BASE | {"budget_blocks": None, "budget_percent": percent, "policy": policy}
    pair = Pair(make(**axes), seed)
    seq = pair.open()
    for count in counts:
        pair.step([seq], [count])
    pair.cache.close(seq)
    assert pair.cache.stats().blocks == 0
    assert pair.cache.stats().allocated_bytes == 0


@pytest.mark.parametrize("policy", ["snapkv", "expected_attention", "key_norm", "tova", "random"])
@pytest.mark.parametrize("format", ["fp32", "int8", "k4v2"])
def test_every_scorer_and_format_keeps_to_the_budget(policy, format):
    cache = make(**BASE | {"policy": policy, "format": format, "block_size": 16,
                           "budget_blocks": 3, "window": SinkWindow(2, 4)})
    prefill(cache, (100, 40, 1, 30))
    stats = cache.stats()
    assert stats.resident_tokens <= 48 and stats.tokens == 171


def prefill(cache, counts):
    """Steps of so many drawn tokens of a new sequence."""
    seq, random = cache.open(), torch.Generator().manual_seed(0)
    for count in counts:
        cache.begin([seq], [count])
        for layer in range(LAYERS):
            q = torch.randn(1, QUERY_HEADS, count, DIM, generator=random)
            k, v = torch.randn(2, 1, HEADS, count, DIM, generator=random)
            assert cache.attend(layer, q, k, v, scale=SCALE).isfinite().all()
        cache.commit()
        cache.check()


@pytest.mark.parametrize("block_size", [4, 16])
def test_allocated_is_logical_but_for_the_last_slab(block_size):
    cache = make(**BASE | {"block_size": block_size, "budget_blocks": None, "budget_percent": 10})
    prefill(cache, 8 * [512])
    stats = cache.stats()
    assert stats.allocated_bytes <= 1.15 * stats.logical_bytes


def test_a_fork_goes_its_own_way():
    pair = Pair(make(**BASE))
    a = pair.open()
    pair.step([a], [30])
    b = pair.cache.fork(a)
    pair.accounts[b] = copy.deepcopy(pair.accounts[a])
    pair.cache.spec.__dict__["budget_blocks"] = 8
    pair.step([a], [9])
    pair.step([b], [11])
    pair.step([a, b], [3, 20])
    pair.cache.close(a)
    del pair.accounts[a]
    pair.step([b], [4])


def test_a_copy_goes_its_own_way():
    pair = Pair(make(**BASE))
    seq = pair.open()
    pair.step([seq], [30])
    other = copy.deepcopy(pair.cache)
    twin = Pair(other)
    twin.accounts = copy.deepcopy(pair.accounts)
    pair.step([seq], [9])
    twin.step([seq], [12])
    pair.check()
    assert twin.cache.meter.now == twin.cache.stats().allocated_bytes


def test_what_was_chosen_among_cannot_be_cropped():
    pair = Pair(make(**BASE))
    seq = pair.open()
    pair.step([seq], [30])
    pair.step([seq], [1])
    pair.step([seq], [1])
    with pytest.raises(KvlabError, match="crop to at least 30, or to 0"):
        pair.cache.truncate(seq, 29)
    pair.cache.truncate(seq, 31)
    account = pair.accounts[seq]
    for layer in range(LAYERS):
        for kept in (account.k[layer], account.v[layer]):
            for head in range(HEADS):
                kept[head] = kept[head][:-1]
    pair.step([seq], [6])
    pair.cache.truncate(seq, 0)
    assert pair.cache.stats().blocks == 0
    pair.accounts[seq] = Account()
    pair.step([seq], [25])


def test_a_step_that_failed_leaves_no_scores():
    pair = Pair(make(**BASE))
    seq = pair.open()
    pair.step([seq], [30])
    pair.cache.begin([seq], [9])
    q = torch.randn(1, QUERY_HEADS, 9, DIM)
    pair.cache.attend(0, q, *torch.randn(2, 1, HEADS, 9, DIM), scale=SCALE)
    pair.cache.abort()
    pair.check()
    pair.step([seq], [9])


@pytest.mark.parametrize("axes, sentence", [
    ({"policy": "lru"}, "ranks blocks and no tokens"),
    ({"prefix": "hash", "policy": "snapkv"}, "shares blocks"),
    ({"offload": "host"}, "takes blocks"),
    ({"summary": "merged"}, "stands for blocks"),
    ({"retrieval": "quest"}, "chooses blocks by what they held"),
    ({"window": SinkWindow(2, 8, middle=False)}, "decides itself which tokens stay"),
    ({"evict": "block"}, "a block holds tokens of all heads"),
    ({"evict": "row"}, "must be auto, block or token"),
])  # fmt: skip
def test_what_cannot_be_right_is_refused(axes, sentence):
    with pytest.raises(BadInput, match=sentence):
        CacheSpec(**BASE | axes)


def test_a_window_of_the_model_is_refused():
    cache = make(**BASE)
    cache.begin([cache.open()], [30])
    with pytest.raises(BadInput, match="looks back 8 tokens"):
        cache.attend(0, torch.randn(1, 4, 30, DIM), *torch.randn(2, 1, 2, 30, DIM), scale=SCALE,
                     window=8)


def test_a_chunk_takes_room_for_what_stays_only():
    cache = make(**BASE | {"budget_blocks": None, "budget_percent": 10})
    prefill(cache, 4 * [512])
    stats = cache.stats()
    assert stats.peak_allocated_bytes < 2.2 * stats.allocated_bytes


def test_tokens_without_queries_leave_room_for_the_newest():
    cache = make(**BASE)
    seq = cache.open()
    k, v = torch.randn(2, 1, HEADS, 30, DIM)
    cache.begin([seq], [30])
    for layer in range(LAYERS):
        cache.store(layer, k, v)
    cache.commit()
    cache.check()
    assert cache.stats().resident_tokens <= 16
