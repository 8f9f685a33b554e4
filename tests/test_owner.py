"""One owner of a folder at a time, and what it may take away again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.core import BadInput
from kvlab.track import Place, RunFolder, owner
from kvlab.track.owner import LOCK, Busy, own

ROOT = Path(__file__).resolve().parents[1]


def test_a_second_owner_is_refused_until_the_first_lets_go(tmp_path):
    with own(tmp_path / "a/b") as first:
        assert first.made == (tmp_path / "a/b", tmp_path / "a")
        with pytest.raises(Busy, match=r"hydra.run.dir=.*another run is at work in it"):
            own(tmp_path / "a/b")
        own(tmp_path / "a/c").release()  # a neighbour
    with own(tmp_path / "a/b") as second:
        assert second.made == ()
    assert not (tmp_path / "a/b" / LOCK).exists()


def test_ownership_ends_with_its_process(tmp_path):
    code = f"""
import os, pathlib, signal
from kvlab.track.owner import own
kept = own(pathlib.Path({str(tmp_path / "run")!r}))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -9
    assert (tmp_path / "run" / LOCK).exists()
    own(tmp_path / "run").release()


def test_what_is_cleared_is_what_a_run_makes_and_was_not_there(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    kept = own(tmp_path)
    for name in ("measurements.jsonl", "kvlab.log", "notes.txt"):
        (tmp_path / name).write_text("")
    for name in ("wandb", ".hydra", "other", "said"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    kept.clear(["said"])
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "notes.txt", "other"}


def test_a_run_inside_a_refused_one_stays(tmp_path):
    outer = own(tmp_path / "out/run")
    with RunFolder(tmp_path / "out/run/inner"):
        outer.clear()
        assert (tmp_path / "out/run/inner/config.yaml").exists()
    assert not (tmp_path / "out/run" / LOCK).exists()


def test_folders_go_with_the_last_that_is_in_them(tmp_path):
    first, second = own(tmp_path / "day/1"), own(tmp_path / "day/2")
    first.clear()
    assert (tmp_path / "day/2").is_dir() and not (tmp_path / "day/1").exists()
    second.clear()
    assert (tmp_path / "day").is_dir()  # the first one's, and not empty when it went
    own(tmp_path / "other/1").clear()
    assert not (tmp_path / "other").exists()


def test_a_lock_whose_file_was_removed_locks_nothing(tmp_path, monkeypatch):
    """Between our opening the file and our locking it, its owner may let go and another come."""
    fcntl = pytest.importorskip("fcntl")
    sound, first = fcntl.flock, []

    def late(file, how):
        if not first:
            first.append(True)
            (tmp_path / LOCK).unlink()
        return sound(file, how)

    monkeypatch.setattr(owner.fcntl, "flock", late)
    with own(tmp_path), pytest.raises(Busy):
        own(tmp_path)


@pytest.mark.parametrize("missing", ["module", "file system"])
def test_without_locks_of_the_system_the_making_of_a_file_decides(tmp_path, monkeypatch, missing):
    def unsupported(*_):
        raise OSError(95, "not supported")

    if missing == "module":
        monkeypatch.setattr(owner, "fcntl", None)
    else:
        monkeypatch.setattr(owner.fcntl, "flock", unsupported)
    with own(tmp_path), pytest.raises(Busy, match="if it was killed, remove"):
        own(tmp_path)
    own(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_only_a_folder_named_by_the_clock_gets_another_name(tmp_path):
    named = Place.at(tmp_path / "12-00-00", "outputs/${now:%H-%M-%S}")
    with named.own() as first, named.own() as second:
        assert [first.path.name, second.path.name] == ["12-00-00", "12-00-00-2"]
    (tmp_path / "12-00-00/config.yaml").write_text("")
    with named.own() as third:  # the first is another run's; an empty folder is nobody's
        assert third.path.name == "12-00-00-2"
        third.clear()
        assert not third.path.exists()
    with named.own(resume=True) as again:
        assert again.path.name == "12-00-00"
    given = Place.at(tmp_path / "12-00-00", "outputs/mine")
    with given.own(), pytest.raises(Busy):
        given.own()


def test_two_folders_of_rows_do_not_meet(tmp_path):
    with RunFolder(tmp_path / "run"), pytest.raises(BadInput, match="another run"):
        RunFolder(tmp_path / "run", resume=True)
    RunFolder(tmp_path / "run", resume=True).close()
