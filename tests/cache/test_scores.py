"""Scores of blocks against their definitions, written out for whole sequences."""

from __future__ import annotations

import pytest
import torch

from kvlab import axes, policy
from kvlab.cache import scores
from kvlab.core import BadInput

# tests/cache/test_token_scores.py and, for kvzip, tests/model/test_repeat.py
TOKENS_ONLY = {"compactor", "h2o", "kvzip", "lagkv", "observed", "rkv",
               "triattention"}
SCORERS = [name for name in axes.names("observes") if name not in TOKENS_ONLY]
HEADS, KV_HEADS, DIM, SIZE, SCALE = 4, 2, 8, 4, 0.3


def drawn(tokens=5, blocks=6, seed=0):
    """q [Hq, T, D], k and v [N*S, H, D]."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, tokens, DIM, generator=g)
    k, v = torch.randn(2, blocks * SIZE, KV_HEADS, DIM, generator=g)
    return q, k, v


def plain_logits(q, k):
    keys = k.repeat_interleave(HEADS // KV_HEADS, 1)
    return torch.einsum("htd,nhd->htn", q, keys) * SCALE


def score(scorer, q, k, v, pieces=(6,), **more):
    parts, start = [], 0
    for blocks in pieces:
        at = slice(start, start + blocks * SIZE)
        parts.append(scorer.part(q, k[at], v[at], scale=SCALE, block_size=SIZE, **more))
        start = at.stop
    return scorer.scores(parts, plain_logits(q, k).logsumexp(-1))


def per_block(x):
    return x.unflatten(-1, (-1, SIZE)).sum(-1)


def test_mass_is_the_share_of_attention():
    q, k, v = drawn(40)
    weights = plain_logits(q, k).softmax(-1)[:, -32:]
    torch.testing.assert_close(score(scores.Mass(), q, k, v), per_block(weights.mean((0, 1))))


def test_tova_asks_the_last_token():
    q, k, v = drawn(9)
    weights = plain_logits(q, k).softmax(-1)[:, -1]
    torch.testing.assert_close(score(scores.TOVA(), q, k, v), per_block(weights.mean(0)))


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_snapkv_pools_over_neighbours(pool):
    q, k, v = drawn()
    weights = torch.nn.functional.pad(plain_logits(q, k).softmax(-1), (1, 1))
    triples = torch.stack([weights[..., :-2], weights[..., 1:-1], weights[..., 2:]])
    pooled = triples.amax(0) if pool == "max" else triples.mean(0)
    found = score(scores.SnapKV(pool, 3), q, k, v)
    torch.testing.assert_close(found, per_block(pooled.mean((0, 1))))


def test_snapkv_without_neighbours_is_mass():
    q, k, v = drawn()
    torch.testing.assert_close(
        score(scores.SnapKV(kernel=1), q, k, v), score(scores.Mass(), q, k, v)
    )


def test_snapkv_spares_the_surroundings_of_a_find():
    """The block after the one that holds what is looked for scores above all others."""
    q, k, v = drawn(blocks=8)
    k = k * 0.1
    at = 3 * SIZE + SIZE - 1  # the last token of block 3
    k[at] = 3 * q[:: HEADS // KV_HEADS].mean(1)
    plain, pooled = (score(s, q, k, v, (8,))
                     for s in (scores.Mass(), scores.SnapKV("max", 7)))
    assert plain.argmax() == pooled.argmax() == 3
    assert pooled[4] > 2 * pooled[6] and plain[4] < 2 * plain[6]


def test_expected_attention_is_its_formula():
    q, k, v = drawn(7)
    keys = k.repeat_interleave(2, 1)
    mean, centred = q.mean(1), q - q.mean(1, keepdim=True)
    covariance = torch.einsum("htd,hte->hde", centred, centred) / 7
    exponent = SCALE * torch.einsum("hd,nhd->hn", mean, keys)
    exponent += SCALE**2 / 2 * torch.einsum("nhd,hde,nhe->hn", keys, covariance, keys)
    want = exponent.softmax(-1) * v.norm(dim=-1).T.repeat_interleave(2, 0)
    found = score(scores.by_name("expected_attention"), q, k, v)
    torch.testing.assert_close(found, per_block(want.mean(0)))


def test_expected_attention_turns_queries_to_the_positions_to_come():
    """Against the paper's way: statistics before RoPE, turned by the mean rotation to come."""
    q, frequencies = drawn(9)[0], torch.tensor([1.0, 0.3, 0.1, 0.02])
    scorer = scores.by_name("expected_attention")
    scorer.rotary, scorer.future = frequencies, 5

    def rotation(position):
        cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
        return torch.cat((torch.cat((cos.diag(), -sin.diag()), 1),
                          torch.cat((sin.diag(), cos.diag()), 1)))

    at = range(100, 109)
    rotated = torch.stack([q[:, i] @ rotation(p).T for i, p in enumerate(at)], 1)
    to_come = torch.stack([rotation(108 + t) for t in range(1, 6)]).mean(0)
    mean, off = q.mean(1), q - q.mean(1, keepdim=True)
    found = scorer._to_come(rotated)
    torch.testing.assert_close(found[0], mean @ to_come.T)
    cov = torch.einsum("htd,hte->hde", off, off) / 9
    torch.testing.assert_close(found[1], to_come @ cov @ to_come.T)


def test_expected_attention_is_what_normal_queries_give():
    g = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(1, 32, DIM, generator=g), *drawn()[1:]
    k, v = k[:, :1], torch.ones_like(v[:, :1])
    mixed = torch.randn(200_000, 32, generator=g)  # many queries of the same mean and covariance
    many = q.mean(1) + mixed @ (q[0] - q.mean(1)) / 32**0.5
    weights = torch.exp(SCALE * many @ k[:, 0].T).mean(0)
    want = per_block(weights / weights.sum()) * DIM**0.5
    found = score(scores.by_name("expected_attention"), q, k, v)
    torch.testing.assert_close(found, want, rtol=0.03, atol=0)


def test_small_keys_stay():
    q, k, v = drawn()
    k = k / k.norm(dim=-1, keepdim=True) * torch.tensor([3, 1, 2, 6, 5, 4.0]).repeat_interleave(
        SIZE
    )[:, None, None]
    found = score(scores.by_name("key_norm"), q, k, v)
    torch.testing.assert_close(found, 1 / torch.tensor([3, 1, 2, 6, 5, 4.0]))


@pytest.mark.parametrize("name", sorted(set(SCORERS) - {"snapkv", "random"}))
def test_pieces_give_what_the_whole_gives(name):
    q, k, v = drawn()
    whole, pieces = (score(scores.by_name(name), q, k, v, p) for p in ((6,), (1, 3, 2)))
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_finite_and_positive(name):
    q, k, v = drawn(1)
    for factor in (1e-3, 1.0, 200.0):
        found = score(scores.by_name(name), factor * q, factor * k, v)
        assert found.shape == (6,) and found.dtype == torch.float32
        assert found.isfinite().all() and (found >= 0).all()


@pytest.mark.parametrize("name", ["mass", "snapkv", "tova"])
def test_own_blocks_are_scored_through_the_causal_mask(name):
    q, k, v = drawn(24)
    seen = torch.ones(24, 24).tril().bool()
    lse = plain_logits(q, k).masked_fill(~seen, -torch.inf).logsumexp(-1)
    scorer = scores.by_name(name, **({"kernel": 1} if name == "snapkv" else {}))
    part = scorer.part(q, k, v, scale=SCALE, block_size=SIZE, seen=seen)
    weights = plain_logits(q, k).masked_fill(~seen, -torch.inf).softmax(-1)[:, -scorer.queries :]
    found = scorer.scores([part], lse)
    torch.testing.assert_close(found, per_block(weights.mean((0, 1))))
    assert found.sum().item() == pytest.approx(1.0)


def test_how_steps_add_up():
    mass, snap, tova = scores.Mass(), scores.SnapKV(), scores.TOVA()
    assert [mass.weight(n, 1) for n in range(3)] == [1, 1 / 2, 1 / 3]
    assert [snap.weight(0, 1), snap.weight(5, 512), snap.weight(5, 16)] == [1, 1, 1 / 4]
    assert tova.weight(0, 1) == tova.weight(9, 1) == 1


def test_every_policy_observes_what_there_is():
    members = {n: policy.asked(n) for n in policy.names()}
    observed = {n: member.observes for n, member in members.items()}
    by_token = {member.by_token for member in members.values()}
    assert by_token | set(observed.values()) == {None, *axes.names("observes")}
    of_tokens = TOKENS_ONLY - {"observed"}  # of attention_mass, which has a form for blocks
    assert {n for n, what in observed.items() if what is None} == {"fifo", "random", *of_tokens}
    assert all(observed[n] == n for n in ("snapkv", "expected_attention", "key_norm", "tova"))
    with pytest.raises(BadInput, match="known: compactor, expected_attention, h2o"):
        scores.by_name("magic")


@pytest.mark.parametrize("parameters", [{"pool": "sum"}, {"kernel": 4}, {"kernel": 0}])
def test_senseless_pools_are_refused(parameters):
    with pytest.raises(BadInput):
        scores.SnapKV(**parameters)
