"""Scripts that make tables say in one sentence what is wrong with what they were given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.core import BadInput
from kvlab.track import read_objects

ROOT = Path(__file__).resolve().parents[2]


def said(script: str, *words: str) -> str:
    """The last line of a script that ends by refusing."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments" / script), *map(str, words)], text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_a_torn_last_line_is_left_out_and_any_other_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert read_objects(file) == [{"a": 1}, {"a": 2}]
    file.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert read_objects(file) == [{"a": 1}, {"a": 2}]
    for damage in (b'{"a": 1}\n{"a": {"a": 3}\n{"a": 4}\n', b'{"a": 1}\n[2]\n', b'1\n\xff\n'):
        file.write_bytes(damage)
        with pytest.raises(BadInput, match=r"rows\.jsonl:[12]"):
            read_objects(file)


@pytest.mark.slow
def test_tables_refuse_damage_in_one_sentence(tmp_path):
    torn = tmp_path / "runs" / "one" / "items.jsonl"
    torn.parent.mkdir(parents=True)
    torn.write_text('{"kind": "evict"\n{}\n')
    for script in ("field_tasks/table.py", "press/table.py"):
        assert ":1" in said(script, torn if "press" in script else tmp_path)
    torn.write_text('{"kind": "losses"}\n')
    assert "'model'" in said("press/table.py", torn)
    torn.write_text("")
    assert "no rows" in said("press/table.py", torn)
    assert "unpack" in said("field_tasks/table.py", tmp_path)
    assert "usage" in said("field_tasks/table.py")
    assert "has none of" in said("real_studies/report.py", tmp_path)
    (tmp_path / "smollm2-135m.tar.xz").write_bytes(b"no tar")
    assert "damaged" in said("real_studies/report.py", tmp_path)
    assert "invalid choice" in said("real_studies/report.py", tmp_path, "--only", "nothing")
    assert "no such file" in said("real_studies/run.py", "--models", tmp_path, "--out", tmp_path)
    assert "No such file" in said("advice/live.py", "table", tmp_path / "nothing")
