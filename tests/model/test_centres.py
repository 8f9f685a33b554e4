"""Centres of queries: the mean of what a model asks before positions turn it."""

from __future__ import annotations

import json

import pytest
import torch

from kvlab.core import BadInput, KvlabError
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


def test_positions_that_do_not_count_tokens_are_refused(tiny_model):
    """Keys would be scored as if they were nearer, or farther, than they are."""
    model, ids = tiny_model(), ids_of(2, 24)
    policy = TriAttention(centres.query_centres(model, ids))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    usual = mask.cumsum(1) - 1
    kept = []
    for more in ({"position_ids": usual}, {"position_ids": usual + 5}, {}):
        cache = PagedCache.for_model(model, policy=policy, format="fp32", budget_percent=50,
                                     block_size=1)  # fmt: skip
        call = {"input_ids": ids * mask, "attention_mask": mask, "past_key_values": cache} | more
        if more.get("position_ids") is not usual:
            with pytest.raises(KvlabError, match="do not count the tokens of each row"):
                model(**call)
            assert not cache.rows and not cache.stats().resident_tokens
            prefill(model, ids * mask, cache, attention_mask=mask, chunk_tokens=24)
        else:
            model(**call)
        kept.append([cache.core.groups[0].pool.read(1, cache.core.groups[0].tables[row].ids)[0]
                     for row in cache.rows])  # fmt: skip
    for other in kept[1:]:
        torch.testing.assert_close(other, kept[0])
