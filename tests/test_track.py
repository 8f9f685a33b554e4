"""The run folder and its trackers."""

import inspect
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb_file
import yaml

from kvlab import track
from kvlab.core import BadInput, Measurement
from kvlab.track import JsonlTracker, RunFolder, Tracker, WandbTracker, environment, online, probe
from kvlab.track.wandb_run import run_name

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "seed: 1\ndevice: cpu\nvariants: [a]\n"
LOSS = Measurement("kl_mean_nats", 0.25, "nats", "lower", 0.2, 0.3, 12)


def rows_on_disk(path):
    return [json.loads(line) for line in (path / "measurements.jsonl").read_text().splitlines()]


def test_a_row_holds_all_fields(tmp_path):
    with RunFolder(tmp_path / "run", config=CONFIG) as folder:
        folder.add("int4", {"tokens": np.int64(7)}, [LOSS], step=3)
    (row,) = rows_on_disk(tmp_path / "run")
    assert row == {"variant": "int4", "params": {"tokens": 7}, **LOSS._asdict(), "step": 3}
    assert (tmp_path / "run/config.yaml").read_text() == CONFIG


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_are_strict_json(tmp_path, value):
    folder = RunFolder(tmp_path / "run")
    folder.add("a", {"x": value}, [Measurement("perplexity", np.float32(value), "", low=value)])

    def refuse(constant):
        raise AssertionError(constant)

    line = (tmp_path / "run/measurements.jsonl").read_text()
    row = json.loads(line, parse_constant=refuse)
    np.testing.assert_equal([float(row["value"]), float(row["low"])], [value, value])
    assert row["high"] is None
    folder.close()
    again = RunFolder(tmp_path / "run", resume=True).rows()
    np.testing.assert_equal(again[0]["value"], value)


def test_rows_are_on_disk_before_the_run_ends(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for count in (1, 2, 3):
        folder.add("a", {"count": count}, [LOSS])
        assert len(rows_on_disk(tmp_path / "run")) == count


@pytest.mark.parametrize(
    "torn", ['{"variant": "b", "par', "garbage", '{"variant": "b"}', "\x00\x00"]
)
def test_resume_cuts_a_torn_line_and_skips_what_is_there(tmp_path, torn):
    with RunFolder(tmp_path / "run", config=CONFIG) as folder:
        folder.add("a", {"tokens": 1}, [LOSS, LOSS._replace(name="other")])
    with (tmp_path / "run/measurements.jsonl").open("a") as file:
        file.write(torn)
    with RunFolder(tmp_path / "run", config=CONFIG, resume=True) as folder:
        assert folder.done("a", {"tokens": 1})
        assert folder.done("a", {"tokens": 1}, ["other", "kl_mean_nats"])
        assert not folder.done("a", {"tokens": 1}, ["other", "third"])
        assert not folder.done("a", {"tokens": 2})
        assert not folder.done("b", {"tokens": 1})
        folder.add("a", {"tokens": 1}, [LOSS._replace(value=9.0)])
        folder.add("b", {"tokens": 1}, [LOSS])
    there = [(row["variant"], row["name"], row["value"]) for row in rows_on_disk(tmp_path / "run")]
    assert there == [
        ("a", "kl_mean_nats", 0.25),
        ("a", "other", 0.25),
        ("b", "kl_mean_nats", 0.25),
    ]
    kept = json.loads((tmp_path / "run/environment.json").read_text())["earlier"]
    assert len(kept) == 1 and kept[0]["date"]


@pytest.mark.parametrize("cut", [1, 40, 90, 150])
def test_a_batch_that_a_kill_tore_is_measured_again(tmp_path, cut):
    batch = [LOSS, LOSS._replace(name="other"), LOSS._replace(name="third")]
    with RunFolder(tmp_path / "run") as folder:
        folder.add("a", {"tokens": 1}, batch)
        folder.add("b", {"tokens": 1}, batch)
    file = tmp_path / "run/measurements.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[: -1 - cut])
    with RunFolder(tmp_path / "run", resume=True) as folder:
        assert folder.done("a", {"tokens": 1}) and not folder.done("b", {"tokens": 1})
        folder.add("b", {"tokens": 1}, batch)
        assert folder.done("b", {"tokens": 1}, ["kl_mean_nats", "third"])
    assert file.read_bytes() == whole, "no row twice, none missing"


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.add("a", {}, [LOSS])
    file = tmp_path / "run/measurements.jsonl"
    file.write_text(file.read_text().rstrip("\n"))
    with RunFolder(tmp_path / "run", resume=True) as folder:
        folder.add("b", {}, [LOSS])
    assert [row["variant"] for row in rows_on_disk(tmp_path / "run")] == ["a", "b"]


def test_a_broken_line_in_the_middle_is_refused(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.add("a", {}, [LOSS])
    file = tmp_path / "run/measurements.jsonl"
    file.write_text("{broken\n" + file.read_text())
    with pytest.raises(BadInput, match=r"measurements.jsonl:1: is no measurement"):
        RunFolder(tmp_path / "run", resume=True)


def test_a_killed_run_leaves_whole_lines(tmp_path):
    code = f"""
from kvlab.track import RunFolder
from kvlab.core import Measurement
folder = RunFolder({str(tmp_path / "run")!r})
for count in range(10**6):
    folder.add("a", {{"count": count}}, [Measurement(name, 1.0, "") for name in "xyz"])
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    file = tmp_path / "run/measurements.jsonl"
    while not file.exists() or file.stat().st_size < 20_000:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    folder = RunFolder(tmp_path / "run", resume=True)
    rows = folder.rows()
    assert [row["params"]["count"] for row in rows[::3]] == list(range(len(rows[::3])))


class Batches(Tracker):
    """Keeps what it is told."""

    def __init__(self):
        self.batches = []

    def log(self, rows):
        self.batches.append(rows)


def test_a_failure_stands_until_what_it_is_about_was_measured(tmp_path):
    with RunFolder(tmp_path / "run", tracker=(told := Batches())) as folder:
        folder.add("a", {}, [LOSS])
        folder.add("b", {}, [LOSS._replace(name="one")], step=1)
        for text in ("first", "second"):
            with folder.surviving("b", {}, "kl_mean_nats"):
                raise ValueError(text)
        with folder.surviving("c", {}):
            raise ValueError("third")
        assert [r["reason"] for r in folder.failures()] == ["ValueError: second",
                                                            "ValueError: third"]
        assert not folder.done("b", {}) and not folder.done("c", {})
    assert [r["name"] for batch in told.batches for r in batch].count("failed") == 3
    with RunFolder(tmp_path / "run", resume=True, tracker=(told := Batches())) as folder:
        folder.add("b", {}, [LOSS._replace(name="other")])  # not what is missing
        assert len(folder.failures()) == 2
        folder.add("b", {}, [LOSS, LOSS])
        assert [r["variant"] for r in folder.failures()] == ["c"]
    there = [(r["variant"], r["name"]) for r in rows_on_disk(tmp_path / "run")]
    assert there == [("a", "kl_mean_nats"), ("b", "one"), ("c", "failed"), ("b", "other"),
                     ("b", "kl_mean_nats")]
    last = told.batches[-1]
    assert [(r["variant"], r["name"]) for r in last] == [("c", "failed")], "told as it stands"


def test_bad_input_before_the_first_number_is_the_users_to_mend(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(BadInput), folder.surviving("a", {}):
            raise BadInput("key", 1, "is wrong")
        folder.add("a", {}, [LOSS])
        with folder.surviving("b", {}):
            raise BadInput("key", 1, "is wrong")
        assert folder.failures()[0]["reason"] == "BadInput: key=1: is wrong"


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / "kvlab.log").write_text("")
    RunFolder(tmp_path).close()  # what Hydra puts there does not count
    with pytest.raises(BadInput, match=r"hydra.run.dir=.*resume=true"):
        RunFolder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"hydra.run.dir=.*is a file"):
        RunFolder(tmp_path / "file")


def test_a_measurement_needs_a_value(tmp_path):
    with RunFolder(tmp_path / "run") as folder, pytest.raises(TypeError):
        folder.add("a", {}, [Measurement("x", None, "")])
    assert rows_on_disk(tmp_path / "run") == []


def test_resume_keeps_the_config_it_began_with(tmp_path):
    RunFolder(tmp_path / "run", config=CONFIG).close()
    more = CONFIG.replace("[a]", "[a, b]") + "resume: true\n"
    RunFolder(tmp_path / "run", config=more, resume=True).close()
    with pytest.raises(BadInput, match="another seed"):
        RunFolder(tmp_path / "run", config=more.replace("seed: 1", "seed: 2"), resume=True)


def test_arrays_and_curves(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert np.load(folder.arrays("hits", counts=np.arange(3)))["counts"].tolist() == [0, 1, 2]
    position = np.array([1.0, 2.0])
    for variant, value in (("a", 1), ("b", 2), ("a", 3)):
        row = np.full(2, value, dtype=float)
        path = folder.curve("per_position", variant, position, nll_delta=row, low=row, high=row)
    held = np.load(path)
    assert held["variants"].tolist() == ["b", "a"]
    assert held["nll_delta"].tolist() == [[2, 2], [3, 3]]
    more = np.load(folder.curve("per_position", "c", position, nll_delta=row, kl=row))
    assert np.isnan(more["kl"][:2]).all() and more["kl"][2].tolist() == [3, 3]
    with pytest.raises(ValueError, match="positions"):
        folder.curve("per_position", "c", position + 1, nll_delta=row, low=row, high=row)
    with pytest.raises(ValueError, match="letters"):
        folder.arrays("../escape", x=row)


def test_environment_tells_origin_and_nothing_private(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    home, here = Path.home(), Path.cwd()
    argv = [str(ROOT / "kvlab/__main__.py"), f"model.path={home}/m", f"x=[{here}/d.txt]", "/a/b/c"]
    monkeypatch.setattr(sys, "argv", [*argv, "url=https://host/x/y", "format=int4"])
    facts = environment.collect("cpu")
    given = ["model.path=~/m", "x=[d.txt]", ".../c", "url=https://host/x/y", "format=int4"]
    assert shlex.split(facts["command"]) == ["python", "-m", "kvlab", *given]
    assert "'x=[d.txt]'" in facts["command"]  # a shell takes it again
    assert facts["device"]["kind"] == "cpu" and facts["device"]["name"]
    assert {"numpy", "kvlab"} <= facts["versions"].keys()
    assert socket.gethostname() not in json.dumps(facts)
    assert facts["date"].endswith("UTC")


def test_commit_and_dirt(monkeypatch):
    monkeypatch.setenv("KVLAB_COMMIT", "abc123-dirty")
    revision = environment.revision.__wrapped__  # it is asked once in a process
    assert revision() == {"commit": "abc123", "dirty": True}
    monkeypatch.delenv("KVLAB_COMMIT")
    answers = {"rev-parse": "f00d\n", "status": "?? notes.txt\n"}
    monkeypatch.setattr(environment, "git", lambda *line: answers[line[0]])
    if (ROOT / ".git").exists():
        assert revision() == {"commit": "f00d", "dirty": False}
        answers["status"] = "?? kvlab/new.py\n"
        assert revision()["dirty"]
        answers["status"] = " M README.md\n"
        assert revision()["dirty"]


def test_import_is_light():
    code = "import kvlab.track, sys; print([m for m in ('torch', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["none", "jsonl", "wandb"])
def test_every_yaml_names_its_class_and_all_of_its_parameters(name):
    settings = yaml.safe_load((ROOT / f"conf/track/{name}.yaml").read_text())
    made = getattr(track, settings.pop("_target_").rpartition(".")[2])
    defaults = {k: p.default for k, p in inspect.signature(made).parameters.items()}
    assert {**settings, **({"tags": ()} if "tags" in settings else {})} == defaults


def test_jsonl_tracker_writes_what_the_run_says(tmp_path):
    with RunFolder(tmp_path / "run", tracker=JsonlTracker(), group="sweep") as folder:
        folder.history(1, {"tokens_per_second": math.inf})
    lines = [json.loads(line) for line in (tmp_path / "run/track.jsonl").open()]
    assert [line["event"] for line in lines] == ["start", "history", "artifact", "finish"]
    assert lines[0]["group"] == "sweep" and lines[1]["tokens_per_second"] == "Infinity"
    Tracker().finish()


def test_a_tracker_hears_of_the_rows_that_a_resumed_run_kept(tmp_path):
    class Listener(Tracker):
        heard = ()

        def log(self, rows):
            self.heard = [*self.heard, [row["params"]["x"] for row in rows]]

    with RunFolder(tmp_path / "run") as folder:
        folder.add("a", {"x": 1}, [LOSS, LOSS._replace(name="other")])
        folder.add("a", {"x": 2}, [LOSS])
    with RunFolder(tmp_path / "run", resume=True, tracker=(listener := Listener())) as folder:
        folder.add("a", {"x": 3}, [LOSS])
    assert listener.heard == [[1, 1], [2], [3]]


# W&B -------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No key, no mode, no proxy; what this machine's user set does not count."""
    for name in [n for n in os.environ if n.startswith(("WANDB", "HTTPS_P", "https_p", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_mode_auto_without_a_key_is_offline_at_once_and_can_be_read_back(nobody, tmp_path, capfd):
    began = time.monotonic()
    tracker = WandbTracker(tags=["mine"], job_type="evaluation")
    run = {"config": CONFIG, "tracker": tracker, "group": "sweep", "tags": ["all"]}
    with RunFolder(tmp_path / "run", **run) as folder:
        for tokens in (100, 1000):
            folder.add("int8 lru 10%", {"tokens": tokens, "format": "int8"}, [LOSS])
        folder.add("int4", {"tokens": 100}, [LOSS._replace(value=math.inf, low=None)])
        folder.history(5, {"progress/tokens": 640})
        (tmp_path / "report").mkdir()
        (tmp_path / "report/README.md").write_text("text")
        folder.artifact(tmp_path / "report", "report")
    assert time.monotonic() - began < 20
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1 and "W&B: offline, no API key" in said.err
    found = wandb_file.load_finished(tmp_path / "run")
    assert found["meta"] == ("kvlab", "sweep", "evaluation", ["mine", "all"])
    assert found["config"]["seed"] == 1 and found["config"]["environment"]["device"]
    points = [h for h in found["history"] if "int8 lru 10%/kl_mean_nats" in h]
    assert [(h["measurement"], h["params/tokens"]) for h in points] == [(1, 100), (2, 1000)]
    assert points[0]["int8 lru 10%/kl_mean_nats_high"] == 0.3
    assert found["metrics"]["int4/*"] == "measurement"
    assert found["metrics"]["progress/tokens"] == "step"
    interval = {"value": 0.25, "low": 0.2, "high": 0.3}
    assert found["summary"]["int8 lru 10%/kl_mean_nats[tokens=1000]"] == interval
    assert "int8 lru 10%/kl_mean_nats" not in found["summary"]
    assert found["summary"]["int4/kl_mean_nats"]["value"] == "Infinity"
    assert "measurements.jsonl" in found["artifacts"]["results"]
    assert not any(name.startswith("wandb") for name in found["artifacts"]["results"])
    assert found["artifacts"]["report"] == ["README.md"]
    assert found["exit"] == 0


def test_two_runs_in_one_process_stay_apart(nobody, tmp_path):
    """As in a sweep: every job of it opens and ends its own W&B run."""
    for job in (0, 1):
        tracker = WandbTracker(mode="offline")
        with RunFolder(tmp_path / f"{job}", tracker=tracker, group="sweep") as folder:
            folder.add(f"variant{job}", {}, [LOSS])
    for job in (0, 1):
        summary = wandb_file.load_finished(tmp_path / f"{job}")["summary"]
        assert [key for key in summary if key.startswith("variant")] == [
            f"variant{job}/kl_mean_nats"
        ]


def test_mode_is_chosen_from_key_network_and_environment(nobody, monkeypatch, tmp_path):
    shut = f"http://127.0.0.1:{closed_port()}"
    assert probe.choose_mode("auto", shut, "key")[0] == "offline"
    assert "cannot be reached" in probe.choose_mode("auto", shut, "key")[1]
    with pytest.raises(BadInput, match=r"track.mode=online: no API key"):
        probe.choose_mode("online", shut, None)
    with pytest.raises(BadInput, match="known: auto"):
        probe.choose_mode("sometimes", shut, None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        alive = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert probe.choose_mode("auto", alive, "key") == ("online", "")
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
        assert probe.choose_mode("auto", alive, None) == ("online", "")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert probe.choose_mode("auto", shut, "key") == ("online", "")
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert probe.choose_mode("auto", shut, "key") == ("offline", "")
    assert probe.choose_mode("disabled", shut, "key") == ("disabled", "")


@pytest.mark.parametrize(
    "setting", [{"mode": "sometimes"}, {"probe_seconds": 0}, {"finish_seconds": -1.0}]
)
def test_settings_that_cannot_be_are_refused(setting):
    (key,) = setting
    with pytest.raises(BadInput, match=f"track.{key}="):
        WandbTracker(**setting)


def test_the_probe_gives_up_in_time(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", _never)
    assert "cannot be reached" in probe.unreachable("https://192.0.2.1", 0.01)


def _never(address, timeout):
    assert timeout == 0.01
    raise TimeoutError("timed out")


class BrokenRun:
    """A W&B run that works until its second log."""

    id, dir = "x", "there"

    def __init__(self):
        self.summary, self.config, self.logged, self.finished = {}, {}, 0, []

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, values):
        self.logged += 1
        if self.logged > 1:
            raise RuntimeError("connection lost\nwith details")

    def finish(self, exit_code):
        self.finished.append(exit_code)


def test_a_failure_inside_wandb_does_not_stop_the_run(tmp_path, capfd):
    tracker = WandbTracker(mode="offline")
    tracker._init = lambda mode, **about: BrokenRun()
    with RunFolder(tmp_path / "run", tracker=tracker) as folder:
        run = tracker._run
        for count in range(4):
            folder.add("a", {"count": count}, [LOSS])
    assert len(rows_on_disk(tmp_path / "run")) == 4
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "tracking stopped (connection lost)" in said
    assert run.finished == [0]


class OneServer:
    """A W&B that is online: runs by id, with what they were told, in all processes' stead."""

    def __init__(self):
        self.runs = {}

    def setup(self, settings):
        return SimpleNamespace(settings=SimpleNamespace(base_url="https://x", api_key="k"))

    Settings = Table = staticmethod(lambda **settings: settings)

    def init(self, *, id, mode, resume=None, **about):
        assert (mode, resume) == ("online", "allow")
        known = id in self.runs
        run = self.runs.setdefault(id, SimpleNamespace(
            id=id, history=[], summary={}, names=[], finish=lambda exit_code: None,
            config=SimpleNamespace(update=lambda *_, **__: None), dir="there",
            define_metric=lambda *_, **__: None))  # fmt: skip
        run.resumed, run.log = known, run.history.append
        run.names.append((about["name"], about["group"]))
        return run


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", server := OneServer())
    monkeypatch.setattr(online, "choose_mode", lambda *_: ("online", ""))
    for count in (1, 2, 3):
        tracker = WandbTracker(artifacts=False)
        more = {"resume": True, "group": "12-00-00", "job_type": "hit_rate"}
        with RunFolder(tmp_path / "12-00-00/7", tracker=tracker, **more) as folder:
            folder.add("a", {}, [LOSS._replace(name=f"loss{count}")])
    [run] = server.runs.values()
    assert run.names == [("hit_rate 12-00-00 7", "12-00-00")] * 3
    points = [h["measurement"] for h in run.history if "measurement" in h]
    assert len(points) == 3 and points == sorted(set(points)), "no row twice"
    assert run.summary["a/loss1"]["value"] == run.summary["a/loss3"]["value"] == LOSS.value
    tables = [h["measurements"]["data"] for h in run.history if "measurements" in h]
    assert [len(rows) for rows in tables] == [1, 2, 3], "the record's rows"


@pytest.mark.parametrize(("folder", "kind", "name"), [
    ("2026-11-30/14-10-05", "hit_rate", "hit_rate 2026-11-30 14-10-05"),
    ("14-10-05/7", None, "14-10-05 7"), ("a/mine", "parity", "parity mine"),
])  # fmt: skip
def test_runs_have_names(folder, kind, name):
    assert run_name(Path(folder), kind) == name


def test_an_upload_that_hangs_does_not_hold_the_user(tmp_path, capfd):
    tracker = WandbTracker(mode="offline", finish_seconds=0.1)
    run = BrokenRun()
    run.logged, run.finish = -100, lambda exit_code: time.sleep(3)
    tracker._init = lambda mode, **about: run
    began = time.monotonic()
    folder = RunFolder(tmp_path / "run", tracker=tracker)
    folder.close(failed=True)
    assert time.monotonic() - began < 2.5  # less than the upload takes
    assert "upload unfinished" in capfd.readouterr().err


def test_without_wandb_installed_the_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with RunFolder(tmp_path / "run", tracker=WandbTracker()) as folder:
        folder.add("a", {}, [LOSS])
    assert "tracking stopped" in capfd.readouterr().err
    assert len(rows_on_disk(tmp_path / "run")) == 1
