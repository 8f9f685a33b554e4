"""Recall on the reference model: what keeps the fact finds it, what lost it does not."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import Recall
from kvlab.eval.data import Books
from kvlab.eval.needle import SecretNumber
from kvlab.eval.rows import paired, share
from kvlab.eval.runner import Runner
from kvlab.model.load import RandomModel, ReferenceModel
from kvlab.track import RunFolder
from kvlab.track.rows import canonical
from kvlab.window import SinkWindow

WINDOW = Variant("window", {"window": "sink"}, CacheSpec(
    window=SinkWindow(sinks=4, recent=128, middle=False), block_size=16))  # fmt: skip
DENSE = Variant("fp32", {"format": "fp32"}, CacheSpec(format="fp32", block_size=16))

FEW = {"lengths": [150], "question_tokens": 16}  # what a run comes back to has little to do with it


def job(**changes):
    about = {"documents": 2, "trials": 1, "lengths": [400], "depths": [10, 50, 100], "needles": 2,
             "chunk_tokens": 128, "progress": False, "controls": False, "device": "cpu"}
    return Recall(ReferenceModel(), Books(), SecretNumber(), **about | changes)


def measured(folder, variants, **changes):
    with RunFolder(folder, resume=folder.exists()) as run:
        job(**changes).run(run, variants)
        return run.rows()


def value(rows, variant, name, **params):
    found = [r for r in rows if (r["variant"], r["name"]) == (variant, name)
             and params.items() <= r["params"].items()]  # fmt: skip
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("recall") / "run", [DENSE, WINDOW])


def test_a_lossless_cache_recalls_what_the_full_one_does(rows):
    full = value(rows, "full", "needle_recall_percent")
    assert full["value"] == 100 and full["count"] == 6 and full["params"]["baseline"]
    same = value(rows, "fp32", "needle_recall_delta_points")
    assert same["value"] == 0 and same["low"] == -same["high"] < 0
    assert abs(value(rows, "fp32", "needle_answer_delta_nats")["value"]) < 0.05


def test_a_window_forgets_what_left_it_and_cells_say_where(rows):
    at = {d: value(rows, "window", "needle_recall_at_percent", depth_percent=d)
          for d in (10, 50, 100)}  # fmt: skip
    assert [at[d]["value"] for d in at] == [0, 0, 100] and at[50]["count"] == 2
    lost = value(rows, "window", "needle_recall_delta_points")
    assert lost["value"] == pytest.approx(-200 / 3) and lost["high"] < 0
    assert value(rows, "window", "needle_recall_full_percent")["value"] == 100
    assert value(rows, "window", "resident_tokens_percent")["value"] < 50


def test_one_needle_a_prompt_and_policies_that_know_the_question(tmp_path):
    rows = measured(tmp_path / "run", [DENSE], needles=1, query_aware=True, depths=[50])
    assert value(rows, "fp32", "needle_recall_percent")["value"] == 100


def test_answers_may_go_through_the_step_that_is_captured(tmp_path):
    """And the next question finds the cache as it was behind the context."""
    about = {"documents": 1, "lengths": [200], "depths": [20, 80], "needles": 2}
    eager = measured(tmp_path / "eager", [DENSE], **about)
    static = measured(tmp_path / "static", [DENSE], decode_driver="static", **about)
    for name in ("needle_recall_percent", "needle_answer_delta_nats"):
        mine, other = (value(rows, "fp32", name)["value"] for rows in (static, eager))
        assert mine == pytest.approx(other, abs=1e-3)


def test_controls_run_beside_what_they_control(tmp_path):
    spec = CacheSpec(policy="attention_mass", budget_percent=50, block_size=16, evict="block")
    variant = Variant("attention_mass 50%", {"policy": "attention_mass"}, spec)
    rows = measured(tmp_path / "run", [variant], controls=True, documents=1, depths=[50], needles=1)
    controls = {r["variant"]: r["params"].get("control") for r in rows}
    assert set(controls) == {"full", "attention_mass 50%", "random 50% (control)",
                             "shuffled attention_mass 50% (control)", "window 50% (control)"}
    assert controls["window 50% (control)"] == "the newest tokens, in as many bytes"
    kinds = [r["name"] for r in rows if "_minus_" in r["name"]]
    assert kinds == [f"needle_recall_minus_{k}_points" for k in ("random", "shuffled", "window")]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("few") / "run", [DENSE, WINDOW], **FEW)


def test_a_killed_run_goes_on(tmp_path, few):
    folder = tmp_path / "run"
    measured(folder, [DENSE, WINDOW], **FEW)
    file = folder / "measurements.jsonl"
    lines = file.read_text().splitlines()
    kept = [x for x in lines if json.loads(x)["variant"] == "full"]
    file.write_text("\n".join(kept) + "\n")
    again = measured(folder, [DENSE, WINDOW], **FEW)
    assert sorted(map(canonical, again)) == sorted(map(canonical, few))
    assert len(file.read_text().splitlines()) == len(lines)


@pytest.mark.parametrize("error", [RuntimeError("singular"), KeyboardInterrupt()])
def test_a_variant_that_raises_loses_one_prompt_and_a_stop_none(
    tmp_path, monkeypatch, few, error
):
    folder, sound, starts = tmp_path / "run", Runner.start, []

    def faulty(self):
        starts.append(self.name)
        if self.name == "fp32" and starts.count("fp32") == 3:
            raise error
        sound(self)

    monkeypatch.setattr(Runner, "start", faulty)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            measured(folder, [DENSE, WINDOW], **FEW)
    else:
        first = measured(folder, [DENSE, WINDOW], **FEW)
        [failed] = [r for r in first if r["name"] == "failed"]
        assert failed["variant"] == "fp32" and failed["reason"].startswith("RuntimeError: singular")
        assert value(first, "window", "needle_recall_percent")
    starts[:] = ["fp32"] * 9
    again = measured(folder, [DENSE, WINDOW], **FEW)
    assert starts.count("full") == 0 and starts[9:].count("fp32") == 2, "the other two were kept"
    assert sorted(map(canonical, again)) == sorted(map(canonical, few))


def test_shares_stay_shares():
    some = share("x", [np.array([1.0]), np.array([0.0])], seed=0)
    assert (some.value, some.low, some.high, some.count) == (50, None, None, 2)  # too few to tell
    some = share("x", [np.array([1.0])] * 3 + [np.array([0.0])], seed=0)
    assert 0 < some.low < some.value == 75 < some.high < 100
    every = share("x", [np.ones(1)] * 20, seed=0)
    assert every.low == pytest.approx(83.2, abs=0.1) and every.high == 100


def test_a_paired_difference_is_not_surer_than_its_questions():
    ones, mixed = [np.ones(4)] * 5, [np.array([1.0, 1, 0, 1])] * 5
    same = paired(ones, ones, seed=0)
    assert same.value == 0 and same.high == pytest.approx(16.8, abs=0.1)
    none = paired([np.zeros(4)] * 5, ones, seed=0)
    assert (none.value, none.low) == (-100, -100) and none.high == pytest.approx(-83.2, abs=0.1)
    worse = paired(mixed, ones, seed=0)
    assert worse.value == -25 and worse.low < -25 < worse.high


@pytest.mark.parametrize("changes", [
    {"trials": 0}, {"question_tokens": 0}, {"depths": [101]}, {"depths": []}, {"lengths": []},
    {"needles": 4}, {"needles": 0}, {"chunk_tokens": 0},
])  # fmt: skip
def test_refuses_settings_that_ask_nothing(changes):
    with pytest.raises(BadInput):
        job(**changes)


def test_refuses_random_weights(tmp_path):
    tiny = RandomModel(hidden_size=32, layers=1, query_heads=2, kv_heads=1, head_dim=16,
                       mlp_size=32, vocabulary=8192)  # fmt: skip
    task = Recall(tiny, Books(), SecretNumber(), device="cpu", progress=False)
    with RunFolder(tmp_path / "run") as run, pytest.raises(BadInput, match="random weights"):
        task.run(run, [DENSE])


def test_a_difference_of_shares_ends_at_a_hundred_points():
    """Ten of eleven answers lost: the bootstrap alone goes on to -102."""
    lost, full = [np.eye(11)[0]], [np.ones(11)]
    found = paired(lost, full, 0)
    assert found.value == pytest.approx(-1000 / 11) and found.low == -100 < found.high < -50
