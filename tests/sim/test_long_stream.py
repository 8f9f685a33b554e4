"""A trace of 100 million accesses streams through in bounded memory (minutes: kept out of CI)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.sim import fast

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "experiments" / "sim_speed" / "bench.py"
PATHS = {"compiled": [], "objects": ["--objects"]}


def stream(accesses, path, out):
    if path == "compiled" and fast.loops is None:
        pytest.skip("the extra `fast` is not installed")
    command = [sys.executable, BENCH, "--stream", str(accesses), "--out", out, *PATHS[path]]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return json.loads(out.read_text())[0]


@pytest.mark.parametrize("path", PATHS)
def test_memory_hardly_grows_with_the_trace(tmp_path, path):
    """Ten times the accesses: 8 bytes more for each new block and little else."""
    short = stream(100_000, path, tmp_path / "short.json")
    long = stream(1_000_000, path, tmp_path / "long.json")
    assert long["accesses"] == 1_000_000
    assert long["peak_gb"] - short["peak_gb"] < 0.4  # one piece of a million accesses


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", PATHS)
def test_a_hundred_million_accesses_take_less_than_four_gigabytes(tmp_path, path):
    found = stream(100_000_000, path, tmp_path / "found.json")
    assert found["accesses"] == 100_000_000 and found["peak_gb"] < 4
