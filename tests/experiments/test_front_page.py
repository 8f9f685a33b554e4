"""Every figure of the front page has a command, and all that it runs can be composed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import hydra
import pytest

from kvlab.config import conf_dir, make_plan
from kvlab.report import Book, pictures

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "experiments" / "front_page" / "rebuild.py"
spec = importlib.util.spec_from_file_location("rebuild", SCRIPT)
rebuild = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rebuild)


def test_each_figure_of_the_page_names_its_command():
    shown = [picture.stem for picture in pictures(Book(ROOT / "reports"))]
    assert sorted(shown) == sorted(rebuild.FIGURES)
    page = (ROOT / "reports" / "README.md").read_text(encoding="utf-8")
    assert all(f"`python experiments/front_page/rebuild.py {stem}`" in page for stem in shown)


@pytest.mark.parametrize(("figure", "tiny"), [*((f, False) for f in rebuild.FIGURES),
                                              ("speed", True), ("memory", True)])
def test_what_it_runs_can_be_composed(figure, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    commands = rebuild.commands(figure, tmp_path / "runs", ROOT / "reports", tmp_path, tiny)
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for words in (c[2:] for c in commands if c[:2] == ["-m", "kvlab"] and "pages" not in c):
            one = [w for w in words if not w.startswith("variants=")]
            takes = "experiment=hit_rate" not in words  # one cache: tests of conf/ make them all
            assert make_plan([*one, *['variants=["format=bf16"]'] * takes]).job
    for command in commands:
        files = [w for w in command if w.endswith((".py", "README.md"))]
        assert all((ROOT / file).is_file() for file in files)
    assert tiny or commands[-1][:3] == ["-m", "kvlab", "pages"]
