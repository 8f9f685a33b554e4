"""An operator's questions: intervals over sessions, tiers, windows, hot prefixes, and the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.report import write_report
from kvlab.report.operate import apart
from kvlab.sim import Host, Sessions, from_requests, load_trace, simulate, workloads
from kvlab.sim.describe import ideal
from kvlab.sim.operate import Operate, hot_prefixes
from kvlab.stats import ratio_interval
from kvlab.track import RunFolder

TRACE = workloads.chats(150, open_chats=8, system_tokens=256, block_size=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("operate") / "run"
    job = Operate(TRACE, ["lru", "mq", "belady"], [100, 200, 400], [1, 2], windows=6, resamples=200)
    with RunFolder(path) as folder:
        job.run(folder)
        rows = folder.rows()
        job.run(folder)
        assert folder.rows() == rows, "what is there is not computed again"
    return path, rows


def of(rows, name, **params):
    return [r for r in rows if r["name"] == name and params.items() <= r["params"].items()]


def test_rates_are_those_of_the_simulator_with_an_interval(run):
    _, rows = run
    for policy in ("lru", "mq"):
        (row,) = of(rows, "block_hit_percent", policy=policy, capacity_blocks=200)
        assert row["value"] == pytest.approx(simulate(TRACE, policy, 200).block_hit_percent)
        assert row["low"] < row["value"] < row["high"]
        assert row["params"]["resampled"] == "sessions"
    rate = {r["variant"]: r["value"] for r in of(rows, "block_hit_percent", capacity_blocks=200)}
    (gain,) = of(rows, "gain_over_lru_points", policy="mq", capacity_blocks=200)
    assert gain["value"] == pytest.approx(rate["mq"] - rate["lru"]) and rate["belady"] > rate["mq"]
    assert gain["low"] <= gain["value"] <= gain["high"]


def test_tiers_are_those_of_a_replay_with_a_host(run):
    """But for the last hundredth: a request that is larger than what is free may pass the tier."""
    _, rows = run
    for host in (200, 400):
        (row,) = of(rows, "tier_hit_percent", capacity_blocks=200, host_blocks=host)
        replayed = simulate(TRACE, "lru", 200, host=Host(host)).block_hit_percent
        assert row["value"] == pytest.approx(replayed, abs=1.0)


def test_windows_make_up_the_whole(run):
    _, rows = run
    windows = of(rows, "window_hit_percent", policy="lru")
    assert len(windows) == 6 and all(0 <= row["value"] <= 100 for row in windows)


def test_hot_prefixes_are_the_stretches_that_requests_share():
    rows = [(n, 30, 1, [0, 1, 10 + n]) for n in range(5)] + [(9, 30, 1, [0, 7, 8])] * 1
    found = hot_prefixes(from_requests(rows, 10), 9)
    assert [tuple(hot) for hot in found] == [(0, 1, 6, 0), (1, 1, 5, 1)]
    trace = TRACE
    saved = sum(hot.blocks * (hot.requests - 1) for hot in hot_prefixes(trace, 10_000))
    assert saved == ideal(trace).block_hits


def test_the_page_says_what_to_do(run, tmp_path):
    page = write_report(run[0], tmp_path / "report").read_text()
    assert "**chats**, 200 blocks: LRU hits" in page and "points more are left" in page
    assert "A host tier of 200 blocks adds" in page and "## Hot prefixes" in page
    assert (tmp_path / "report" / "figures" / "miss_ratios.svg").is_file()
    assert "## Block hits, %" in page


def test_a_ratio_is_resampled_with_its_whole():
    draw = np.random.default_rng(0)
    whole = draw.integers(1, 100, 300)
    part = 0.3 * whole + draw.normal(0, 1, 300)
    value, low, high = ratio_interval(part, whole, resamples=500)
    assert low < value < high and value == pytest.approx(0.3, abs=0.01) and high - low < 0.02
    assert ratio_interval([1], [2]) == (0.5, None, None)
    assert ratio_interval([1, 2], [2, 4]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("wrong", [{"windows": 0}, {"capacity_blocks": []}, {"resamples": 5},
                                   {"policies": ["lruu"]}])  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(BadInput):
        Operate(TRACE, **wrong)


def test_golden_rates_of_the_bundled_traces():
    for name, percent in (("conversation", 36.64), ("synthetic", 63.96)):
        assert round(ideal(load_trace(name)).block_hit_percent, 2) == percent


def test_golden_rate_of_three_agent_sessions():
    """Sessions of kv-cache-tester as published, less what no rate depends on (tests/data/weka)."""
    trace = load_trace(Path(__file__).parents[1] / "data" / "weka")
    result = ideal(trace)
    assert (len(trace), result.block_hits, result.block_accesses) == (83, 70_565, 77_257)
    assert round(result.block_hit_percent, 2) == 91.34
    ended = Sessions(context_tokens=32_768, over_context="end").apply(trace)
    assert round(ideal(ended).block_hit_percent, 2) == 46.58 and len(ended) == 8


def test_names_of_lines_lie_apart_around_their_ends():
    assert apart([1.0, 50.0], 5.0) == [1.0, 50.0]
    assert apart([10.0, 10.0, 10.0], 4.0) == [6.0, 10.0, 14.0]
    places = apart([0.0, 1.0, 9.0, 9.5], 2.0)
    assert places == [-0.5, 1.5, 8.25, 10.25]
