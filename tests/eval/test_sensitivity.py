"""Loss by layer, the search under a budget, and the line that it ends with."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from small import Noise, Tiny

from kvlab.core import BadInput
from kvlab.eval import Sensitivity
from kvlab.eval.allotment import Choice, allot
from kvlab.eval.sensitivity import LOSS, PREDICTED, runs
from kvlab.report.layers import layer_figures, layer_losses
from kvlab.track import RunFolder


def test_the_allotment_is_the_best_there_is():
    draw = np.random.default_rng(3)
    for _ in range(20):
        items = [[Choice(float(draw.random()), int(n) * 8) for n in draw.integers(1, 9, 3)]
                 for _ in range(4)]  # fmt: skip
        room = int(draw.integers(8, 200))
        found, fitting = allot(items, room), []
        for chosen in product(range(3), repeat=4):
            taken = [choices[n] for choices, n in zip(items, chosen)]
            if sum(c.nbytes for c in taken) <= room:
                fitting.append(sum(c.loss for c in taken))
        if not fitting:
            assert found is None
            continue
        taken = [choices[n] for choices, n in zip(items, found)]
        assert sum(c.nbytes for c in taken) <= room
        assert sum(c.loss for c in taken) == pytest.approx(min(fitting))


def test_equal_neighbours_are_one_entry():
    assert runs(["a", "a", "b", "a"]) == ["a*2", "b", "a"]


def job(**changes):
    about = {"keys": ["int8", "int2"], "values": ["int8", "int2"], "like": ["k8v4"], "sinks": 0,
             "bits": [5.5], "block_size": 16, "documents": 1, "check_documents": 1, "tokens": 80,
             "chunk_tokens": 32, "batch": 3, "progress": False, "device": "cpu"}  # fmt: skip
    return Sensitivity(Tiny(), Noise(), **about | changes)


def run(path):
    with RunFolder(path, resume=path.exists()) as folder:
        job().run(folder, [])
        return folder.rows()


def test_a_run_measures_each_case_and_checks_what_it_finds(tmp_path, capsys):
    rows = run(tmp_path / "run")
    cases = {row["variant"]: row["value"] for row in rows if row["name"] == LOSS}
    assert len(cases) == 9 and cases.pop("full") == 0  # two layers, two sides, two codecs
    for layer, side in product((0, 1), ("keys", "values")):
        assert 0 < cases[f"layer {layer} {side} int8"] < cases[f"layer {layer} {side} int2"]
    check = {row["variant"]: row for row in rows if row["name"] == "kl_mean_nats"}
    assert {"k8v4", "by layer as k8v4", "by layer as 5.5 bits"} <= check.keys()
    params = check["by layer as k8v4"]["params"]
    assert params["format"] == "by_layer" and len(params["format.layers"]) in (1, 2)
    assert sum(row["name"] == PREDICTED for row in rows) == 2
    printed = capsys.readouterr().out
    assert "format=by_layer 'format.layers=[" in printed and "k8v4 0." in printed
    held = {row["variant"]: row["value"] for row in rows if row["name"] == "cache_logical_bytes"}
    assert held["by layer as k8v4"] <= held["k8v4"]
    assert run(tmp_path / "run") == rows  # nothing is measured twice
    shown = SimpleNamespace(rows=rows, label="tiny")
    assert len(layer_losses(shown)) == 8
    [(stem, _, _, draw)] = layer_figures([shown])
    assert stem == "layer_losses" and draw().axes


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no budget"):
        job(like=[], bits=[])
    with RunFolder(tmp_path / "run") as folder, pytest.raises(BadInput, match="no codec 'int9'"):
        job(keys=["int9"]).run(folder, [])
