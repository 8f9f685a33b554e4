"""The committed decision table is the one that the code makes, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "reports" / "README.md"


@pytest.mark.slow
def test_the_committed_table_is_what_the_code_makes(tmp_path):
    # a process of its own: here, where tests poison new memory, an outline would take some
    made = tmp_path / "README.md"
    script = ROOT / "experiments" / "advice" / "page.py"
    subprocess.run([sys.executable, script, "--out", made], check=True, cwd=ROOT, timeout=300)
    assert PAGE.read_text(encoding="utf-8") == made.read_text(encoding="utf-8")


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8")):
        assert (ROOT / "reports" / link).is_file(), link


def test_what_nobody_measured_is_no_number():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    windows = [line for line in lines if "window=sink" in line]
    assert windows and all(line.count("not measured") == 2 for line in windows)
