"""A run survives its variants, an interrupt and a kill; two runs do not meet in one folder.

Long counts (pairs of runs in the same instant, kills at random moments) are marked slow.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import signal
import time
from pathlib import Path

import pytest

from kvlab.__main__ import main
from kvlab.eval.cost import TextCost
from kvlab.eval.runner import Runner
from kvlab.report import build

CONF = str(Path(__file__).parent / "conf")
FIVE = ["--config-dir", CONF, "experiment=tiny"]
TINY = [*FIVE, "variants=['format=int4','format=int8']"]
TOY = ["--config-dir", CONF, "experiment=toy_specs", "variants=[]"]  # composed once: at once
LONG = [pytest.mark.slow, pytest.mark.timeout(3600)]
TIMED = ("prefill_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
VARIANTS = ["int8", "int4", "random 50%", "fp8", "k4v2"]
ONE_OF_EACH = {"perplexity", "kl_mean_nats", "cache_peak_bytes", "prefill_seconds"}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[str]:
    """Every row as text, in an order that no resume changes; of what is timed, that it is there."""
    cleared = [{**r, "value": 0} if r["name"] in TIMED else r for r in rows(folder)]
    return sorted(json.dumps(row, sort_keys=True) for row in cleared)


def named(folder: Path, variant: str) -> set[str]:
    return {row["name"] for row in rows(folder) if row["variant"] == variant}


@pytest.fixture(scope="module", autouse=True)
def without_figures():
    """Reports of tables alone: drawing takes longer than the runs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "drawings", lambda everything, runs: [])
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lives") / "run"
    assert main([*TINY, f"hydra.run.dir={folder}"]) == 0
    return folder


def breaking(monkeypatch, method: str, document: int, error: BaseException, name: str = "int4"):
    """Let `method` of the runner `name` raise `error` on one document."""
    sound = getattr(Runner, method)

    def faulty(self, *args):
        if self.name == name and len(self.stats) == document:
            raise error
        return sound(self, *args)

    monkeypatch.setattr(Runner, method, faulty)


def test_one_of_five_raises_in_its_second_document(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    line = [*FIVE, f"hydra.run.dir={folder}"]
    with monkeypatch.context() as patch:
        breaking(patch, "forward", 1, RuntimeError("singular\nmatrix [1]"))
        assert main(line) == 1
    [failed] = [r for r in rows(folder) if r["name"] == "failed"]
    assert failed["variant"] == "int4" and failed["value"] == 1
    assert failed["reason"].startswith("RuntimeError: singular matrix [1] (document 2 of 3, ")
    shown = " ".join(capsys.readouterr().out.split())
    assert "failed: int4: RuntimeError: singular matrix [1]" in shown and "status" in shown
    page = (folder / "report/README.md").read_text()
    assert "## Failed" in page and "document 2 of 3" in page
    assert all(named(folder, v) >= ONE_OF_EACH for v in VARIANTS if v != "int4")
    assert not named(folder, "int4") & ONE_OF_EACH
    assert [r["step"] for r in rows(folder)
            if (r["variant"], r["name"]) == ("int4", "document_perplexity")] == [1]
    before = [json.dumps(r) for r in rows(folder) if r["name"] != "failed"]
    assert main([*line, "resume=true"]) == 0
    after = [json.dumps(r) for r in rows(folder)]
    assert after[: len(before)] == before and "failed" not in named(folder, "int4")
    assert all(named(folder, v) == named(folder, "int8") >= ONE_OF_EACH for v in VARIANTS)
    assert {json.loads(r)["variant"] for r in after[len(before):]} == {"int4"}
    assert "Failed" not in (folder / "report/README.md").read_text()


@pytest.mark.parametrize("method", ["start", "finish"])
def test_wherever_it_raises_the_resumed_run_equals_an_unbroken_one(
    tmp_path, monkeypatch, method, unbroken
):
    line = [*TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        breaking(patch, method, 1, MemoryError())
        assert main(line) == 1
    assert named(tmp_path / "run", "int8") == named(unbroken, "int8")
    assert main([*line, "resume=true"]) == 0
    assert results(tmp_path / "run") == results(unbroken)


def test_what_fails_in_costing_keeps_its_quality(tmp_path, monkeypatch, unbroken):
    line = [*TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        sound = TextCost.measure

        def faulty(self, runner, item):
            if runner.name == "int8":
                raise ValueError("no clock")
            return sound(self, runner, item)

        patch.setattr(TextCost, "measure", faulty)
        assert main(line) == 1
    assert named(tmp_path / "run", "int8") >= {"perplexity", "failed"}
    assert "prefill_seconds" in named(tmp_path / "run", "int4")
    assert main([*line, "resume=true"]) == 0
    assert results(tmp_path / "run") == results(unbroken)


def test_a_failure_that_repeats_is_one_row(tmp_path, monkeypatch):
    line = [*TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    breaking(monkeypatch, "forward", 0, RuntimeError("first"))
    assert main(line) == 1
    breaking(monkeypatch, "forward", 0, RuntimeError("second"))
    assert main([*line, "resume=true"]) == 1
    failed = [r["reason"] for r in rows(tmp_path / "run") if r["name"] == "failed"]
    assert len(failed) == 1 and failed[0].startswith("RuntimeError: second")


def test_a_control_that_failed_is_paired_when_it_is_there(tmp_path, monkeypatch):
    line = [*FIVE, "variants=['policy=lru cache.budget_percent=50']"]
    assert main([*line, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        breaking(patch, "forward", 2, RuntimeError("lost"), "random 50% (control)")
        assert main([*line, f"hydra.run.dir={tmp_path / 'run'}"]) == 1
    assert "kl_minus_random_nats" not in named(tmp_path / "run", "lru 50%")
    assert main([*line, f"hydra.run.dir={tmp_path / 'run'}", "resume=true"]) == 0
    assert results(tmp_path / "run") == results(tmp_path / "whole")


def test_a_full_cache_that_fails_ends_the_run_with_a_sentence(tmp_path, monkeypatch, capsys):
    line = [*TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        breaking(patch, "forward", 2, RuntimeError("no memory"), "full")
        assert main(line) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("kvlab: full, the full cache that all variants are compared with, failed"
                           ": RuntimeError: no memory (document 3 of 3")
    kept = [r for r in rows(tmp_path / "run") if r["name"] == "document_perplexity"]
    assert len(kept) == 2 * len({r["variant"] for r in kept}) == 2 * 4


def test_an_interrupt_in_the_third_document_keeps_two(tmp_path, monkeypatch, unbroken, capsys):
    line = [*TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        breaking(patch, "forward", 2, KeyboardInterrupt())
        assert main(line) == 130
    said = capsys.readouterr().err.splitlines()[-1].strip()
    _python, _m, _kvlab, *going_on = shlex.split(said)
    assert going_on == [*TINY, "resume=true", f"hydra.run.dir={tmp_path / 'run'}"]
    assert {r["step"] for r in rows(tmp_path / "run")} == {1, 2}
    starts = []
    sound = Runner.start
    monkeypatch.setattr(Runner, "start", lambda self: starts.append(self.name) or
                        sound(self))  # fmt: skip
    assert main(going_on) == 0
    assert starts.count("noise floor") == 1, "only the third document is computed again"
    assert results(tmp_path / "run") == results(unbroken)


def test_documents_stay_out_of_tables_that_aggregate(unbroken):
    page = (unbroken / "report/README.md").read_text()
    assert "document perplexity" not in page and "document_perplexity" not in page
    assert "document_perplexity" in (unbroken / "report/results.jsonl").read_text()


def test_scores_of_other_tokens_do_not_count(tmp_path, unbroken):
    import numpy as np

    from kvlab.eval.scores import Scores

    class Folder:
        path = unbroken

    [about] = [r["params"] for r in rows(unbroken) if r["name"] == "perplexity"
               and r["variant"] == "int8"]  # fmt: skip
    runner = Runner("int8", about, None)
    ids = np.random.default_rng(7).integers(1, 128, 96)
    assert Scores(Folder).take(runner, 0, ids) and len(runner.column("kl")[0]) == 95
    assert not Scores(Folder).take(runner, 0, ids + 1)


# -- several runs at once

PROCESSES = multiprocessing.get_context("fork")


def child(argv: list[str], folder: Path, gate=None):
    """A process that runs a command line in `folder`; its exit status is main's."""
    def life():
        os.chdir(folder)
        if gate is not None:
            gate.wait()
        os._exit(main(argv))

    process = PROCESSES.Process(target=life)
    process.start()
    return process


def together(folder: Path, *lines: list[str]) -> list[int]:
    """Exit statuses of command lines that start in the same instant."""
    gate = PROCESSES.Barrier(len(lines))
    processes = [child(line, folder, gate) for line in lines]
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def whole(folder: Path) -> bool:
    return [r["variant"] for r in rows(folder)] == ["bf16"]


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=LONG)])
def test_pairs_started_in_the_same_instant(tmp_path, count):
    for number in range(count):
        place = tmp_path / str(number)
        place.mkdir()
        assert together(place, TOY, TOY) == [0, 0]
        found = [p.parent for p in place.glob("outputs/*/*/measurements.jsonl")]
        assert len(found) == 2 and all(map(whole, found))


@pytest.mark.parametrize("count", [2, pytest.param(50, marks=LONG)])
def test_a_refused_run_leaves_the_one_beside_it_alone(tmp_path, count):
    for number in range(count):
        place = tmp_path / str(number)
        place.mkdir()
        assert together(place, TOY, [*TOY, "job.fail=early"]) == [0, 2]
        [found] = [p.parent for p in place.glob("outputs/*/*/measurements.jsonl")]
        assert whole(found)
        assert list(place.glob("outputs/*/*")) == [found]


def test_sweeps_started_in_the_same_instant(tmp_path):
    line = ["-m", *TOY, "cache.size=1,2"]
    assert together(tmp_path, line, line) == [0, 0]
    assert len(list(tmp_path.glob("multirun/*/*/*/measurements.jsonl"))) == 4
    assert len(list(tmp_path.glob("multirun/*/*/multirun.yaml"))) == 2


def test_two_resumes_of_one_folder_write_each_row_once(tmp_path, unbroken, capfd):
    line = [*TINY, "hydra.run.dir=run", "resume=true"]
    assert sorted(together(tmp_path, line, line)) == [0, 2]
    assert results(tmp_path / "run") == results(unbroken)
    assert "another run is at work in it" in capfd.readouterr().err


def killed(folder: Path, seconds: float) -> bool:
    """Start the tiny run, kill it after `seconds`; whether it was still running."""
    process = child([*TINY, "hydra.run.dir=run", "resume=true"], folder)
    process.join(seconds)
    running = process.is_alive()
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return running


@pytest.mark.parametrize("count", [2, pytest.param(20, marks=LONG)])
def test_a_kill_at_a_random_moment_and_a_resume(tmp_path, unbroken, count):
    (tmp_path / "0").mkdir()
    started = time.perf_counter()
    assert not killed(tmp_path / "0", 300)
    length, draw, caught = time.perf_counter() - started, random.Random(3), 0
    for number in range(1, count + 1):
        place = tmp_path / str(number)
        place.mkdir()
        caught += killed(place, draw.uniform(0.05, 1.0) * length)
        before = {json.dumps(r) for r in rows(place / "run")} if (
            place / "run/measurements.jsonl").exists() else set()  # fmt: skip
        assert child([*TINY, "hydra.run.dir=run", "resume=true"], place).join(300) is None
        after = [json.dumps(r) for r in rows(place / "run")]
        assert before <= set(after), "no result is lost"
        assert results(place / "run") == results(unbroken), "no row twice, none missing"
    assert caught
