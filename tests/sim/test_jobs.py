"""Experiments on traces: rows in a run folder, resumed runs, refusals, figures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvlab.core import BadInput, Variant
from kvlab.report import canvas, write_report
from kvlab.report.hit_rates import pictures
from kvlab.sim import CostModel, Host, hit_curve, simulate
from kvlab.sim.diagnose import HitCurve, reuse, working_set
from kvlab.sim.jobs import AdaptiveRegret, HitRate, listed
from kvlab.sim.sizes import SHAPES, token_bytes
from kvlab.sim.workloads import chats, scans
from kvlab.track import RunFolder

POLICIES = ["lru", "arc", "belady"]


@pytest.fixture(scope="module")
def trace():
    return chats(60, open_chats=8)


def run(job, path, **more):
    with RunFolder(path, **more) as folder:
        job.run(folder, [])
        return folder.rows()


def value(rows, name, variant, **params):
    found = [
        row["value"]
        for row in rows
        if (row["name"], row["variant"]) == (name, variant)
        and params.items() <= row["params"].items()
    ]
    assert len(found) == 1, (name, variant, params, found)
    return found[0]


def test_hit_rates_are_those_of_the_simulator(tmp_path, trace):
    job = HitRate(trace, policies=POLICIES, capacity_blocks=[200, 300])
    rows = run(job, tmp_path / "r")
    for policy in ("lru", "arc"):
        for capacity in (200, 300):
            expected = simulate(trace, policy, capacity)
            for name in ("block_hit_percent", "flops_saved_percent", "thrash_percent"):
                found = value(rows, name, policy, capacity_blocks=capacity, trace="chats")
                assert found == getattr(expected, name)
    best = value(rows, "block_hit_percent", "belady", capacity_blocks=200)
    assert best >= value(rows, "block_hit_percent", "lru", capacity_blocks=200)


def test_a_budget_holds_as_many_blocks_as_the_format_lets_it(tmp_path, trace):
    shape = "qwen3-0.6b"
    job = HitRate(
        trace, [], [], budgets_gib=[2], formats=["bf16", "int4"], budget_policies=["lru"],
        shape=shape,
    )  # fmt: skip
    rows = run(job, tmp_path / "r")
    for format in ("bf16", "int4"):
        blocks = int(2 * 2**30 // (64 * token_bytes(format, SHAPES[shape])))
        found = value(rows, "block_hit_percent", f"{format} lru", capacity_blocks=blocks)
        assert found == simulate(trace, "lru", blocks).block_hit_percent
    assert blocks == 1069  # 2 GiB of int4: 31,360 bytes a token


def test_a_resumed_run_skips_what_is_there(tmp_path, trace, monkeypatch):
    job = HitRate(trace, policies=["lru"], capacity_blocks=[200])
    first = run(job, tmp_path / "r")
    again = HitRate(trace, policies=["lru", "fifo"], capacity_blocks=[200])
    asked = []
    plain = again.replay
    again.replay = lambda *point: asked.append(point[1]) or plain(*point)
    rows = run(again, tmp_path / "r", resume=True)
    assert asked == ["fifo"] and len(rows) > len(first)


def test_the_chooser_is_judged_by_the_best_fixed_policy(tmp_path):
    trace = scans(150, documents=12)
    rows = run(AdaptiveRegret(trace, [1200], fixed=["lru", "arc"]), tmp_path / "r")
    percent = {p: simulate(trace, p, 1200).block_hit_percent for p in ("lru", "arc", "adaptive")}
    regret = value(rows, "regret_points", "adaptive", capacity_blocks=1200)
    assert regret == pytest.approx(max(percent["lru"], percent["arc"]) - percent["adaptive"])
    gain = value(rows, "gain_over_lru_points", "adaptive", capacity_blocks=1200)
    assert gain == pytest.approx(percent["adaptive"] - percent["lru"])
    assert value(rows, "regret_to_bound_points", "adaptive", capacity_blocks=1200) >= 0


def test_curves_are_rows_and_arrays(tmp_path, trace):
    rows = run(HitCurve(trace, multiples=[1, 2], points=5), tmp_path / "r")
    held = np.load(tmp_path / "r" / "curve_chats_128.npz")
    capacities, hits = hit_curve(trace.coarser(2))
    assert np.array_equal(held["capacities"], capacities)
    assert np.array_equal(held["block_hits"], hits)
    middle = [r for r in rows if r["name"] == "block_hit_percent" and r["variant"] == "lru"]
    assert 8 <= len(middle) <= 10
    for row in middle[:5]:
        expected = simulate(trace, "lru", row["params"]["capacity_blocks"])
        assert row["value"] == pytest.approx(expected.block_hit_percent)
    assert value(rows, "unbounded_block_hit_percent", "trace") > 50


def test_tiers_and_service_times_reach_the_simulator(tmp_path, trace):
    host, service = Host(100), CostModel(50_000.0, 200.0)
    job = HitRate(trace, ["lru"], [300], budget_policies=["lru"], host=host, service=service)
    rows = run(job, tmp_path / "r")
    expected = simulate(trace, "lru", 300, host=host, service=service)
    for name in ("ttft_ms", "stalled_requests"):
        assert value(rows, name, "lru") == expected.service[name]
    assert value(rows, "block_hit_percent", "lru") == expected.block_hit_percent


def test_reuse_and_working_sets_by_hand(tiny):
    trace = tiny([0, 1], [0, 2], [3], [0, 1])  # one request a second
    found = reuse(trace)
    assert found.distance_blocks.tolist() == [1, 2, 4]
    assert found.age_ms.tolist() == [1000, 2000, 3000]
    starts, blocks = working_set(trace, window_seconds=2.0)
    assert starts.tolist() == [0.0, 2.0] and blocks.tolist() == [3, 3]


def test_lists_of_traces_are_one_list(trace):
    assert listed(trace) == [trace] == listed([[trace]])
    assert len(listed([trace, [trace, trace]])) == 3


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda t: HitRate(t, policies=["lfru"]), "known: "),
        (lambda t: HitRate(t, formats=["int5"]), "known: "),
        (lambda t: HitRate(t, shape="gpt"), "llama-3.1-8b"),
        (lambda t: AdaptiveRegret(t, fixed=["fifo"]), "must hold lru"),
        (lambda t: HitRate(t, policies=["belady"], host=Host(9)), "bounds one tier"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(trace, make, complaint):
    with pytest.raises(BadInput, match=complaint):
        make(trace)


def test_variants_are_refused(tmp_path, trace):
    job = HitRate(trace, policies=["lru"], capacity_blocks=[200])
    with RunFolder(tmp_path / "r") as folder, pytest.raises(BadInput, match="job.policies"):
        job.run(folder, [Variant("int4", {})])


def test_every_run_has_its_figures(tmp_path, trace):
    jobs = {
        "rates": HitRate(trace, POLICIES, [200, 300], [0.5, 1], shape="qwen3-0.6b"),
        "curve": HitCurve(trace, multiples=[1, 2], points=4),
        "chooser": AdaptiveRegret(trace, [200, 300]),
    }
    wanted = {
        "rates": ["format_or_policy", "budgets", "hit_rates"],
        "curve": ["hit_rates", "block_sizes"],
        "chooser": ["chooser", "hit_rates"],
    }
    for name, job in jobs.items():
        found = pictures(run(job, tmp_path / name))
        assert [p.stem for p in found] == wanted[name]
        with canvas.styled():
            for picture in found:
                canvas.save(picture.draw(), tmp_path / picture.stem)
                assert (tmp_path / f"{picture.stem}.svg").stat().st_size > 10_000
    assert pictures([{"name": "perplexity", "params": {}, "value": 1.0, "variant": "x"}]) == []


def test_the_standard_report_has_the_figures_and_names_no_model(tmp_path, trace):
    config = "model: {name: reference}"
    run(HitRate(trace, ["lru", "belady"], [200, 300]), tmp_path / "run", config=config)
    page = write_report(tmp_path / "run", tmp_path / "report").read_text()
    assert "figures/hit_rates.svg" in page and "reference model" not in page


def test_a_run_is_published_as_a_study(tmp_path, trace):
    run(HitRate(trace, POLICIES, [200, 300], [0.5], shape="qwen3-0.6b"), tmp_path / "run")
    (tmp_path / "text.md").write_text("# Why\n")
    script = Path(__file__).parents[2] / "experiments" / "hit_rate" / "report.py"
    arguments = [tmp_path / "run", tmp_path / "study", "--text", tmp_path / "text.md"]
    where = os.environ | {"PYTHONPATH": str(script.parents[2])}
    subprocess.run([sys.executable, script, *arguments], check=True, env=where)
    page = (tmp_path / "study" / "README.md").read_text()
    assert page.startswith("# Why") and "| | 200 | 300 |" in page and "commit" in page
    for figure in re.findall(r"\((figures/.*\.svg)\)", page):
        assert (tmp_path / "study" / figure).is_file()
    rows = (tmp_path / "study" / "results.jsonl").read_text().splitlines()
    assert {"run", "commit", "device"} <= json.loads(rows[0])["params"].keys()


NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('torch', 'transformers', 'numba'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
"""
LIBRARY = """
from kvlab.sim import load_trace, simulate, hit_curve
trace = load_trace('synthetic')
print(simulate(trace, 'lru', 1000).block_hits, hit_curve(trace)[1][-1])
"""
COMMAND = """
from kvlab.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def python(code, *arguments):
    command = [sys.executable, "-c", NO_TORCH + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_library_needs_no_torch():
    done = python(LIBRARY)
    assert done.stdout.split() == ["10252", "77953"], done.stderr


def test_the_command_line_runs_an_experiment_without_torch(tmp_path):
    done = python(
        COMMAND, "experiment=hit_rate", "trace=chats", "trace.requests=40", "track=none",
        "job.policies=[lru,belady]", "job.capacity_blocks=[200]", "job.budgets_gib=[]",
        f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "measurements.jsonl").read_text().splitlines()
    assert {json.loads(line)["variant"] for line in lines} == {"lru", "belady"}
