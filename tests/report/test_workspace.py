"""A W&B workspace as code: its structure, which needs no key and no network."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import yaml

from kvlab.core import BadInput, Measurement
from kvlab.report import workspace as module
from kvlab.report.workspace import main, workspace
from kvlab.track import RunFolder, group

ROWS = [
    Measurement("kl_mean_nats", 0.02, "nats", "lower", 0.01, 0.03, 12),
    Measurement("kv_bytes_per_token", 576.0, "bytes/token", "lower"),
    Measurement("decode_tokens_per_second", 90.0, "tokens/s", "higher"),
    Measurement("documents", 12, "", None),
]


@pytest.fixture
def sweep(tmp_path):
    for number, variant in enumerate(["int8", "int4"]):
        config = yaml.safe_dump({"format": variant})
        with RunFolder(tmp_path / "sweep" / str(number), config=config) as folder:
            folder.add(variant, {"tokens": 100}, ROWS)
            if variant == "int4":
                folder.add(variant, {"tokens": 200}, ROWS)
    return tmp_path / "sweep"


def test_sections_and_the_keys_of_the_summaries(sweep):
    pytest.importorskip("wandb_workspaces")
    made = workspace([sweep], "me", "kvlab", "mine", group="sweep")
    assert (made.entity, made.project, made.name) == ("me", "kvlab", "mine")
    panels = {section.name: section.panels for section in made.sections}
    assert list(panels) == ["Decision table", "Frontier", "Quality", "Speed", "Bytes"]
    assert panels["Decision table"][0].table_name == "measurements"
    [speed] = panels["Speed"]
    assert [metric.name for metric in speed.metrics] == [
        "int8/decode_tokens_per_second.value",
        "int4/decode_tokens_per_second[tokens=100].value",
        "int4/decode_tokens_per_second[tokens=200].value",
    ]
    points = [panel for panel in panels["Frontier"] if hasattr(panel, "x")]
    assert (points[0].x.name, points[0].y.name) == (
        "int8/kv_bytes_per_token.value", "int8/kl_mean_nats.value")  # fmt: skip
    assert "sweep" in str(made.runset_settings.filters)


def test_heatmaps_are_the_figures_of_the_runs(sweep, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    drawn = [SimpleNamespace(stem=s) for s in ("recall_heatmap", "recall_heatmap-2", "hit_rate")]
    monkeypatch.setattr(module, "drawings", lambda *_: drawn)
    sections = {s.name: s.panels for s in workspace([sweep], "me", "kvlab").sections}
    keys = [panel.media_keys for panel in sections["Heatmaps"]]
    assert keys == [["figures/recall_heatmap"], ["figures/recall_heatmap-2"]]


def test_the_command_shows_saves_and_refuses(sweep, monkeypatch, capsys, tmp_path):
    pytest.importorskip("wandb_workspaces")
    line = [str(sweep), "--entity", "me"]
    assert main([*line, "--dry"]) == 0
    assert "Decision table: 2 panels" in capsys.readouterr().out
    monkeypatch.setattr(module, "_save", lambda made: SimpleNamespace(url="https://there"))
    assert main(line) == 0 and capsys.readouterr().out == "https://there\n"
    assert main([str(tmp_path / "none"), "--entity", "me"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_missing_extra_is_named(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(BadInput, match=r"pip install 'kvlab\[workspace\]'"):
        workspace([sweep], "me", "kvlab")


class Api:
    """W&B's public API over a sweep's folder; `asked`: what it was asked for."""

    asked: list = []

    def __init__(self, sweep):
        self.sweep = sweep

    def runs(self, project, filters, order):
        self.asked.append((project, filters))
        return [self.run(number) for number in ("0", "1")]

    def run(self, number):
        def download(root):
            with RunFolder(root) as folder:
                folder.add("int8", {"job": number}, ROWS)

        old = SimpleNamespace(type="results", download=None)
        artifacts = [old, SimpleNamespace(type="results", download=download),
                     SimpleNamespace(type="report", download=None)]  # fmt: skip
        return SimpleNamespace(name=f"hit_rate sweep {number}", id="x",
                               logged_artifacts=lambda: artifacts)  # fmt: skip


def test_a_sweep_is_read_back_as_one_group(sweep, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda: Api(sweep)))
    out = tmp_path / "back"
    assert group.main(["me/kvlab/sweep", "--out", str(out)]) == 0
    assert Api.asked == [("me/kvlab", {"group": "sweep"})]
    assert sorted(p.name for p in out.iterdir()) == ["0", "1"]
    assert group.main(["me/kvlab/sweep", "--out", str(out)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert group.main(["sweep", "--out", str(tmp_path / "c")]) == 2
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda: 1 / 0))
    assert group.main(["me/kvlab/sweep", "--out", str(tmp_path / "d")]) == 2
    assert "cannot be read from W&B" in capsys.readouterr().err
