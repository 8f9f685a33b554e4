"""Tasks of other processes: skipped, retried, told, pinned; whichever launcher gives them."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvlab.core import BadInput
from kvlab.launch import (
    ByJoblib,
    ByRay,
    BySubmitit,
    Launching,
    Task,
    done,
    failures_told,
    launch,
    outcomes,
    worst,
)
from kvlab.launch import base as launching
from kvlab.launch.base import divided, visible_gpus
from kvlab.launch.worker import Pins, perform
from kvlab.track.environment import command


def entry(words: list[str]) -> int:
    """Instead of a run's command line: `WHAT [resume=true] hydra.run.dir=...`."""
    what, folder = words[0], Path(words[-1].partition("=")[2])
    folder.mkdir(exist_ok=True)
    with (folder / "log.txt").open("a") as file:
        file.write(f"{what} {'resume=true' in words} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    tries = len(said(folder))
    print("kvlab: it is bad")
    if what == "killed" and tries == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "slow":
        time.sleep(0.3)
    if what == "raises":
        raise ZeroDivisionError("a defect")
    if what == "refused" or (what == "heals" and tries < 3):
        return 2 if what == "refused" else 1
    (folder / "measurements.jsonl").write_text("{}\n")
    return 0


def said(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


def tasks(sweep: Path, *words: str) -> list[Task]:
    return [
        Task(number, (word,), sweep / str(number), sweep, Path.cwd())
        for number, word in enumerate(words)
    ]


class Here(Launching):
    """In this process; `dies` are numbers whose worker dies before it begins, once."""

    def __init__(self, *dies: int, retries: int = 2):
        super().__init__(retries=retries)
        self.dies, self.given = set(dies), []

    def run(self, tasks, entry):
        self.given.append([task.number for task in tasks])
        for task in tasks:
            if task.number in self.dies:
                self.dies.remove(task.number)
                return  # and with it the whole pool
            yield task, perform(task, entry)


def run(over: Launching, given: list[Task], resume: bool = False) -> list[int]:
    given = [task._replace(resume=resume) for task in given]
    return [o.status for o in launch(over, given, entry, say=lambda text: None)]


def test_what_fails_is_given_again_and_what_is_refused_is_not(tmp_path):
    over = Here()
    assert run(over, tasks(tmp_path, "well", "heals", "refused", "raises")) == [0, 0, 2, 1]
    assert over.given == [[0, 1, 2, 3], [1, 3], [1, 3]]
    assert said(tmp_path / "1") == ["heals False None", "heals True None", "heals True None"]
    held = outcomes(tmp_path)
    assert [o.attempts for o in held.values()] == [1, 3, 1, 3] and worst(held) == 2
    lines = failures_told(held).splitlines()
    assert lines[0] == "2 of 4 runs failed:"
    assert lines[1] == "  2: it is bad" and lines[3] == "  3: it is bad (3 times)"
    assert lines[2] == f"     python -m kvlab refused resume=true hydra.run.dir={tmp_path}/2"


def test_a_pool_that_dies_costs_no_try_of_those_that_never_began(tmp_path):
    over = Here(0, 1, 2, retries=0)
    assert run(over, tasks(tmp_path, "well")) == [1]  # nobody began: it would go on for ever
    assert outcomes(tmp_path)[0].reason == "no worker began it"
    over = Here(1, 2, 3, retries=0)
    assert run(over, tasks(tmp_path / "b", "well", "well", "well", "well")) == [0, 0, 0, 0]
    assert over.given == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]


def test_resume_skips_what_is_there(tmp_path):
    given = tasks(tmp_path, "well", "refused", "well")
    run(Here(), given)
    assert [done(task) for task in given] == [True, False, True]
    with pytest.raises(BadInput, match="resume=true goes on"):
        run(Here(), given)
    over = Here()
    assert run(over, [*given, *tasks(tmp_path, *["well"] * 4)[3:]], resume=True) == [0, 2, 0, 0]
    assert over.given == [[1, 3]] and said(tmp_path / "3") == ["well True None"]
    (tmp_path / "0/measurements.jsonl").unlink()
    over = Here()
    run(over, given[:1], resume=True)
    assert over.given == [[0]], "a mark without its rows is no result"


def test_another_run_of_the_same_number_is_refused(tmp_path):
    run(Here(), tasks(tmp_path, "well"))
    with pytest.raises(BadInput, match="run 0 of .* began as `well`"):
        run(Here(), tasks(tmp_path, "slow"), resume=True)
    more = tasks(tmp_path, "well")[0]._replace(words=("well", "track=none", "resume=True"))
    assert run(Here(), [more], resume=True) == [0], "Hydra writes True"


def test_a_node_without_the_folder_says_so(tmp_path):
    [task] = tasks(tmp_path / "elsewhere", "well")
    outcome = perform(task, entry)
    assert outcome.status == 2 and "all nodes must see the same file system" in outcome.reason


def test_devices_of_a_host(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    assert visible_gpus() == ["3", "5", "7"]
    assert divided(tmp_path, None, None) == (3, Pins(tmp_path, ("3", "5", "7")))
    assert divided(tmp_path, 2, None) == (1, Pins(tmp_path, ("3,5",)))
    assert divided(tmp_path, 0, 2) == (2, Pins(tmp_path, ("", "")))
    with pytest.raises(BadInput, match="2 runs at a time with 2 each need 4; this host has 3"):
        divided(tmp_path, 2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert divided(tmp_path, None, 5) == (5, Pins(tmp_path))
    with pytest.raises(BadInput, match="this host has 0"):
        divided(tmp_path, 1, None)


def test_devices_are_counted_by_the_driver(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H200 (UUID: a)'\necho 'GPU 1: H200 (UUID: b)'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert visible_gpus() == ["0", "1"]


@pytest.mark.parametrize(("make", "words"), [
    (lambda: ByJoblib(retries=-1), "hydra.launcher.retries=-1"),
    (lambda: ByRay(cpus=-1), "hydra.launcher.cpus=-1"),
    (lambda: BySubmitit(minutes=0), "hydra.launcher.minutes=0"),
    (lambda: ByJoblib(n_jobs=0).refuse(), "hydra.launcher.n_jobs=0"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(make, words):
    pytest.importorskip("joblib")
    with pytest.raises(BadInput, match=words):
        make()


@pytest.mark.parametrize(("over", "extra"), [
    (ByJoblib(), "launch"), (BySubmitit(), "launch"), (ByRay(), "ray"),
])  # fmt: skip
def test_a_missing_extra_is_named(monkeypatch, over, extra):
    monkeypatch.setattr(launching, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=rf"needs {over.needs}: pip install 'kvlab\[{extra}\]'"):
        over.refuse()


@pytest.fixture
def found(monkeypatch):
    """Workers find this module."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, *sys.path]))


def test_joblib_loses_nothing_with_a_worker(tmp_path, found, monkeypatch):
    pytest.importorskip("joblib")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    given = tasks(tmp_path, "slow", "killed", "slow", "well", "well")
    assert run(ByJoblib(gpus=1), given) == [0] * 5
    devices = {said(task.folder)[-1].split()[-1] for task in given}
    assert devices <= {"4", "6"} and said(given[1].folder)[-1].startswith("killed True")


def test_submitit_loses_nothing_with_a_process(tmp_path, found):
    pytest.importorskip("submitit")
    given = tasks(tmp_path, "killed", "well")
    assert run(BySubmitit("local", n_jobs=2), given) == [0, 0]
    assert said(given[0].folder)[-1].startswith("killed True")


def test_slurm_is_told_what_a_run_needs(tmp_path, monkeypatch):
    """An array of jobs as it would be submitted; there is no SLURM where this runs."""
    submitit = pytest.importorskip("submitit")
    over = BySubmitit("slurm", n_jobs=4, gpus=2, minutes=90, parameters={"slurm_partition": "big"})
    with pytest.raises(BadInput, match="no srun on this host"):
        over.refuse()
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    over.refuse()
    held = over.executor(tmp_path)._executor.parameters
    assert (held["gpus_per_node"], held["time"]) == (2, 90)
    assert (held["array_parallelism"], held["partition"]) == (4, "big")
    over.parameters = {"slurm_partitoin": "big"}
    with pytest.raises(BadInput, match="hydra.launcher.parameters="):
        over.refuse()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`")
def test_ray_loses_nothing_with_a_worker_of_two_nodes(tmp_path, found):
    from ray.cluster_utils import Cluster

    nodes = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**nodes, "include_dashboard": False})
    try:
        cluster.add_node(**nodes)
        given = tasks(tmp_path, "slow", "killed", "well", "well")
        over = ByRay(cluster.address)
        over.refuse()
        assert run(over, given) == [0] * 4
        assert said(given[1].folder)[-1].startswith("killed True")
        with pytest.raises(BadInput, match="hydra.launcher.gpus=3: no node"):
            ByRay(cluster.address, gpus=3).refuse()
    finally:
        cluster.shutdown()


def test_nobody_answers_at_an_address():
    if find_spec("ray") is None:
        pytest.skip("needs the extra `ray`")
    with pytest.raises(BadInput, match="nobody answers there"):
        ByRay("127.0.0.1:9").refuse()


def test_a_worker_notes_the_command_that_repeats_the_run(tmp_path):
    """Its own program is a launcher's: submitit's `_submit.py`, a worker of Ray."""
    noted, before = [], list(sys.argv)
    [task] = tasks(tmp_path, "job=cost")
    task.mark.parent.mkdir(parents=True)
    perform(task, lambda words: noted.append(command(sys.argv)) or 0)
    assert noted[0].startswith("python -m kvlab job=cost hydra.run.dir=") and sys.argv == before
