"""A combination known to be bad runs, and says so in the log, the record and the tables."""

from __future__ import annotations

import hydra
import pytest
import torch
from rich.console import Console

from kvlab.cache import CacheSpec, PagedCache
from kvlab.config import conf_dir, make_plan
from kvlab.core import CacheGeometry
from kvlab.report import console_table
from kvlab.report.entries import entries
from kvlab.report.source import Run

BAD = "int4 scales keys by token in blocks of 8 tokens"


def test_the_record_and_the_tables_have_it(tmp_path):
    with hydra.initialize_config_dir(str(conf_dir()), job_name="kvlab", version_base="1.3"):
        plan = make_plan(['variants=["format=int4","format=fp8"]', "cache.block_size=8",
                          f"hydra.run.dir={tmp_path}"])  # fmt: skip
    told = [variant.params.get("caution", "") for variant in plan.variants]
    assert told[0].startswith(BAD) and not told[1]
    rows = [{"variant": v.name, "params": v.params, "name": "mean_kl_nats", "value": 0.5,
             "unit": "nats", "better": "lower", "low": 0.4, "high": 0.6, "count": 3}
            for v in plan.variants]  # fmt: skip
    noted = [entry.notes for entry in entries([Run("r", rows)])]
    assert noted[0][0].startswith(f"caution: {BAD}") and noted[1] == []
    console = Console(width=200, record=True)
    console.print(console_table(rows))
    assert f"caution: {plan.variants[0].name}: {BAD}" in console.export_text().replace("\n", " ")


def test_a_live_cache_warns_of_it():
    spec = CacheSpec(format="int4", block_size=8)
    with pytest.warns(UserWarning, match=BAD):
        PagedCache(CacheGeometry(1, 2, 2, 32, 8), spec, dtype=torch.float32)
