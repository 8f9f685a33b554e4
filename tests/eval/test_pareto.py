"""The search: points of the space, refusals that cost a trial, and a study that goes on."""

from __future__ import annotations

import sys

import pytest

from kvlab.core import BadInput, Variant
from kvlab.eval import Pareto
from kvlab.eval.data import Books
from kvlab.eval.pareto import JOURNAL, composition
from kvlab.model.load import ReferenceModel
from kvlab.track import RunFolder

optuna = pytest.importorskip("optuna")
SPACE = {"format": ["int4", "k4v2"], "policy": ["none", "lru"], "budget_percent": [50],
         "recent": [0, 16], "block_size": [16]}  # fmt: skip


def job(**changes):
    about = {"trials": 4, "batch": 2, "documents": 1, "tokens": 130, "decode_tokens": 2,
             "chunk_tokens": 64, "progress": False, "device": "cpu"}  # fmt: skip
    return Pareto(ReferenceModel(), Books(), **{"space": SPACE} | about | changes)


def run(folder, **changes):
    with RunFolder(folder, resume=folder.exists()) as held:
        job(**changes).run(held, [])
        return held.rows()


def trials(folder):
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    )
    return optuna.load_study(study_name="pareto", storage=storage).trials


def test_points_leave_out_what_has_no_effect():
    plain = {"format": "int4", "budget_percent": 50, "recent": 0, "block_size": 16}
    name, settings, spec = composition(plain | {"policy": "none"})
    assert name == "int4 b16" and not spec.bounded and settings["format"] == "int4"
    name, settings, spec = composition(plain | {"policy": "lru", "recent": 32})
    assert name == "int4 lru 50% window 4+32 b16" and spec.window.middle
    assert settings["cache.budget_percent"] == 50 and spec.policy().name == "lru"
    assert not composition(plain | {"recent": 32})[2].window.middle
    name, settings, spec = composition(plain | {"summary": "merged"})
    assert name == "int4 b16" and not spec.summary.makes
    assert composition(plain | {"summary": "merged", "recent": 32})[2].summary.makes


def test_formats_alone_come_first_and_a_killed_search_goes_on(tmp_path):
    folder = tmp_path / "run"
    rows = run(folder)
    assert [t.params["policy"] for t in trials(folder)][:2] == ["none", "none"]
    found = {r["variant"] for r in rows}
    assert {"full", "int4 b16", "k4v2 b16"} <= found and len(trials(folder)) == 4
    assert all(t.values is not None for t in trials(folder))
    again = run(folder, trials=6)
    assert again[: len(rows)] == rows
    assert len(trials(folder)) == 6
    assert run(folder, trials=6) == again  # nothing left to do


def test_what_does_not_compose_costs_a_trial_and_says_why(tmp_path):
    space = {"format": ["int4"], "policy": ["lru"], "budget_percent": [500]}
    run(tmp_path / "run", space=space, trials=2)
    assert all("at most 100" in t.user_attrs["refused"] for t in trials(tmp_path / "run"))


@pytest.mark.parametrize("changes", [
    {"trials": 0}, {"batch": 0}, {"decode_tokens": 0}, {"space": {"colour": ["red"]}},
    {"space": {"format": []}},
])  # fmt: skip
def test_refuses_searches_of_nothing(changes):
    with pytest.raises(BadInput):
        job(**changes)


def test_refuses_variants_and_says_how_to_get_optuna(tmp_path, monkeypatch):
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(BadInput, match="makes its own"):
            job().run(folder, [Variant("x", {})])
        monkeypatch.setitem(sys.modules, "optuna", None)
        with pytest.raises(BadInput, match="pip install"):
            job().run(folder, [])
