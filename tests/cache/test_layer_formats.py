"""A cache whose layers have formats of their own."""

from __future__ import annotations

import pytest
import torch
from driver import Driver, held_bytes, make

from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.format import ByLayer, by_name
from kvlab.model import PagedCache, prefill

MIXED = ByLayer(["int8", "int4", "fp32"])


def test_every_layer_reads_what_its_own_format_stores():
    """The driver checks attention against what is read back; here also who stores it."""
    run = Driver(make(layers=3, format=MIXED, block_size=4))
    seq = run.open()
    for count in (9, 1, 7, 1):
        run.step([seq], [count])
    child = run.fork(seq)
    run.step([seq, child], [5, 3])
    run.truncate(seq, 14)
    run.step([seq], [6])
    cache = run.cache
    assert [g.pool.format.name for g in cache.groups] == ["int8", "int4", "fp32"]
    assert cache.stats().allocated_bytes == held_bytes(cache)
    run.close(child), run.close(seq), cache.check()
    assert cache.stats().allocated_bytes == 0


def test_layers_of_one_format_share_a_group_wherever_they_lie():
    cache = make(layers=4, format=ByLayer(["int8", "int4*2", "int8"]))
    assert [tuple(p) for p in cache.layers.parts] == [(0, 3), (1, 2)]


def test_decoded_steps_read_each_layer_through_its_kernel():
    run = Driver(make(layers=2, format=ByLayer(["int8", "fp8"]), head_dim=32, block_size=16,
                      dtype=torch.float16, kernels="triton"))  # fmt: skip
    seq = run.open()
    run.step([seq], [19])
    assert run.cache.can_decode([1])
    run.step([seq], [1])


def test_one_layer_s_format_without_kernels_is_said():
    spec = CacheSpec(format=ByLayer(["int8", by_name("int8", sinks=4)]), kernels="triton")
    shapes = spec.geometry(2, 4, 2, 64).shapes
    assert spec.why_plain(shapes[:2], torch.device("cpu")) is None or "first 4 tokens" in (
        spec.why_plain(shapes, torch.device("cpu")))  # fmt: skip


def test_a_list_that_does_not_fit_the_model_is_refused(tiny_model):
    with pytest.raises(BadInput, match="names 3 layers and the model has 2"):
        PagedCache.for_model(tiny_model(), format=ByLayer(["int8*3"]))


def test_a_budget_counts_each_layer_s_bytes():
    g = CacheSpec().geometry(3, 4, 2, 64)
    one = MIXED.block_bytes(g)
    spec = CacheSpec(format=MIXED, policy="lru", budget_bytes=5 * one)
    assert spec.capacities(g) == [5, 5, 5]


def test_a_stored_prefix_comes_back_and_not_into_other_layers(tiny_model, tmp_path):
    model, ids = tiny_model(), torch.arange(1, 61)[None]

    def cache(*layers):
        return PagedCache.for_model(model, format=ByLayer(layers), block_size=16, prefix="hash")

    old = cache("int8", "int4")
    prefill(model, ids, old, chunk_tokens=16)
    old.finish()
    assert old.save(tmp_path / "store").blocks == 3
    new = cache("int8", "int4")
    assert new.load(tmp_path / "store").tokens == 48
    assert torch.equal(prefill(model, ids, new, chunk_tokens=16).logits,
                       prefill(model, ids, old, chunk_tokens=16).logits)
    with pytest.raises(BadInput, match="another format"):
        cache("int4", "int8").load(tmp_path / "store")
