"""The committed front page is the one that the command writes, and each number has its row."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvlab.advice.decision import part_rows
from kvlab.core import BadInput
from kvlab.report import Book

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "reports"
AGAIN = "is not what `python -m kvlab pages reports` writes: run it and commit"


def without_pictures(page: str) -> str:
    """How a figure is drawn to the byte is matplotlib's; what it shows is in drawn.json."""
    return re.sub(r"<svg.*?</svg>", "", page, flags=re.S)


def test_the_committed_pages_are_what_the_command_writes(tmp_path):
    # a process of its own: here, where tests poison new memory, an outline would take some
    kept = shutil.ignore_patterns("*.svg", "*.png", "*.npz", "index.html")
    shutil.copytree(REPORTS, tmp_path / "reports", ignore=kept)
    shutil.copy(ROOT / "README.md", tmp_path)
    line = [sys.executable, "-m", "kvlab", "pages", str(tmp_path / "reports")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for name in ("README.md", "reports/README.md", "reports/figures/drawn.json"):
        made = (tmp_path / name).read_text(encoding="utf-8")
        assert (ROOT / name).read_text(encoding="utf-8") == made, f"{name} {AGAIN}"
    made, committed = ((folder / "reports/index.html").read_text(encoding="utf-8")
                       for folder in (tmp_path, ROOT))  # fmt: skip
    assert without_pictures(committed) == without_pictures(made), f"index.html {AGAIN}"
    assert len(committed) < 3_000_000
    drawn = json.loads((REPORTS / "figures/drawn.json").read_text())
    assert committed.count("<figure>") == len(drawn) == 6


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", REPORTS / "README.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#]+\.(?:md|svg))\)", text):
            assert (page.parent / link).is_file(), f"{page}: {link}"


def test_every_number_of_the_table_has_its_row():
    """Cited rows say what the table says; what nobody measured is no number."""
    text = (REPORTS / "README.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| (\d+) \|.*\| (\S+:\d+) \|$", text, re.M)
    rows = {number: place.replace("\\", "") for number, place in told}
    cited = set(re.findall(r"\\\[(\d+)\\\]\]\(#rows-behind-the-table\)", text))
    assert cited == rows.keys() and len(cited) > 10
    for place in rows.values():
        file, _, line = place.partition(":")
        row = json.loads((REPORTS / file).read_text().splitlines()[int(line) - 1])
        assert {"commit", "device", "run"} <= row["params"].keys()
    lines = [x for x in text.splitlines() if x.startswith(("| exact", "| facts", "| chat"))]
    for line in lines:
        loss = line.split(" | ")[4]
        assert ("perplexity" in loss) == ("reports" not in loss and "KL" in loss)
        assert "perplexity" not in loss or loss.count("](#") == 2
    windows = [line for line in text.splitlines() if "window=sink" in line]
    measured = part_rows(Book(REPORTS), "window") is not None
    assert windows and all(("not measured on a real model" in line) != measured
                           for line in windows)


def test_a_number_without_a_committed_row_is_refused():
    with pytest.raises(BadInput, match="no row says"):
        Book(REPORTS).behind("kl_mean_nats", "int8", 0.5)


def test_a_folder_without_reports_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no report"):
        Book(tmp_path)
