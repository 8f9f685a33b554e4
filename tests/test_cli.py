"""`python -m kvlab`: composing, running, resuming, sweeping, failing, from anywhere."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab import __version__
from kvlab.__main__ import main
from kvlab.config import quote

ROOT = Path(__file__).resolve().parents[1]
CONF = str(ROOT / "tests" / "conf")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return [row["variant"] for row in rows(folder)]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Runs a toy experiment in `tmp_path/run`; returns exit status and folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, experiment: str = "toy_specs", folder: str = "run"):
        place = tmp_path / folder
        line = ["--config-dir", CONF, f"experiment={experiment}", f"hydra.run.dir={place}", *argv]
        return main(line), place

    return run


def test_run_folder_holds_config_environment_numbers_and_report(toy):
    status, folder = toy()
    assert status == 0
    assert {"config.yaml", "environment.json", "measurements.jsonl"} <= set(os.listdir(folder))
    assert (folder / "report").is_dir()
    assert names(folder) == ["bf16", "int8", "int4 cache.size=7"]
    assert rows(folder)[2]["params"] == {"format": "int4", "cache.size": 7}
    assert [row["value"] for row in rows(folder)] == [4, 4, 7]


def test_a_long_table_is_cut_and_says_so(toy, capsys, monkeypatch):
    monkeypatch.setattr("kvlab.__main__._TABLE_LINES", 4)
    variants = ",".join(f"'cache.size={size}'" for size in range(1, 8))
    _, folder = toy(f"variants=[{variants}]")
    shown = capsys.readouterr().out
    assert "cache.size=4" in shown and "cache.size=5" not in shown
    assert "... 3 more in the report" in shown and len(names(folder)) == 7


def test_the_first_line_comes_before_libraries_that_take_seconds(toy, tmp_path, capsys):
    assert toy()[0] == 0
    assert capsys.readouterr().out.startswith(f"kvlab {__version__}: experiment=toy_specs, "
                                              "job=count_specs, 3 variants; loading\n")
    code = ("import sys; from kvlab.__main__ import main, _started\n"
            "import kvlab.__main__ as run\n"
            "run._started = lambda told: sys.exit(str(sorted(set(sys.modules) & "
            "{'torch', 'transformers', 'matplotlib', 'datasets', 'wandb'})))\n"
            "main([])")
    assert process("-c", code, cwd=tmp_path).stderr == "[]\n"


def test_default_folder_lies_under_outputs(toy, tmp_path):
    assert main(["--config-dir", CONF, "experiment=toy_specs"]) == 0
    assert len(list(tmp_path.glob("outputs/*/*/measurements.jsonl"))) == 1


def test_command_line_wins_over_variants_of_an_experiment(toy):
    _, folder = toy("format=fp8", "cache.size=5")
    assert names(folder) == ["fp8", "fp8 cache.size=5"]
    assert {row["value"] for row in rows(folder)} == {5}


def test_variants_given_by_hand_win_over_the_rest_of_the_command_line(toy):
    _, folder = toy("format=fp8", "variants=['cache.size=9','format=int4']")
    assert names(folder) == ["cache.size=9", "int4"]
    assert rows(folder)[0]["params"] == {"cache.size": 9, "format": "fp8"}


def test_a_run_without_variants_is_named_after_its_own_settings(toy):
    _, folder = toy("variants=[]", "format=int2", "cache.size=3")
    assert names(folder) == ["int2 cache.size=3"]


def test_resume_measures_only_what_is_missing(toy):
    toy("job.fail=late")
    status, folder = toy("resume=true", "job.fail=null")
    assert status == 2 and names(folder) == ["bf16"]        # another config than it began with
    assert toy("resume=true", "job.fail=late")[0] == 2
    toy("variants=['format=bf16']", folder="second")
    assert toy("resume=true", folder="second")[0] == 0
    assert names(folder.parent / "second") == ["bf16", "int8", "int4 cache.size=7"]


def test_a_folder_in_use_is_refused_and_left_alone(toy, capsys):
    _, folder = toy()
    before = (folder / "measurements.jsonl").read_bytes()
    assert toy()[0] == 2
    assert "resume=true" in capsys.readouterr().err
    assert (folder / "measurements.jsonl").read_bytes() == before


def test_refusal_before_the_first_number_leaves_nothing(toy, capsys):
    status, folder = toy("job.fail=early", folder="a/b")
    assert status == 2 and not folder.parent.exists()
    assert capsys.readouterr().err == "kvlab: model.path=x: is broken\n"


def test_refusal_leaves_no_default_folder_either(toy, tmp_path):
    line = ["--config-dir", CONF, "experiment=toy_specs", "job.fail=early", "job.seconds=1.1"]
    assert main(line) == 2
    assert not list(tmp_path.iterdir())


def test_folder_with_a_quote_and_a_space(toy):
    status, folder = toy(experiment="toy", folder="it's a run")
    assert status == 2 and not folder.exists()      # the shell's quotes are not Hydra's
    place = f"hydra.run.dir={quote(str(folder))}"
    assert main(["--config-dir", CONF, "experiment=toy", place]) == 0
    assert (folder / "config.yaml").exists()


def test_environment_tells_the_command_as_it_was_typed(toy, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/kvlab", "not", "this"])
    _, folder = toy()
    command = json.loads((folder / "environment.json").read_text())["command"]
    assert command.startswith("kvlab --config-dir") and command.count("hydra.run.dir=") == 1


def test_refusal_after_a_number_keeps_it(toy):
    status, folder = toy("job.fail=late")
    assert status == 2 and names(folder) == ["bf16"]


def test_a_defect_keeps_its_traceback(toy):
    with pytest.raises(ZeroDivisionError):
        toy("job.fail=defect")


def test_interrupt_keeps_the_numbers_and_names_the_command_that_goes_on(toy, capsys):
    status, folder = toy("job.fail=interrupt", "cache.size=3")
    assert status == 130 and names(folder) == ["bf16"]
    told, command = capsys.readouterr().err.splitlines()
    assert told.startswith("kvlab: interrupted; ") and str(folder) in told
    python, dash_m, kvlab, *rest = shlex.split(command)
    assert (python, dash_m, kvlab, rest[-1]) == ("python", "-m", "kvlab", f"hydra.run.dir={folder}")
    assert main(rest) == 0
    assert names(folder) == ["bf16", "int8", "int4 cache.size=3"]
    assert {row["value"] for row in rows(folder)} == {3}


def test_multirun_makes_a_folder_for_each_job(toy, tmp_path):
    sweep = tmp_path / "sweep"
    line = ["-m", "--config-dir", CONF, "experiment=toy_specs", f"hydra.sweep.dir={sweep}"]
    assert main([*line, "format=int8,int4", "cache.size=2"]) == 0
    assert [names(sweep / str(i)) for i in (0, 1)] == [
        ["int8", "int8 cache.size=2"],
        ["int4", "int4 cache.size=2"],
    ]


@pytest.mark.parametrize("at", range(4))
def test_multirun_may_stand_anywhere(toy, tmp_path, at):
    sweep = tmp_path / "sweep"
    line = ["experiment=toy_specs", f"hydra.sweep.dir={sweep}", "variants=[]", "cache.size=2,3"]
    line.insert(at + 1, "-m")
    line[at:at] = ["--config-dir", CONF]
    assert main(line) == 0
    assert [names(sweep / str(i)) for i in (0, 1)] == [["cache.size=2"], ["cache.size=3"]]


def test_multirun_with_a_bad_job_says_so(toy, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    line = ["-m", "--config-dir", CONF, "experiment=toy_specs", f"hydra.sweep.dir={sweep}"]
    assert main([*line, "cache.size=1,0"]) == 2
    assert "cache.size=0: must be at least 1" in capsys.readouterr().err
    assert (sweep / "0").exists() and not (sweep / "1").exists()


def test_multirun_that_cannot_start_writes_nothing(toy, tmp_path, capsys):
    line = ["-m", "--config-dir", CONF, "experiment=toy_specs", f"hydra.sweep.dir={tmp_path / 's'}"]
    for given, words in {
        "cache.siz=1,2": "cache.siz=1: no such key; did you mean cache.size?",
        "format=int5,int4": "format=int5: no such option; did you mean int8?",
        "int4": "argument=int4: write key=value",
    }.items():
        assert main([*line, given]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvlab 0.")


def test_cfg_job_shows_without_running(toy, tmp_path, capsys):
    assert main(["--cfg", "job", "format=int4"]) == 0
    assert "kvlab.format.KVFormat" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def process(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A fresh interpreter in another folder; kvlab is found as in an editable install."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_runs_as_a_module_from_another_folder(tmp_path):
    done = process(
        *("-m", "kvlab", "--config-dir", CONF, "experiment=toy", "variants=['format=int4']"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/*/*/measurements.jsonl"))) == 1


def test_bad_input_as_a_process_is_one_paragraph_and_status_2(tmp_path):
    done = process("-m", "kvlab", "format=int5", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("kvlab: format=int5: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_command_line_does_not_import_torch(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"  # importing them would fail
        "from kvlab.__main__ import main\n"
        f"sys.exit(main(['--config-dir', {CONF!r}, 'experiment=toy']))"
    )
    done = process("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
