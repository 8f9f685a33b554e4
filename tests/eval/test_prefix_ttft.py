"""The first token behind a known prefix: rows of every tier, once each, and what is refused."""

from __future__ import annotations

import json

import pytest

from kvlab.blocks import HashSharing
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import PrefixTTFT
from kvlab.model.load import RandomModel
from kvlab.track import RunFolder

TINY = RandomModel(hidden_size=32, layers=2, query_heads=2, kv_heads=1, head_dim=16, mlp_size=64,
                   vocabulary=8192)  # fmt: skip


def job(**changes) -> PrefixTTFT:
    return PrefixTTFT(TINY, **{"prefix_tokens": 150, "new_tokens": 20, "repeats": 2,
                               "chunk_tokens": 64, "device": "cpu"} | changes)  # fmt: skip


def variant(**axes) -> Variant:
    axes = {"format": "fp32", "block_size": 16, "prefix": "hash"} | axes
    return Variant("fp32", {"format": "fp32"}, CacheSpec(**axes))


def test_rows_of_every_tier(tmp_path):
    spec = {"policy": "lru", "budget_blocks": 30, "offload": "host"}
    for _ in range(2):  # the second run finds all there
        job().run(RunFolder(tmp_path / "run", resume=True), [variant(**spec)])
    lines = (tmp_path / "run" / "measurements.jsonl").read_text().splitlines()
    rows = {(r["params"]["tier"], r["name"]): r["value"] for r in map(json.loads, lines)}
    assert len(rows) == len(lines) == 15
    assert rows["cold", "ttft_cold_ms"] > 0 and rows["device", "ttft_ms"] > 0
    for tier, away in (("device", 0), ("host", 1)):
        assert rows[tier, "kl_mean_nats"] == pytest.approx(0, abs=1e-6)
        assert rows[tier, "flops_saved_percent"] > 80
        assert rows[tier, "bytes_loaded"] == 9 * 16 * 2 * 2 * 16 * 4
        assert rows[tier, "host_bytes_loaded"] == away * rows[tier, "bytes_loaded"]


def test_what_makes_no_sense_is_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(BadInput, match="prefix=hash"):
        job().run(folder, [variant(prefix="none")])
    with pytest.raises(BadInput, match="repeats"):
        job(repeats=0)
    lossy = {"prefix": HashSharing(hold=False), "policy": "fifo", "budget_blocks": 9}
    with pytest.raises(BadInput, match="give more room"):
        job().run(folder, [variant(**lossy)])
