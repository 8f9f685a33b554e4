"""The arms of memory_200k and ultra_long: all can be built, and what must agree does, in small."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvlab.core import CacheGeometry
from kvlab.track.rows import encode, to_row

ROOT = Path(__file__).resolve().parents[2] / "experiments"


def load(folder: str, name: str):
    """A script of an experiment as a module."""
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{folder}_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


arm, bench = load("memory_200k", "arm"), load("memory_200k", "bench")
sys.path.insert(0, str(ROOT / "memory_200k"))  # as its own first lines do
long = load("ultra_long", "bench")
ARMS = {f"200k {n}": a for n, a in bench.ARMS.items()} | {
    f"long {n}": a for n, a in long.ARMS.items()
}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_can_be_built_for_the_real_model(name):
    axes = ARMS[name]
    spec = arm.make_spec(axes)
    geometry = CacheGeometry(28, 16, 8, 128, spec.block_size)
    spec.checked_for(geometry)
    chunk = 8192 if name.startswith("200k") else 16384
    capacity = spec.capacities(geometry)[0]
    assert capacity is None or capacity * spec.block_size > chunk, "a chunk must fit in"


def measured(tmp_path, name, tokens=2500, chunk=128):
    """Runs an arm in this process; name -> value."""
    axes = {**bench.ARMS[name]}
    if "budget_bytes" in axes:
        axes["budget_bytes"] = 96 * 1024
    plan = {"name": name, "axes": axes, "tokens": tokens, "chunk_tokens": chunk, "device": "cpu",
            "cap_gb": None, "decode_tokens": 6, "tiny": True, "out": str(tmp_path / "r.jsonl"),
            "run": "memory_200k"}  # fmt: skip
    rows = [row for rows in arm.measure(plan) for row in rows]
    with open(plan["out"], "a") as file:
        for row in rows:
            file.write(encode(to_row(name, {"tokens": tokens}, row)) + "\n")
    return {row.name: row.value for row in rows}


def test_host_memory_changes_no_logit(tmp_path):
    device, host = (measured(tmp_path, name) for name in ("fp8_device", "fp8_host"))
    assert host["cache_host_bytes"] > 0 == device["cache_host_bytes"]
    assert host["cache_allocated_bytes"] < device["cache_allocated_bytes"]
    assert host["resident_tokens_percent"] < 50 < device["resident_tokens_percent"]
    bench.agreement(tmp_path / "r.jsonl", 2500)
    rows = map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())
    found = {row["name"]: row["value"] for row in rows}
    assert found["kl_to_device_nats"] < 1e-6 and found["prefill_ratio_to_device"] > 0


def test_the_account_is_that_of_the_chunk_that_held_most(tmp_path):
    """A window writes a whole chunk before it frees the one that slid out."""
    found = measured(tmp_path, "window", tokens=12_288, chunk=4096)
    lines = ("weights", "standing", "cache_peak", "workspace", "activation")
    assert found["accounted_bytes"] == sum(found[f"{name}_bytes"] for name in lines)
    slab = 1024 * 2 * 2 * 2 * 32 * 2  # tokens, layers, sides, heads, width, bytes
    assert 8 * slab < found["cache_allocated_bytes"] < 12 * slab <= found["cache_peak_bytes"]


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
    plan = {"out": str(tmp_path / "r.jsonl"), "name": "a", "tokens": 21}
    peak = arm.Peak(Cache(), config, plan)
    for done in (10, 20, 21):
        peak(done, 21)
    token = arm.activation_bytes(config)
    assert peak.account == {"cache_peak_bytes": 200, "workspace_bytes": 5,
                            "activation_bytes": 10 * token}  # fmt: skip
    assert peak.allocated == 240 and len(resets) == 3
