"""memory_200k and ultra_long: all variants can be built, and what must agree does, in small."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest

from kvlab.cache import CacheSpec
from kvlab.config import conf_dir, make_plan
from kvlab.core import CacheGeometry, Variant
from kvlab.eval import PrefillSpeed
from kvlab.eval.prefill_speed import Peak
from kvlab.model.load import RandomModel
from kvlab.model.room import activation_bytes
from kvlab.track import RunFolder
from kvlab.window import SinkWindow

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "memory_200k" / "report.py"
TINY = {"hidden_size": 64, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 32,
        "mlp_size": 128, "vocabulary": 8192}  # fmt: skip
HOST = {"policy": "fifo", "offload": "host", "budget_bytes": 96 * 1024}


@pytest.mark.parametrize("name, chunk", [("memory_200k", 8192), ("ultra_long", 16384)])
def test_every_variant_can_be_built_for_the_real_model(name, chunk, tmp_path):
    line = [f"experiment={name}", "memory.cap_gb=null", f"hydra.run.dir={tmp_path / 'run'}"]
    with hydra.initialize_config_dir(str(conf_dir()), job_name="kvlab", version_base="1.3"):
        variants = make_plan(line).variants
    for variant in variants:
        geometry = CacheGeometry(28, 16, 8, 128, variant.spec.block_size)
        variant.spec.checked_for(geometry)
        capacity = variant.spec.capacities(geometry)[0]
        room = capacity is None or capacity * variant.spec.block_size
        assert capacity is None or room > chunk, "a chunk must fit in"


def measured(folder, tokens=2500, chunk=128, **axes):
    """Runs one cache; name -> value."""
    job = PrefillSpeed(RandomModel(**TINY), [tokens], chunk, decode_tokens=6, device="cpu")
    with RunFolder(folder) as run:
        job.run(run, [Variant("mine", {}, CacheSpec(**axes))])
        return {row["name"]: row["value"] for row in run.rows()}


def test_host_memory_changes_no_logit(tmp_path, monkeypatch):
    device = measured(tmp_path / "device", format="fp8")
    host = measured(tmp_path / "host", format="fp8", **HOST)
    assert host["cache_host_bytes"] > 0 == device["cache_host_bytes"]
    assert host["cache_allocated_bytes"] < device["cache_allocated_bytes"]
    assert host["resident_tokens_percent"] < 50 < device["resident_tokens_percent"]
    assert host["host_reserve_seconds"] > 0 < host["decode_tokens_per_second"]
    script = report()
    [(place, found)] = script.agreement(tmp_path / "host", tmp_path / "device").items()
    assert place == ("mine", 2500)
    assert found["kl_to_device_nats"] < 1e-6 and found["prefill_ratio_to_device"] > 0
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "host"), str(tmp_path / "out"),
                                      "--arms", "fp8_host", "--device", str(tmp_path / "device")])
    script.main()
    rows = list(map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines()))
    assert {row["variant"] for row in rows} == {"fp8_host", "fp8_device"}
    assert all({"run", "commit", "device"} <= row["params"].keys() for row in rows)
    assert "kl_to_device_nats" in {row["name"] for row in rows}
    curve = (tmp_path / "out/results.curve.jsonl").read_text()
    assert '"fp8_host"' in curve and '"fp8_device"' in curve and '"mine"' not in curve


def report():
    spec = importlib.util.spec_from_file_location("memory_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_account_is_that_of_the_chunk_that_held_most(tmp_path, monkeypatch):
    """A window writes a whole chunk before it frees the one that slid out."""
    window = SinkWindow(64, 8192, middle=False)
    found = measured(tmp_path / "run", tokens=12_288, chunk=4096, window=window)
    lines = ("weights", "standing", "cache_peak", "workspace", "activation")
    assert found["accounted_bytes"] == sum(found[f"{name}_bytes"] for name in lines)
    slab = 1024 * 2 * 2 * 2 * 32 * 2  # tokens, layers, sides, heads, width, bytes
    assert 8 * slab < found["cache_allocated_bytes"] < 12 * slab <= found["cache_peak_bytes"]
    curve = (tmp_path / "run/measurements.curve.jsonl").read_text().splitlines()
    assert [json.loads(line)["done"] for line in curve] == [4096, 8192, 12_288]
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "run"), str(tmp_path / "out")])
    report().main()
    assert "12,288" in (tmp_path / "out/README.md").read_text()


def test_the_peak_is_kept_for_each_chunk(tmp_path):
    """What only a full chunk needs is not added to what only the last, short one has."""
    told = iter([(100, 90, 5), (200, 190, 5), (250, 240, 5)])
    resets = []

    class Cache:
        def stats(self):
            peak, now, workspace = next(told)
            return SimpleNamespace(peak_allocated_bytes=peak, allocated_bytes=now, host_bytes=0,
                                   workspace_bytes=workspace)  # fmt: skip

        def reset_peak(self):
            resets.append(True)

    config = SimpleNamespace(num_attention_heads=1, num_key_value_heads=1, head_dim=8,
                             hidden_size=8, intermediate_size=8)  # fmt: skip
    peak = Peak(Cache(), config, tmp_path, "a", 21)
    for done in (10, 20, 21):
        peak(done, 21)
    token = activation_bytes(config)
    assert peak.account == {"cache_peak_bytes": 200, "workspace_bytes": 5,
                            "activation_bytes": 10 * token}  # fmt: skip
    assert peak.allocated == 240 and len(resets) == 3
