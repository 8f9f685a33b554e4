"""Centres of queries: the mean of what a model asks before positions turn it."""

from __future__ import annotations

import json

import pytest
import torch

from kvlab.core import BadInput
from kvlab.model import PagedCache, centres, forward_chunk, prefill
from kvlab.policy import TriAttention
from kvlab.window import SinkWindow


def ids_of(rows, count):
    return torch.randint(0, 128, (rows, count), generator=torch.Generator().manual_seed(0))


def test_centres_are_means_of_queries_before_rotation(tiny_model):
    model, ids, plain = tiny_model(), ids_of(2, 30), []
    own = model.config._attn_implementation
    for layer in model.model.layers:
        layer.self_attn.q_norm.register_forward_hook(lambda m, i, out: plain.append(out))
    found = {name: torch.tensor(x) for name, x in centres.query_centres(model, ids).items()}
    assert model.config._attn_implementation == own
    for layer in range(2):
        q = torch.cat(plain[layer::2])  # [B, T, Hq, D]
        first, second = q.flatten(0, 1).chunk(2, -1)
        torch.testing.assert_close(found["real"][layer], first.mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(found["imaginary"][layer], second.mean(0), atol=1e-5, rtol=0)
        lengths = torch.hypot(first, second).mean(0)
        torch.testing.assert_close(found["norm"][layer], lengths, atol=1e-5, rtol=0)


def test_a_cache_decodes_by_them(tiny_model, tmp_path):
    model, ids = tiny_model(), ids_of(1, 80)
    path = tmp_path / "centres.json"
    path.write_text(json.dumps(centres.query_centres(model, ids)))
    cache = PagedCache.for_model(model, policy=TriAttention(str(path)), budget_percent=25,
                                 block_size=1, window=SinkWindow(2, 4))  # fmt: skip
    prefill(model, ids[:, :40], cache, chunk_tokens=16)
    for at in range(40, 80):
        forward_chunk(model, ids[:, at : at + 1], cache)
    cache.check()
    assert cache.stats().resident_tokens <= 20 + 4


def test_a_text_too_short_is_refused(written, tmp_path):
    path, _ = written()
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(BadInput, match="less than a piece of 1024"):
        centres.main([str(path), str(text), str(tmp_path / "out.json")])
