"""A task from outside the package: controls, intervals, failures and resume are those of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvlab.__main__ import main
from kvlab.cache import CacheSpec
from kvlab.core import BadInput, Variant
from kvlab.eval import Bench
from kvlab.eval.data import Books
from kvlab.eval.runner import Runner
from kvlab.model.load import ReferenceModel
from kvlab.track import RunFolder
from kvlab.track.rows import canonical

HERE = Path(__file__).parent
PATH = "leading_digits.LeadingDigits"
MASS = Variant("attention_mass 50%", {"policy": "attention_mass"}, CacheSpec(
    policy="attention_mass", budget_percent=50, block_size=16, evict="block"))  # fmt: skip
NAMES = ["full", "attention_mass 50%", "random 50% (control)",
         "shuffled attention_mass 50% (control)", "window 50% (control)"]


@pytest.fixture(autouse=True)
def module(monkeypatch):
    """Its module can be imported, and is unknown again after the test."""
    monkeypatch.syspath_prepend(str(HERE))
    yield
    sys.modules.pop("leading_digits", None)


def measured(folder, tasks=PATH, variants=(MASS,), **changes):
    about = {"chunk_tokens": 64, "progress": False, "device": "cpu"} | changes
    with RunFolder(folder, resume=folder.exists()) as run:
        Bench(ReferenceModel(), tasks, Books(), **about).run(run, list(variants))
        return run.rows()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        return measured(tmp_path_factory.mktemp("drill") / "run")


def value(rows, variant, name, **params):
    [found] = [r for r in rows if (r["variant"], r["name"]) == (variant, name)
               and params.items() <= r["params"].items()]  # fmt: skip
    return found


def test_the_module_is_short():
    assert len((HERE / "leading_digits.py").read_text().splitlines()) <= 60


def test_it_is_paired_with_the_full_cache_by_question(rows):
    assert list(dict.fromkeys(r["variant"] for r in rows)) == NAMES
    full = value(rows, "full", "leading_digits_percent")
    assert full["value"] == 100 and full["count"] == 4 and full["params"]["baseline"]
    mine = value(rows, "attention_mass 50%", "leading_digits_percent")
    assert mine["params"]["task"] == "leading_digits" and not mine["params"]["query_aware"]
    delta = value(rows, "attention_mass 50%", "leading_digits_delta_points")
    assert delta["value"] == pytest.approx(mine["value"] - 100)
    assert delta["low"] <= delta["value"] <= delta["high"] and delta["low"] < delta["high"]
    assert value(rows, "full", "leading_digits_answer_tokens")["value"] > 1


def test_it_gets_its_controls_and_its_cells(rows):
    for kind in ("random", "shuffled", "window"):
        name = f"leading_digits_minus_{kind}_points"
        assert value(rows, "attention_mass 50%", name)["count"] == 4
    cells = [value(rows, "window 50% (control)", "leading_digits_at_percent", at=at)["value"]
             for at in ("start", "end")]  # fmt: skip
    assert cells[0] < cells[1], "a window has the newest tokens only"
    assert value(rows, "full", "cache_allocated_bytes")["value"] > 0


def test_a_failure_is_a_row_and_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch, rows):
    sound, calls = Runner.generate, []

    def faulty(self, *args):
        calls.append(self.name)
        mine = [name for name in calls if name == MASS.name == self.name]
        if len(mine) == 3:  # of four questions; the first text is kept
            raise RuntimeError("singular")
        return sound(self, *args)

    monkeypatch.setattr(Runner, "generate", faulty)
    first = measured(tmp_path / "run")
    [failed] = [r for r in first if r["name"] == "failed"]
    assert failed["variant"] == MASS.name and "singular" in failed["reason"]
    monkeypatch.setattr(Runner, "generate", lambda self, *a: calls.append("again") or
                        sound(self, *a))  # fmt: skip
    again = measured(tmp_path / "run")
    assert calls.count("again") == 2, "two questions of the second text, of nobody else"
    assert sorted(map(canonical, again)) == sorted(map(canonical, rows))


def test_a_question_inside_the_compressed_text_is_said_in_the_record(tmp_path):
    from leading_digits import LeadingDigits

    task = LeadingDigits(texts=1, query_aware=True)
    rows = measured(tmp_path / "run", task, [], controls=False)
    assert value(rows, "full", "leading_digits_percent", query_aware=True)["value"] == 100


def test_what_is_no_task_is_refused():
    for wrong, told in (("nothing", "known: text_loss"), ("no_such.Task", "cannot be imported"),
                        ("kvlab.eval.Bench", "is no kvlab.eval.Task"),
                        ("kvlab.eval.Task", "nothing to measure"),
                        ("kvlab.eval.Asking", "no `name`"), ([], "nothing to measure")):
        with pytest.raises(BadInput, match=told):
            Bench(ReferenceModel(), wrong, Books())


@pytest.mark.parametrize("line", [
    [f"task._target_={PATH}"],
    [f"tasks=[{PATH},{{_target_:kvlab.eval.TextCost,tokens:64,decode_tokens:2}}]"],
    ["--config-dir", str(HERE / "conf"), "task=leading_digits", "task.texts=1"],
])  # fmt: skip
def test_the_command_line_runs_it(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["experiment=none", "job=bench", "format=int4", "prefill.chunk_tokens=64",
                "prefill.progress=false", "eval.controls=false", "device=cpu", "track=none",
                f"hydra.run.dir={tmp_path / 'run'}"]  # fmt: skip
    assert main([*line, *settings]) == 0
    rows = [json.loads(x) for x in (tmp_path / "run/measurements.jsonl").read_text().splitlines()]
    assert value(rows, "int4", "leading_digits_percent")["count"] == (2 if len(line) > 3 else 4)
    page = (tmp_path / "run/report/README.md").read_text()
    assert "leading digits" in page and "leading digits at" not in page, "no table of cells"
    timed = {r["variant"] for r in rows if r["name"] == "prefill_seconds"}
    assert timed == ({"full", "int4"} if line[0].startswith("tasks") else set())
