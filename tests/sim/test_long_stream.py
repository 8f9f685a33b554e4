"""A trace of 100 million accesses streams through in bounded memory (minutes: kept out of CI)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.sim import fast

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "sim_speed"


def stream(accesses, path, out):
    if path == "compiled" and fast.loops is None:
        pytest.skip("the extra `fast` is not installed")
    told = f"job.ways=[{path}] job.stream={accesses} track=none hydra.run.dir={out}"
    job = ["--config-dir", FOLDER, "job=sim_speed"]
    command = [sys.executable, "-m", "kvlab", *job, *told.split()]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    rows = map(json.loads, (out / "measurements.jsonl").read_text().splitlines())
    return {row["name"]: row["value"] for row in rows}


@pytest.mark.parametrize("path", ["compiled", "objects"])
def test_memory_hardly_grows_with_the_trace(tmp_path, path):
    """Ten times the accesses: 8 bytes more for each new block and little else."""
    short = stream(100_000, path, tmp_path / "short")
    long = stream(1_000_000, path, tmp_path / "long")
    assert long["accesses"] == 1_000_000
    assert long["peak_gb"] - short["peak_gb"] < 0.4  # one piece of a million accesses


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", ["compiled", "objects"])
def test_a_hundred_million_accesses_take_less_than_four_gigabytes(tmp_path, path):
    found = stream(100_000_000, path, tmp_path / "found")
    assert found["accesses"] == 100_000_000 and found["peak_gb"] < 4
