"""Layers that wait and are chosen among together keep what each would have kept alone."""

from __future__ import annotations

import pytest
import torch

from kvlab import PagedCache, policy
from kvlab.cache import keys, scores, together
from kvlab.model.prefill import forward_chunk
from tests.tiny import make_tiny_model

HOW = {"format": "fp32", "block_size": 4, "evict": "token", "groups": "per_head",
       "budget_blocks": 6}  # fmt: skip
IDS = torch.randint(1, 128, (1, 100), generator=torch.Generator().manual_seed(0))


def kept(model, monkeypatch, room, **how):
    """Logits over what two chunks left."""
    monkeypatch.setattr(together, "ROOM", room)
    cache = PagedCache.for_model(model, **HOW, **how)
    for chunk in IDS.split(60, -1):
        logits = forward_chunk(model, chunk, cache)
    return logits


METHODS = ["attention_mass", "snapkv", "expected_attention", "h2o", "random"]


@pytest.mark.parametrize("name", METHODS)
def test_each_layer_is_scored_with_its_own_scale(name, monkeypatch):
    model = make_tiny_model(num_hidden_layers=3)
    for layer, scale in zip(model.model.layers, (0.2, 1.0, 0.05)):  # GPT-2 may scale by depth
        layer.self_attn.scaling = scale
    alone, waiting = (kept(model, monkeypatch, room, policy=name) for room in (0, 1 << 27))
    torch.testing.assert_close(waiting, alone)


class Wide(scores.SnapKV):
    """A published scorer with a window of one's own."""

    queries = 90


class Asks(keys.KeyNorm):
    """One's own scores on top of a scorer that looks at no query, one layer at a time."""

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        assert q.dim() == 3 and q.shape[1] == lse.shape[1] == 60
        return shares(q, k, lse, scale=scale)


class Plain(scores.Scorer):
    """The same on top of nothing."""

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        return shares(q, k, lse, scale=scale)


def test_a_scorer_of_ones_own_gets_the_queries_that_it_looks_at(monkeypatch):
    assert Wide().reads == 90 and Asks().reads is None and not Asks().layered
    assert scores.SnapKV().reads == 64 and keys.KeyNorm().reads == 0

    def by(observed):
        return type("Own", (policy.SnapKV,), {"observes": observed, "by_token": observed})

    monkeypatch.setattr(together, "ROOM", 1 << 27)
    model, found = make_tiny_model(), []
    for scorer in (Asks, Plain):
        cache = PagedCache.for_model(model, **HOW, policy=by(scorer))
        forward_chunk(model, IDS[:, :60], cache)
        found.append(forward_chunk(model, IDS[:, 60:61], cache))
    torch.testing.assert_close(*found)
