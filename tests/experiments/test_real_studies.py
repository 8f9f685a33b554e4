"""The parts of a study are its variants, each once; parts are joined again into one run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def module(name):
    place = ROOT / "experiments" / "real_studies"
    sys.path.insert(0, str(place))
    try:
        spec = importlib.util.spec_from_file_location(f"real_{name}", place / f"{name}.py")
        made = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = made
        spec.loader.exec_module(made)
        return made
    finally:
        sys.path.remove(str(place))


studies, report = module("studies"), module("report")


@pytest.mark.parametrize("study", studies.STUDIES, ids=lambda study: study.report)
def test_parts_hold_each_variant_once(study):
    told = yaml.safe_load((ROOT / f"conf/experiment/{study.experiment}.yaml").read_text())
    found = studies.parts(study)
    if found == [None]:
        return
    assert all(found)
    assert sorted(v for part in found for v in part) == sorted(told["variants"])


def test_rows_of_parts_become_one_run_named_after_the_model(tmp_path):
    def row(variant, value):
        return {"variant": variant, "params": {"tokens": 8}, "name": "kl_mean_nats",
                "value": value, "low": None, "high": None, "unit": "nats", "better": "lower",
                "count": 7}

    for part, rows in enumerate([[row("full", 1.0), row("a", 2.0)], [row("full", 9.0),
                                                                     row("b", 3.0)]]):
        folder = tmp_path / "packed" / str(part)
        folder.mkdir(parents=True)
        lines = "\n".join(map(json.dumps, rows)) + "\n"
        (folder / "measurements.jsonl").write_text(lines)
        command = f"python -m kvlab experiment=x hydra.run.dir=.../{part} 'variants=[\"a b\"]' y=1"
        (folder / "environment.json").write_text(json.dumps({"command": command}))
    parts = sorted((tmp_path / "packed").glob("*"))
    made = report.joined(parts, tmp_path / "smollm2-135m")
    lines = (made / "measurements.jsonl").read_text().splitlines()
    assert [(r["variant"], r["value"]) for r in map(json.loads, lines)] == [
        ("full", 1.0), ("a", 2.0), ("b", 3.0)]  # fmt: skip
    told = json.loads((made / "environment.json").read_text())
    assert told["command"] == "python -m kvlab experiment=x y=1"
    assert report.joined([], tmp_path / "none") is None


def test_parts_of_unlike_commands_tell_both(tmp_path):
    for part, words in enumerate(("eval.tokens=4096", "eval.tokens=8192 'variants=[\"x\"]'")):
        (tmp_path / f"{part}").mkdir()
        (tmp_path / f"{part}/measurements.jsonl").write_text("")
        command = {"command": f"kvlab {words} resume=true"}
        (tmp_path / f"{part}/environment.json").write_text(json.dumps(command))
    made = report.joined([tmp_path / "0", tmp_path / "1"], tmp_path / "made")
    told = json.loads((made / "environment.json").read_text())
    assert told["command"] == "kvlab eval.tokens=4096; kvlab eval.tokens=8192"
