"""The speed jobs run end to end on a toy model and write rows that the report can read."""

from __future__ import annotations

import pytest

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import PrefillSpeed
from kvlab.model.load import RandomModel
from kvlab.track import RunFolder

TOY = {"hidden_size": 64, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 32,
       "mlp_size": 64, "vocabulary": 8192}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        yield folder


def test_prefill_is_timed_and_accounted(folder):
    peers = ["dynamic whole", "dynamic chunked"]
    job = PrefillSpeed(RandomModel(**TOY), [40, 90], chunk_tokens=32, peers=peers, device="cpu")
    variants = [Variant("fp8", {"format": "fp8"}, CacheSpec(format="fp8", block_size=16))]
    job.run(folder, variants)
    rows = folder.rows()
    timed = [(r["variant"], r["params"]["tokens"]) for r in rows if r["name"] == "prefill_seconds"]
    assert timed == [(name, n) for name in ("fp8", *peers) for n in (40, 90)]
    ours = {r["name"]: r["value"] for r in rows if r["variant"] == "fp8"}
    lines = ("weights", "standing", "cache_peak", "workspace", "activation")
    assert ours["accounted_bytes"] == sum(ours[f"{name}_bytes"] for name in lines)
    job.run(folder, variants)
    assert folder.rows() == rows, "what is there is not measured again"


def test_impossible_settings_are_refused():
    for wrong in ({"contexts": []}, {"contexts": [8], "chunk_tokens": 0},
                  {"contexts": [8], "peers": ["nobody"]}):  # fmt: skip
        with pytest.raises(BadInput):
            PrefillSpeed(RandomModel(**TOY), **wrong)
