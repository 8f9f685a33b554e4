"""A window holds bytes constant however many tokens are decoded."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from kvlab.model.load import RandomModel
from kvlab.window import SinkWindow

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "endless"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"endless_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rerotate", [False, True])
def test_bytes_stay_where_they_are(rerotate, tmp_path, monkeypatch):
    bench, report = load("bench"), load("report")
    monkeypatch.setattr(bench, "EVERY", 100)
    monkeypatch.setitem(bench.ARMS, "small", SinkWindow(4, 60, middle=False, rerotate=rerotate))
    loaded = RandomModel(hidden_size=32, layers=1, query_heads=2, kv_heads=1, head_dim=16,
                         mlp_size=64, vocabulary=8192).load(torch.device("cpu"))  # fmt: skip
    ids = torch.randint(100, (1502,), generator=torch.Generator().manual_seed(0))
    with (tmp_path / "results.jsonl").open("a") as file:
        bench.run("small", loaded, ids, file, {})
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["done"] for line in lines] == list(range(100, 1501, 100))
    assert len({line["cache_allocated_bytes"] for line in lines[10:]}) == 1  # two slabs take turns
    assert lines[-1]["evictions"] == pytest.approx(1500 / 16, abs=6)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "results.jsonl"), str(tmp_path)])
    report.main()
    assert "1,500" in (tmp_path / "README.md").read_text()
