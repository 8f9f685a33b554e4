"""Chunks of a fixed shape: as the eager forward, whatever the cache stores and gives up."""

from __future__ import annotations

import copy

import pytest
import torch
from named import axes_id
from torch.utils._python_dispatch import TorchDispatchMode

from kvlab.cache import fixed
from kvlab.core import BadInput
from kvlab.format import Int, KVFormat
from kvlab.kernel import all_triton, attend_ref, best_ref, blocks_ref, shares_ref
from kvlab.model import PagedCache, prefill
from kvlab.model.chunks import Chunks
from kvlab.model.fuse import fused
from kvlab.window import SinkWindow

CHUNK, PROMPT = 16, 52  # the last chunk is a short one
KEPT = {"budget_percent": 40, "evict": "token", "groups": "per_head", "window": SinkWindow(2, 8)}


@pytest.fixture
def model(tiny_model, monkeypatch):
    monkeypatch.setattr(fixed, "LEAST", 2)  # so that tables grow
    for name in ("gather", "merge_into", "seal"):
        monkeypatch.setattr(all_triton, name, globals()[name])
    for kernels, name in ((blocks_ref, "seal_kept"), (best_ref, "best_of"),
                          (shares_ref, "token_shares")):
        monkeypatch.setattr(all_triton, name, getattr(kernels, name))
    return tiny_model()


def gather(planes, format, ids, k, v):
    """As the kernel, which its interpreter takes seconds for."""
    for layer, (keys, values) in enumerate(zip(k, v) if k.dim() == 4 else [(k, v)]):
        size = len(keys) // max(1, len(ids))
        for i, block in enumerate(ids.tolist()):
            if block >= 0:
                views = blocks_ref.block_views(planes, block, layer)
                pair = format.dequantize({n: x[None] for n, x in views.items()}, k.dtype)
                for x, found in zip((keys, values), pair):
                    x[i * size : (i + 1) * size] = found[0]


def merge_into(out, lse, part, part_lse, fresh):
    """The same."""
    parts = [(part, part_lse)] if part.dim() == 3 else list(zip(part, part_lse))
    before = [] if fresh else [(out.clone(), lse.clone())]
    for x, found in zip((out, lse), attend_ref.merge(before + parts)):
        x.copy_(found)


def seal(k, v, format, planes, ids):
    """The same."""
    stored = format.quantize(*(x.unflatten(0, (len(ids), -1)) for x in (k, v)))
    for i, block in enumerate(ids.tolist()):
        for name, view in blocks_ref.block_views(planes, block).items():
            view.copy_(stored[name][i])


def filled(model, ids, driver, chunk=CHUNK, **axes):
    """Logits, what the sealed blocks and open tails read, and the cache."""
    cache = PagedCache.for_model(model, **{"kernels": "triton", "block_size": 8} | axes)
    with fused(model):
        result = prefill(model, ids, cache, chunk_tokens=chunk, driver=driver)
    cache.check()
    return result, contents(cache), cache


@torch.inference_mode()
def contents(cache) -> list[torch.Tensor]:
    found = []
    for group in cache.groups:
        for row in cache.rows:
            table = group.tables[row]
            whole, fill = divmod(table.length, group.block_size)
            held = [b for b in table.ids[:whole] if b is not None]
            for layer in range(group.pool.geometry.layers):
                found += [x.clone() for x in group.pool.read(layer, held)] if held else []
                found += group.pool.read_open(layer, table.ids[-1], fill) if fill else []
    return found


@pytest.mark.parametrize("rows, steps, axes", [
    (1, 3, {"format": "fp32"}),
    (2, 3, {"format": "int4", "block_size": 4}),
    (1, 3, {"format": "k4v2", "block_size": 16}),
    (1, 3, {"format": "int8", "policy": "fifo", "budget_blocks": 5}),
    (1, 3, {"format": "fp32", "window": SinkWindow(8, 16, middle=False)}),
    (1, 3, {"format": "int8", "prefix": "hash"}),
    (2, 3, {"format": "int4", "policy": "snapkv"} | KEPT),
    (1, 3, {"format": "fp32", "policy": "tova"} | KEPT),
    (1, 3, {"format": "int8", "policy": "attention_mass", "block_size": 4} | KEPT),
    (1, 3, {"format": "fp32", "policy": "expected_attention"} | KEPT),
    (1, 3, {"format": "int8", "policy": "key_norm"} | KEPT | {"groups": "per_layer"}),
    (1, 1, {"format": "fp32", "policy": "snapkv", "budget_blocks": 5, "evict": "token"}),
], ids=axes_id)
def test_static_chunks_are_the_eager_ones_to_the_bit(model, rows, steps, axes):
    ids = torch.randint(1, 128, (rows, PROMPT))
    want, held, other = filled(model, ids, "eager", **axes)
    got, mine, cache = filled(model, ids, "static", **axes)
    assert torch.equal(got.logits, want.logits) and got.tokens == want.tokens
    assert len(mine) == len(held) and all(map(torch.equal, mine, held))
    a, b = cache.stats(), other.stats()
    assert (a.tokens, a.logical_bytes, a.evictions) == (b.tokens, b.logical_bytes, b.evictions)
    assert cache.chunks.steps == steps and other.chunks is None
    assert cache.columns.next_positions() == other.columns.next_positions() == [PROMPT] * rows


def test_known_prefixes_and_whole_blocks_alone(model):
    """Further requests begin with what is known; behind a part of a block it goes eagerly."""
    first = torch.randint(1, 128, (1, 72))
    second = torch.cat([first[:, :40], torch.randint(1, 128, (1, 60))], 1)
    found = []
    for driver in ("eager", "static"):
        cache = PagedCache.for_model(model, format="int8", block_size=8, kernels="triton",
                                     prefix="hash")
        with fused(model):
            for ids, finish in ((first, True), (second, False), (first, True)):
                result = prefill(model, ids, cache, chunk_tokens=CHUNK, driver=driver)
                found.append((result.cached, result.logits))
                cache.finish() if finish else cache.check()
    assert [cached for cached, _ in found] == [0, 40, 0] * 2 and cache.chunks.steps == 4 + 3
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, found[3:]))


@pytest.mark.parametrize("axes", [{}, {"policy": "snapkv"} | KEPT], ids=axes_id)
def test_a_stopped_prompt_goes_on_and_another_follows(model, axes):
    ids, found = torch.randint(1, 128, (1, 72)), []
    for driver in ("eager", "static"):
        asked = iter([False, False, True])
        cache = PagedCache.for_model(model, format="int4", block_size=8, kernels="triton", **axes)
        with fused(model):
            part = prefill(model, ids, cache, chunk_tokens=CHUNK, driver=driver,
                           should_stop=lambda asked=asked: next(asked))
            rest = prefill(model, ids[:, part.tokens :], cache, chunk_tokens=CHUNK, driver=driver)
            cache.finish()
            again = prefill(model, ids, cache, chunk_tokens=CHUNK, driver=driver)
        assert part.stopped and torch.equal(rest.logits, again.logits)
        found.append(again.logits)
    assert torch.equal(*found) and cache.chunks.steps == 8


@pytest.mark.parametrize("axes, reason", [
    ({"format": "int4g"}, "first tokens are kept beside"),
    ({"format": KVFormat(Int(4), Int(4), residual=8)}, "newest tokens"),
    ({"format": "fp32", "policy": "attention_mass", "evict": "block", "budget_blocks": 9}, "score"),
    ({"format": "fp32", "retrieval": "quest"}, "more than blocks"),
    ({"format": "fp32", "block_size": 5}, "no whole number of blocks of 5"),
    ({"format": "fp32", "kernels": "torch"}, "Triton"),
], ids=axes_id)
def test_what_cannot_be_captured_is_said(model, axes, reason):
    cache = PagedCache.for_model(model, **{"kernels": "triton", "block_size": 8} | axes)
    with pytest.raises(BadInput, match=reason):
        prefill(model, torch.ones(1, 32, dtype=torch.long), cache, chunk_tokens=CHUNK,
                driver="static")
    with pytest.raises(BadInput, match="CUDA"):
        prefill(model, torch.ones(1, 32, dtype=torch.long), cache, chunk_tokens=CHUNK,
                driver="graph")
    assert not cache.rows


class Looks(TorchDispatchMode):
    """Counts what waits for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default,
                                   torch.ops.aten.is_nonzero.default,
                                   torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("axes", [{}, {"policy": "snapkv"} | KEPT], ids=axes_id)
def test_no_chunk_waits_for_the_device(model, axes):
    cache = PagedCache.for_model(model, format="fp32", kernels="triton", block_size=8, **axes)
    chunks = Chunks(model, cache, 1, CHUNK, "static")
    ids = torch.randint(1, 128, (1, CHUNK))
    chunks.forward(ids, cache)
    with Looks() as looks:
        chunks.forward(ids, cache)
    assert not looks.count and chunks.steps == 2


def test_a_copy_captures_for_itself(model):
    _, _, cache = filled(model, torch.randint(1, 128, (1, PROMPT)), "static", format="fp32")
    other = copy.deepcopy(cache)
    assert other.chunks is None
    other.check()


@pytest.fixture
def large(tiny_model):
    """Head width and dtype as real ones have them."""
    model = tiny_model("Llama", head_dim=64, hidden_size=192, intermediate_size=512,
                       num_hidden_layers=3, num_attention_heads=6, initializer_range=0.05)
    return model.cuda().bfloat16()


@pytest.mark.gpu
@pytest.mark.parametrize("rows, axes", [
    (1, {"format": "bf16"}), (2, {"format": "int4"}), (1, {"format": "int8"}),
    (1, {"format": "bf16", "window": SinkWindow(16, 128, middle=False)}),
    (1, {"format": "bf16", "policy": "snapkv"} | KEPT),
    (2, {"format": "int8", "policy": "tova"} | KEPT),
], ids=axes_id)
def test_replayed_chunks_are_no_further_from_fp32_than_eager_ones(large, monkeypatch, rows, axes):
    monkeypatch.setattr(fixed, "LEAST", 8)  # so that tables grow
    axes = {"kernels": "auto", "block_size": 16} | axes
    ids = torch.randint(1, 128, (rows, 700), device="cuda")
    want, _, other = filled(large, ids, "eager", chunk=64, **axes)
    got, _, cache = filled(large, ids, "auto", chunk=64, **axes)
    assert got.why_eager is None and got.replayed >= 4
    assert cache.stats().tokens == other.stats().tokens
    assert cache.stats().logical_bytes == other.stats().logical_bytes
    cache.finish()
    with fused(large):
        again = prefill(large, ids, cache, chunk_tokens=64, driver="auto")
    assert again.replayed == 10
    assert torch.equal(again.logits, got.logits), "replays repeat to the bit"
    if "policy" in axes:  # near ties between tokens may fall otherwise
        return
    exact, _, _ = filled(large.float(), ids, "eager", chunk=64, **axes | {"kernels": "torch"})
    errors = [(x.logits.float() - exact.logits).norm() / exact.logits.norm() for x in (got, want)]
    assert errors[0] <= 1.5 * errors[1] + 1e-3, errors
