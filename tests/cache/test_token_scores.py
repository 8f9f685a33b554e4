"""Scores of single tokens by head, against their definitions written out, and what they keep."""

from __future__ import annotations

import math

import pytest
import torch

from kvlab import policy
from kvlab.cache import CacheSpec, scores
from kvlab.cache.standing import Heard, Standing
from kvlab.core import BadInput
from kvlab.kernel import shares_ref
from kvlab.window import SinkWindow
from tests.cache.driver import SCALE, make

HEADS, KV_HEADS, DIM = 4, 2, 16
METHODS = ["attention_mass", "h2o", "snapkv", "expected_attention", "key_norm", "key_diff", "lagkv",
           "compactor", "rkv", "tova", "random"]  # fmt: skip


def drawn(tokens, seed=0):
    """q [Hq, n, D], k and v [n, H, D], and lse [Hq, n] of causal attention."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, tokens, DIM, generator=g)
    k, v = torch.randn(2, tokens, KV_HEADS, DIM, generator=g)
    x = weights(q, k)
    return q, k, v, x.logsumexp(-1)


def weights(q, k):
    """Causal logits [Hq, n, n]."""
    x = torch.einsum("htd,nhd->htn", q, k.repeat_interleave(HEADS // KV_HEADS, 1)) * SCALE
    return x.masked_fill(torch.ones(len(k), len(k)).triu(1).bool(), -torch.inf)


def of_tokens(name, q, k, v, lse, **parameters):
    scorer = scores.by_name(name, **parameters)
    return scorer.of_tokens(q, k, v, lse, scale=SCALE, shares=shares_ref.token_shares)


def test_key_diff_is_the_cosine_to_the_mean_direction():
    q, k, v, lse = drawn(40)
    anchor = torch.nn.functional.normalize(k, dim=-1).mean(0, keepdim=True)
    want = 1 - torch.nn.functional.cosine_similarity(k, anchor, dim=-1).T
    torch.testing.assert_close(of_tokens("key_diff", q, k, v, lse), want)


def test_lagkv_ranks_tokens_by_the_partition_behind():
    q, k, v, lse = drawn(3 + 3 * 5 + 2)
    found = of_tokens("lagkv", q, k, v, lse, lag=5, sinks=3)
    assert (found[:, :3] == 1).all() and (found[:, 3 + 2 * 5 :] == 1).all()
    for head in range(KV_HEADS):
        for part in range(2):
            total = 0
            for x in (k, v):
                own = x[3 + 5 * part : 3 + 5 * part + 5, head]
                later = x[3 + 5 * part + 5 : 3 + 5 * part + 10, head]
                low, high = later.amin(0), later.amax(0)
                total = total + ((own - low) / (high - low)).std(-1).softmax(-1)
            order = total.argsort()
            want = torch.empty(5)
            want[order] = torch.arange(5) / 5
            torch.testing.assert_close(found[head, 3 + 5 * part : 8 + 5 * part], want)


def test_lagkv_keeps_the_newest_where_nothing_can_be_measured():
    found = of_tokens("lagkv", *drawn(9), lag=5, sinks=3)
    assert (found[:, :3] == 1).all() and (found[:, 3:].diff() > 0).all()


def test_leverage_is_that_of_keys_before_rotation():
    _, k, _, _ = drawn(60)
    scorer = scores.by_name("compactor", sketch=DIM)
    x = k.transpose(0, 1) - k.transpose(0, 1).mean(1, keepdim=True)
    want = (x @ torch.linalg.pinv(x)).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(scorer.leverage(k), want, rtol=2e-3, atol=2e-4)
    scorer.rotary = 1.0 / 100 ** (torch.arange(DIM // 2) / (DIM // 2))
    angle = torch.arange(500, 560)[:, None] * scorer.rotary  # wherever the text stands
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = k.chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    torch.testing.assert_close(scorer.leverage(rotated), want, rtol=2e-2, atol=2e-3)


def test_compactor_blends_leverage_and_attention_of_a_piece():
    q, k, v, lse = drawn(40)
    found = of_tokens("compactor", q, k, v, lse, piece=16, blend=0.5)
    scorer = scores.by_name("compactor", piece=16)
    attention = torch.zeros(KV_HEADS, 32)
    for at in range(0, 32, 16):
        mine = slice(8 + at, 24 + at)
        x = torch.einsum("htd,nhd->htn", q[:, mine], k[mine].repeat_interleave(2, 1)) * SCALE
        attention[:, at : at + 16] = x.softmax(-1).sum(1).unflatten(0, (KV_HEADS, 2)).mean(1)
    attention = attention * v[8:].norm(dim=-1).T
    padded = torch.nn.functional.pad(attention, (1, 1))
    attention = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
    parts = scorer.leverage(k[8:]), attention
    lever, looked = ((x - x.mean()) / x.std() for x in parts)
    torch.testing.assert_close(found[:, 8:], 0.5 * lever + looked, rtol=1e-4, atol=1e-4)
    assert (found[:, :8] == found.amax()).all()


def test_rkv_is_attention_less_redundancy():
    q, k, v, lse = drawn(30)
    k[20] = k[5]  # said twice: the newest that it repeats is spared, and so on for each
    lse = weights(q, k).logsumexp(-1)
    found = of_tokens("rkv", q, k, v, lse, mix=0.3)
    w = weights(q, k).softmax(-1)[:, -8:].mean(1).unflatten(0, (KV_HEADS, 2)).amax(1)
    w = torch.nn.functional.max_pool1d(w, 7, 1, 3)
    for head in range(KV_HEADS):
        x = torch.nn.functional.normalize(k[:, head], dim=-1)
        alike = (x @ x.T).fill_diagonal_(0)
        for i in range(30):
            over = [j for j in range(30) if alike[i, j] > 0.5]
            alike[i, max(over, default=0)] = 0
        want = 0.3 * w[head] - 0.7 * alike.mean(0).softmax(-1)
        torch.testing.assert_close(found[head], want)


def test_half_life_lets_go_of_what_once_mattered():
    plain, short = scores.Mass(), scores.Mass(half_life=64)
    assert [short.weight(n, 1) for n in range(3)] == [plain.weight(n, 1) for n in range(3)]
    assert short.weight(500, 64) == 0.5 and short.weight(500, 128) == 0.75
    assert math.isclose(short.weight(500, 1), 1 - 0.5 ** (1 / 64))
    with pytest.raises(BadInput, match="half_life"):
        scores.Mass(half_life=0)


def centres(layers=2, seed=5):
    """Drawn ones: a centre, and the mean length, which is more."""
    g = torch.Generator().manual_seed(seed)
    real, imaginary, more = torch.randn(3, layers, HEADS, DIM // 2, generator=g)
    norm = torch.hypot(real, imaginary) + more.abs()
    parts = {"real": real, "imaginary": imaginary, "norm": norm}
    return {name: x.tolist() for name, x in parts.items()}


def rotated(x, angle):
    """x [n, H, D] turned by angle [n, D / 2]."""
    first, second = x.chunk(2, -1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def test_triattention_is_a_series_in_the_distance():
    """The formula of the paper, written out: amplitudes, phases, and what has no direction."""
    q, k, v, lse = drawn(20)
    told, at, seen = centres(), 7 + torch.arange(20), 60
    scorer = scores.by_name("triattention", centres=told, reach=9)
    scorer.rotary = 1.0 / 50 ** (torch.arange(DIM // 2) / (DIM // 2))
    scorer.place = scores.Place(1, seen)
    real, imaginary, norm = (torch.tensor(told[n])[1] for n in ("real", "imaginary", "norm"))
    want = torch.zeros(HEADS, 20)
    for head in range(HEADS):
        first, second = k[:, head // 2].chunk(2, -1)
        amplitude = torch.hypot(real, imaginary)[head] * torch.hypot(first, second)
        phase = torch.atan2(imaginary, real)[head] - torch.atan2(second, first)
        for ahead in (1, 2, 4, 8):
            distance = (seen - at + ahead)[:, None] * scorer.rotary
            want[head] += (amplitude * torch.cos(distance + phase)).sum(-1) / 4
        beyond = norm[head] - torch.hypot(real, imaginary)[head]
        want[head] += (beyond * torch.hypot(first, second)).sum(-1)
    want = (want - want.mean(-1, keepdim=True)) / want.std(-1, correction=0, keepdim=True)
    stored = rotated(k, at[:, None] * scorer.rotary)
    found = scorer.of_tokens(q, stored, v, lse, scale=SCALE, shares=None)
    torch.testing.assert_close(found, want.unflatten(0, (KV_HEADS, 2)).amax(1), atol=1e-4, rtol=0)
    scorer.place = scores.Place(1, seen, head=1)
    alone = scorer.of_tokens(q[2:], stored[:, 1:], v[:, 1:], lse[2:], scale=SCALE, shares=None)
    torch.testing.assert_close(alone, found[1:])


@pytest.mark.parametrize("told, inv_freq, sentence", [
    (None, True, "python -m kvlab.model.centres"), ("no.json", True, "cannot be read"),
    (centres(layers=1), True, "must be 2 layers of 4 query heads with 8 pairs"),
    (centres(), False, "frequencies of plain rotary positions"),
])  # fmt: skip
def test_centres_of_another_model_are_refused(told, inv_freq, sentence):
    with pytest.raises(BadInput, match=sentence):
        make(head_dim=DIM, policy=policy.TriAttention(told), budget_percent=10,
             inv_freq=torch.ones(DIM // 2) if inv_freq else None)


def kept(name, **parameters):
    """Which tokens each head keeps of one chunk, as sets, [layer][head]."""
    policies = policy.by_name(name, **parameters)
    cache = make(head_dim=DIM, policy=policies, evict="token", groups="per_head", block_size=1,
                 inv_freq=0.5 ** torch.arange(DIM // 2), budget_blocks=40,
                 window=SinkWindow(1, 1))  # fmt: skip
    seq, g = cache.open(), torch.Generator().manual_seed(1)
    for count in (100, 100):
        cache.begin([seq], [count])
        for layer in range(2):
            q = torch.randn(1, HEADS, count, DIM, generator=g)
            k, v = torch.randn(2, 1, KV_HEADS, count, DIM, generator=g)
            cache.attend(layer, q, k, v, scale=SCALE)
        cache.commit()
    (group,) = cache.groups
    found = (group.pool.read(layer, group.tables[seq].ids)[0] for layer in range(2))
    return [[{tuple(token) for token in keys[:, head].tolist()} for head in range(KV_HEADS)]
            for keys in found]  # fmt: skip


def test_every_method_keeps_tokens_of_its_own():
    """An adapter that silently runs another method is the fault that audits find most."""
    each = {name: kept(name) for name in METHODS} | {
        "attention_mass, half-life": kept("attention_mass", half_life=8),
        "triattention": kept("triattention", centres=centres())}
    names = list(each)
    for n, a in enumerate(names):
        for b in names[n + 1 :]:
            assert each[a] != each[b], (a, b)


def test_h2o_hears_of_every_decoded_token():
    """And scores are sums over all queries, those of single tokens included."""
    cache = make(layers=1, head_dim=DIM, policy="h2o", block_size=1, budget_percent=100,
                 window=SinkWindow(1, 1))  # fmt: skip
    (group,), seq = cache.groups, cache.open()
    q, k, v, _ = drawn(12)
    for start, end in ((0, 6), *((n, n + 1) for n in range(6, 12))):
        cache.begin([seq], [end - start])
        assert group.watch.looking == (end - start == 1)
        new = slice(start, end)
        cache.attend(0, q[None, :, new], *(x[new].transpose(0, 1)[None] for x in (k, v)),
                     scale=SCALE)  # fmt: skip
        cache.commit()
    want = weights(q, k).softmax(-1).unflatten(0, (KV_HEADS, 2)).mean(1).sum(1)
    torch.testing.assert_close(group.watch.standings[seq].score[0], want)


@pytest.mark.parametrize("name", ["h2o", "kvzip", "lagkv", "compactor", "rkv", "triattention"])
def test_what_ranks_tokens_only_is_refused_for_blocks(name):
    with pytest.raises(BadInput, match="ranks tokens and no blocks"):
        more = {"centres": centres()} if name == "triattention" else {}
        CacheSpec(policy=policy.by_name(name, **more), budget_percent=10, evict="block")


def test_snapkv_by_block_and_layer_is_chunkkv():
    """ChunkKV (https://arxiv.org/abs/2502.00299): SnapKV's scores summed over the heads of a layer,
    the mean of each chunk, whole chunks kept."""
    size, keep = 4, 4
    cache = make(head_dim=DIM, policy="snapkv", evict="block", groups="per_layer", block_size=size,
                 budget_percent=100 * keep / 6, window=SinkWindow(0, 1))  # fmt: skip
    seq, g = cache.open(), torch.Generator().manual_seed(3)
    keys, stay = [], []
    cache.begin([seq], [24])
    for layer in range(2):
        q, (k, v) = torch.randn(1, HEADS, 24, DIM, generator=g), torch.randn(
            2, 1, KV_HEADS, 24, DIM, generator=g)
        keys.append(k[0].transpose(0, 1))
        cache.attend(layer, q, k, v, scale=SCALE)
        w = weights(q[0], keys[-1]).softmax(-1).mean(1)
        w = torch.nn.functional.avg_pool1d(w, 5, 1, 2).sum(0)
        stay.append(w.unflatten(0, (-1, size)).mean(-1))
    cache.commit()
    for layer, (group, chunk) in enumerate(zip(cache.groups, stay)):
        table = group.tables[seq].ids
        chunk[-1] = torch.inf  # the window's
        kept = [i for i, block in enumerate(table) if block is not None]
        assert kept == sorted(chunk.topk(keep).indices.tolist()), layer
        read = group.pool.read(0, [table[i] for i in kept])[0]
        assert torch.equal(read, keys[layer].unflatten(0, (-1, size))[kept].flatten(0, 1))
    spec = CacheSpec(policy="snapkv", budget_percent=10, evict="block", groups="per_layer",
                     block_size=20)  # fmt: skip
    assert spec.granularity == "(blocks of 20, each layer as ChunkKV)"


@pytest.mark.parametrize("axes, told", [
    ({}, ""), ({"evict": "block"}, "(blocks of 64, all layers alike)"),
    ({"groups": "per_layer"}, "(tokens, each layer)"), ({"policy": "lru"}, ""),
    ({"offload": "host"}, "(blocks of 64, all layers alike)"),
])  # fmt: skip
def test_a_method_bears_its_name_at_its_published_granularity_only(axes, told):
    assert CacheSpec(**{"policy": "snapkv", "budget_percent": 10} | axes).granularity == told


def test_attention_is_a_mean_over_those_who_saw_it_and_h2o_sums_it():
    """Against one pass over all queries, however they came in chunks."""
    q, k, v, lse = drawn(30)
    w = weights(q, k).softmax(-1).unflatten(0, (KV_HEADS, 2)).mean(1)  # [H, queries, n]
    for name, want in (("observed", w.sum(1) / (30 - torch.arange(30))), ("h2o", w.sum(1))):
        scorer, found = scores.by_name(name), None
        for start, end in ((0, 11), (11, 12), (12, 30)):
            new = scorer.of_tokens(q[:, start:end], k[:end], v[:end], lse[:, start:end],
                                   scale=SCALE, shares=shares_ref.token_shares)[None]
            if found is None:
                found = Standing(torch.zeros_like(new), torch.zeros_like(new))
            found = found.grown(end).moved(scorer, new, Heard(end - start, end - start, 0))
        torch.testing.assert_close(found.score[0], want)
    capped = scores.by_name("observed")
    capped.softcap = 1e6  # a cap that changes nothing, by the other way through the code
    plain = of_tokens("observed", q, k, v, lse)
    torch.testing.assert_close(capped.of_tokens(q, k, v, lse, scale=SCALE, shares=None), plain,
                               rtol=1e-4, atol=1e-5)  # fmt: skip


def test_a_decoded_token_that_is_looked_at_stands_for_those_since_the_last_look():
    scorer = scores.by_name("observed", half_life=6)
    old = Standing(torch.full((1, 1, 4), 0.5), torch.tensor([[[12.0, 12, 12, 0]]]))
    moved = old.moved(scorer, torch.full((1, 1, 4), 0.1), Heard(1, 6, 1))
    saw = torch.tensor([5.0, 4, 3, 2])
    torch.testing.assert_close(moved.steps[0, 0], torch.tensor([6.0, 6, 6, 0]) + saw)
    want = (torch.tensor([3.0, 3, 3, 0]) + 0.1 * saw) / moved.steps[0, 0]
    torch.testing.assert_close(moved.score[0, 0], want)
