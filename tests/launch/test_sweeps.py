"""`python -m kvlab -m ...`: what is there is skipped, failures are listed, one report of all."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import pytest

from kvlab import config as configuring
from kvlab.__main__ import main
from kvlab.launch import base, outcomes

CONF = str(Path(__file__).parents[1] / "conf")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Gives a sweep of toys in `tmp_path/sweep`; exit status and folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kvlab.__main__._conclude", lambda folder: None)  # a report for each run

    def run(*words: str):
        line = ["-m", "--config-dir", CONF, "experiment=toy_specs", "variants=[]", *words]
        return main([*line, f"hydra.sweep.dir={tmp_path / 'sweep'}"]), tmp_path / "sweep"

    return run


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def test_resume_skips_and_failures_are_listed_with_their_command(sweep, capsys, monkeypatch):
    pages = []

    def report(folders, out, title):
        pages.append(sorted(Path(folder).name for folder in folders))
        return out / "README.md"

    monkeypatch.setattr("kvlab.report.write_report", report)
    status, folder = sweep("cache.size=1,0,2", "track=jsonl")
    assert status == 2 and [o.status for o in outcomes(folder).values()] == [0, 2, 0]
    said = capsys.readouterr()
    told, reason, command = said.err.splitlines()
    assert told == "kvlab: 1 of 3 runs failed:"
    assert reason == "  1: cache.size=0: must be at least 1"
    assert f"results of 2 runs in {folder}" in said.out
    assert pages == [["0", "2"]]
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "kvlab"]
    mended = [w.replace("cache.size=0", "cache.size=3") for w in words[3:]]
    assert main(mended) == 0, "the command repeats the run in its folder"
    first, second = (json.loads((folder / str(n) / "track.jsonl").read_text().splitlines()[0])
                     for n in (0, 1))  # fmt: skip
    assert first["group"] == second["group"] == "sweep", "a repeated run belongs to its sweep"
    before = outcomes(folder)
    assert sweep("cache.size=1,0,2", "track=jsonl")[0] == 2, "not empty, and no resume"
    assert "resume=true goes on" in capsys.readouterr().err
    assert sweep("cache.size=1,0,2", "track=none", "resume=true")[0] == 2
    after = outcomes(folder)
    assert [after[n] == before[n] for n in (0, 1, 2)] == [True, False, True]
    assert sweep("cache.size=2,0,1", "resume=true")[0] == 2
    assert "run 0 of" in capsys.readouterr().err and rows(folder / "0")[0]["value"] == 1


@pytest.mark.parametrize(("words", "said"), [
    (["hydra.launcher.retrys=1"], "hydra.launcher.retrys=1: no such key"),
    (["hydra.launcher.retries=x"], "hydra.launcher.retries=x: must be a whole number"),
    (["hydra.launcher.gpus=9"], "hydra.launcher.gpus=9: 1 runs at a time with 9 each need 9"),
])  # fmt: skip
def test_a_launcher_that_cannot_be_leaves_nothing_behind(sweep, monkeypatch, capsys, words, said):
    pytest.importorskip("joblib")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    status, folder = sweep("hydra/launcher=joblib", "cache.size=1,2", *words)
    assert status == 2 and said in capsys.readouterr().err and not folder.exists()


def test_a_launcher_without_its_extra_or_its_sweep_is_refused(sweep, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    assert sweep("hydra/launcher=ray", "cache.size=1,2")[0] == 2
    assert "needs ray: pip install 'kvlab[ray]'" in capsys.readouterr().err
    line = ["--config-dir", CONF, "experiment=toy_specs", "hydra/launcher=joblib"]
    assert main(line) == 2
    assert "hydra/launcher=joblib: needs --multirun" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["joblib", "submitit", "ray"])
def test_every_launcher_says_all_its_settings(name, monkeypatch):
    """Values of `conf/launcher/` are the defaults of the class, and none is left out."""
    import hydra

    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with hydra.initialize_config_dir(str(configuring.conf_dir()), version_base="1.3"):
        config = hydra.compose("config", [f"hydra/launcher={name}"], return_hydra_config=True)
    node = dict(config.hydra.launcher)
    from kvlab.axes import load
    from kvlab.config.signature import parameters

    target = load("hydra.launcher._target_", node.pop("_target_"))
    assert node == {key: p.default for key, p in parameters(target)[0].items()}


@pytest.mark.slow
def test_jobs_of_joblib_are_those_of_the_sweep(sweep, monkeypatch):
    pytest.importorskip("joblib")
    paths = [CONF + "/..", str(Path(CONF).parents[1]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.retries=0"]
    words += ["cache.size=1,0,2", "hydra.sweep.subdir='run-${hydra.job.num}'"]
    status, folder = sweep(*words)
    assert status == 2 and [o.status for o in outcomes(folder).values()] == [0, 2, 0]
    assert [rows(folder / f"run-{n}")[0]["value"] for n in (0, 2)] == [1, 2]
    assert (folder / "report/README.md").is_file()
