"""Members of four kinds from a folder of the user's own, from `kvlab` and `python -m kvlab`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from kvlab import axes
from kvlab.__main__ import main

HERE = Path(__file__).parent
CONF = str(HERE.parent / "conf")


@pytest.mark.parametrize("entry", ["kvlab", "python -m kvlab"])
def test_all_four_kinds_are_found_beside_the_command(tmp_path, monkeypatch, entry):
    shutil.copy(HERE / "outside_members.py", tmp_path / "members_of_mine.py")
    folder = tmp_path / "conf" / "format"
    folder.mkdir(parents=True)
    (folder / "signed_values.yaml").write_text("_target_: members_of_mine.SignedValues\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(axes, "_NAMED", {})
    others = [path for path in sys.path if path not in ("", str(tmp_path))]
    # what Python puts first: the folder of the script, or the one that it is started in
    monkeypatch.setattr(sys, "path", [*([""] if "-m" in entry else []), *others])
    try:
        status = main([
            "--config-dir", str(tmp_path / "conf"), f"hydra.searchpath=[file://{CONF}]",
            "experiment=none", "model=tiny", "job=bench", "tasks=[members_of_mine.Next]",
            "data._target_=members_of_mine.Counting", "hydra.run.dir=run", "track=jsonl",
            "cache.block_size=8", "prefill.chunk_tokens=32", "eval.controls=false",
            "variants=['format=signed_values',"
            "'policy._target_=members_of_mine.Oldest cache.budget_percent=50']"])  # fmt: skip
    finally:
        sys.modules.pop("members_of_mine", None)
    assert status == 0
    rows = [json.loads(line) for line in Path("run/measurements.jsonl").read_text().splitlines()]
    found = {row["variant"] for row in rows if row["name"] == "next_percent"}
    assert found == {"full", "signed_values", "oldest 50%"}
