"""A window holds bytes constant however many tokens are decoded."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval import Endless
from kvlab.eval.data import Document
from kvlab.model.load import RandomModel
from kvlab.track import RunFolder
from kvlab.window import SinkWindow

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "endless" / "report.py"


class Noise:
    def documents(self, tokenizer, count, tokens):
        return [Document("noise", np.random.default_rng(0).integers(0, 100, tokens))]


@pytest.mark.parametrize("rerotate", [False, True])
def test_bytes_stay_where_they_are(rerotate, tmp_path, monkeypatch):
    model = RandomModel(hidden_size=32, layers=1, query_heads=2, kv_heads=1, head_dim=16,
                        mlp_size=64, vocabulary=8192)  # fmt: skip
    window = SinkWindow(4, 60, middle=False, rerotate=rerotate)
    variant = Variant("small", {}, CacheSpec(window=window, block_size=16))
    with RunFolder(tmp_path / "run") as folder:
        job = Endless(model, Noise(), tokens=1500, every=100, device="cpu")
        for _ in range(2):  # the second run finds all there
            job.run(folder, [variant])
        lines = {}
        for row in folder.rows():
            line = lines.setdefault(row["params"]["done"], {})
            assert row["name"] not in line
            line[row["name"]] = row["value"]
    assert list(lines) == list(range(100, 1501, 100))
    allocated = [line["cache_allocated_bytes"] for line in lines.values()]
    assert len(set(allocated[10:])) == 1  # two slabs take turns
    assert lines[1500]["evictions"] == pytest.approx(1500 / 16, abs=6)
    spec = importlib.util.spec_from_file_location("endless_report", SCRIPT)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "run"), str(tmp_path / "out")])
    report.main()
    assert "1,500" in (tmp_path / "out/README.md").read_text()
