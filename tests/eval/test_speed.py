"""The decode speed job: every variant and peer at every place, nothing twice."""

from contextlib import contextmanager

import pytest
import torch

from kvlab import progress
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import sweep
from kvlab.eval.prefill_speed import PrefillSpeed
from kvlab.eval.speed import DecodeSpeed, fill, step_weight_bytes
from kvlab.model import PagedCache
from kvlab.model.load import ReferenceModel
from kvlab.track import RunFolder

VARIANTS = [Variant(n, {"format": n}, CacheSpec(format=n, block_size=8)) for n in ("fp32", "int4")]


def test_measures_each_once(tmp_path):
    job = DecodeSpeed(ReferenceModel(), [20, 30], [1, 2], steps=16, peers=[
        "dynamic eager", "static fused graph"], device="cpu")
    folder = RunFolder(tmp_path / "run")
    job.run(folder, VARIANTS)
    rows = folder.rows()
    rates = [r for r in rows if r["name"] == "decode_tokens_per_second"]
    assert len(rates) == 2 * 2 * 3, "two formats and the peer that needs no CUDA"
    assert all(r["value"] > 0 for r in rows)
    read = {(r["variant"], r["params"]["tokens"]): r["value"] for r in rows
            if r["name"] == "decode_bytes" and r["params"]["batch"] == 1}
    assert read["int4", 30] < read["fp32", 30]
    job.run(folder, VARIANTS)
    assert len(folder.rows()) == len(rows)


def test_one_bar_knows_all_points_ahead(tmp_path, monkeypatch):
    left = []

    @contextmanager
    def watched(shown, name):
        with progress.total(False, name) as bar:
            yield bar._replace(show=lambda: left.append(bar.work.left()))

    monkeypatch.setattr(sweep, "total", watched)
    for job in (DecodeSpeed(ReferenceModel(), [20, 30], [1], steps=16, device="cpu"),
                PrefillSpeed(ReferenceModel(), [40, 80], 32, ["dynamic whole"], device="cpu")):
        left.clear()
        job.run(RunFolder(tmp_path / type(job).__name__), VARIANTS)
        assert len(left) >= 5 and left[1][0] > 0 and left[1][1], "what is to come is known"
        assert left[-1] == (0.0, True)


@pytest.mark.parametrize("wrong, key", [
    ({"steps": 3}, "steps"), ({"contexts": []}, "contexts"), ({"batches": [0]}, "batches"),
    ({"peers": ["vllm"]}, "peers"), ({"driver": "fast"}, "eval.driver"),
])
def test_refuses(wrong, key):
    with pytest.raises(BadInput, match=key):
        DecodeSpeed(**{"model": None, "contexts": [8], "batches": [1]} | wrong)


def test_fill_and_weights(tiny_model):
    model = tiny_model()
    cache = PagedCache.for_model(model, format="fp32", block_size=8)
    drawn = [torch.randn(2, 2, 2, 21, 32) for _ in range(2)]
    fill(cache, 2, 21, lambda layer, count: tuple(drawn[layer]))
    keys, _ = cache.groups[0].pool.read(1, cache.groups[0].tables[cache.rows[1]].ids[:2])
    assert torch.equal(keys, drawn[1][0, 1].transpose(0, 1)[:16])
    assert cache.get_seq_length() == 21
    cache.check()
    every = sum(p.nbytes for p in model.parameters())
    assert step_weight_bytes(model) == every - model.get_input_embeddings().weight.nbytes
