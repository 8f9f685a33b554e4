"""KVzip: what a cache holds after the model has repeated the context, against the definition."""

from __future__ import annotations

import copy

import pytest
import torch

from kvlab.budget import SimLayer
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, KvlabError
from kvlab.model import PagedCache, forward_chunk, prefill
from kvlab.model.repeat import FIRST, LATER
from kvlab.policy import KVzip
from kvlab.window import SinkWindow

PIECE, TOTAL = 24, 60
SPEC = {"format": "fp32", "policy": "kvzip", "budget_percent": 40, "block_size": 1,
        "window": SinkWindow(4, 2)}  # fmt: skip


class Letters:
    """A tokenizer of bytes, without a chat template."""

    chat_template = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(c) % 128 for c in text]}


def ids_of(count, seed=0, rows=1):
    return torch.randint(0, 128, (rows, count), generator=torch.Generator().manual_seed(seed))


def filled(model, ids, chunk=2048, **axes):
    spec = CacheSpec(**SPEC | {"policy": KVzip(PIECE)} | axes)
    cache = PagedCache.for_model(model, spec, tokenizer=Letters())
    prefill(model, ids, cache, chunk_tokens=chunk)
    return cache


def eager(model, ids):
    """Attention weights by layer, [Hq, T, T]."""
    own = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        found = model(ids, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(own)
    return [x[0] for x in found]


def wanted(model, ids):
    """Scores [L][H, T]: the context and one repetition at a time, as one plain text."""
    found = [torch.zeros(2, TOTAL) for _ in range(2)]
    for start in range(0, TOTAL, PIECE):
        end, last = min(TOTAL, start + PIECE), ids[:, max(0, start - 8) : start]
        said = torch.tensor([Letters()(LATER if start else FIRST)["input_ids"]])
        asked = torch.cat((said, last, torch.tensor([[10]]), ids[:, start:end]), 1)
        for layer, w in enumerate(eager(model, torch.cat((ids, asked), 1))):
            rows = w[:, TOTAL:]
            sinks = min(4, start)
            whole = torch.cat((rows[..., :sinks], rows[..., start:end], rows[..., TOTAL:]), -1)
            share = rows[..., start:end] / whole.sum(-1, keepdim=True)
            found[layer][:, start:end] = share.amax(1).unflatten(0, (2, 2)).amax(1)
    return found


@pytest.mark.parametrize("chunk", [2048, 17])
def test_what_a_repetition_looks_at_stays(tiny_model, chunk):
    """However the context came in chunks, and the repetition leaves nothing behind."""
    model, ids = tiny_model(), ids_of(TOTAL)
    cache = filled(model, ids, chunk)
    plain = PagedCache.for_model(model, format="fp32", block_size=1)
    prefill(model, ids, plain)
    cache.check()
    assert cache.get_seq_length() == TOTAL and cache.stats().resident_tokens == 24
    (group,), (whole,) = cache.core.groups, plain.core.groups
    for layer, score in enumerate(wanted(model, ids)):
        score[:, :4] = score[:, -2:] = 9  # the window's
        keys = whole.pool.read(layer, whole.tables[plain.rows[0]].ids)[0]
        kept = group.pool.read(layer, group.tables[cache.rows[0]].ids)[0]
        for head in range(2):
            stay = score[head].topk(24).indices.sort().values
            torch.testing.assert_close(kept[:, head], keys[stay, head])


def test_heads_of_all_layers_compete(tiny_model):
    model, ids = tiny_model(), ids_of(TOTAL)
    cache = filled(model, ids, budget="all_heads")
    plain = PagedCache.for_model(model, format="fp32", block_size=1)
    prefill(model, ids, plain)
    cache.check()
    score = torch.stack(wanted(model, ids))
    score[..., :4] = score[..., -2:] = 9
    best = torch.zeros(score.numel(), dtype=torch.bool)
    best[score.flatten().topk(4 * 24).indices] = True  # 2 layers of 2 heads
    (group,), (whole,) = cache.core.groups, plain.core.groups
    table = group.tables[cache.rows[0]].ids
    for layer, stays in enumerate(best.view_as(score)):
        keys = whole.pool.read(layer, whole.tables[plain.rows[0]].ids)[0]
        kept = group.pool.read(layer, table)[0]
        for head, stay in enumerate(stays):
            there = torch.from_numpy(group.pool.rows(table)[:, layer, head] >= 0)
            torch.testing.assert_close(kept[there, head], keys[stay, head])
    assert len(set(best.view(4, -1).sum(1).tolist())) > 1
    with pytest.raises(BadInput, match="policy=kvzip, or budget=adakv"):
        CacheSpec(policy="snapkv", budget_percent=10, budget="all_heads")


def test_a_context_that_was_stopped_and_cut_goes_on(tiny_model):
    model, ids = tiny_model(), ids_of(TOTAL)
    cache = PagedCache.for_model(model, CacheSpec(**SPEC | {"policy": KVzip(PIECE)}),
                                 tokenizer=Letters())  # fmt: skip
    asked = iter((False, True))
    told = prefill(model, ids, cache, chunk_tokens=17, should_stop=lambda: next(asked))
    assert told.stopped and cache.stats().resident_tokens == 17
    cache.crop(-5)
    prefill(model, ids[:, 12:], cache)
    whole = filled(model, ids)
    kept = [[c.core.groups[0].pool.read(layer, c.core.groups[0].tables[c.rows[0]].ids)
             for layer in range(2)] for c in (cache, whole)]
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("select, rows", [
    (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
])  # fmt: skip
def test_rows_that_were_selected_repeat_their_own_tokens(tiny_model, select, rows):
    model, ids = tiny_model(), ids_of(TOTAL, rows=2)
    cache = PagedCache.for_model(model, CacheSpec(**SPEC | {"policy": KVzip(PIECE)}),
                                 tokenizer=Letters())  # fmt: skip
    asked = iter((False, True))
    prefill(model, ids, cache, chunk_tokens=17, should_stop=lambda: next(asked))
    select(cache)
    prefill(model, ids[rows][:, 17:], cache)
    whole = filled(model, ids[rows])
    for mine, other in zip(cache.rows, whole.rows):
        torch.testing.assert_close(*(c.core.groups[0].pool.read(1, c.core.groups[0].tables[row].ids)
                                     for c, row in ((cache, mine), (whole, other))))  # fmt: skip


def test_lazy_layers_are_told_by_the_prompt_not_by_its_repetition(tiny_model):
    model, ids = tiny_model(), ids_of(TOTAL)
    axes = {"budget": SimLayer(None), "groups": "per_layer"}
    lazy = [[group.watch.standings.lazy for group in filled(model, ids, **axes | more).core.groups]
            for more in ({}, {"policy": "snapkv"})]  # fmt: skip
    assert lazy[0] == lazy[1]


def test_later_tokens_stay_and_a_copy_goes_on(tiny_model):
    model, ids = tiny_model(), ids_of(TOTAL, rows=2)
    cache = filled(model, ids, block_size=4)
    twin = copy.deepcopy(cache)
    held = cache.stats().resident_tokens
    told = []
    for one in (cache, twin):
        told.append([forward_chunk(model, ids[:, :n], one) for n in (7, 1)])
        assert one.stats().resident_tokens == held + 2 * 8
    torch.testing.assert_close(*told)
    twin.crop(-8)
    assert twin.stats().resident_tokens == held
    with pytest.raises(KvlabError, match="a new cache for a new context"):
        prefill(model, ids, cache)
    cache.reset()
    prefill(model, ids, cache)
    assert cache.stats().resident_tokens == held


def test_nobody_runs_the_full_cache_for_it_in_silence(tiny_model):
    model, ids = tiny_model(), ids_of(TOTAL)
    cache = PagedCache.for_model(model, CacheSpec(**SPEC), tokenizer=Letters())
    with pytest.raises(KvlabError, match="fill the cache with kvlab.prefill"):
        forward_chunk(model, ids, cache)
    with pytest.raises(KvlabError, match="fill the cache with kvlab.prefill"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)
    with pytest.raises(BadInput, match="rows of one length without padding"):
        mask = torch.ones(2, TOTAL, dtype=torch.long)
        mask[0, :5] = 0
        prefill(model, ids_of(TOTAL, rows=2), cache, attention_mask=mask)
    with pytest.raises(BadInput, match="needs the tokenizer"):
        PagedCache.for_model(model, CacheSpec(**SPEC))
    for budget in ("budget_blocks", "budget_bytes"):
        with pytest.raises(BadInput, match=r"whole context.*cache\.budget_percent"):
            CacheSpec(policy="kvzip", **{budget: 4096})


@pytest.mark.parametrize("axes, told", [
    ({}, "(each head alike)"), ({"budget": "adakv"}, "(within each layer)"),
    ({"budget": "all_heads"}, ""), ({"groups": "per_layer"}, "(tokens, each layer)"),
])  # fmt: skip
def test_equal_budgets_are_said_in_its_name(axes, told):
    assert CacheSpec(policy="kvzip", budget_percent=10, **axes).granularity == told
