"""Every figure of the front page has a command, and all that it runs can be composed."""

from __future__ import annotations

import importlib.util
import re
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


def test_the_command_measures_what_the_figure_shows():
    """The eviction of real models was drawn, and its command measured the stand-in."""
    stand_ins = {"window_quality": "real_windows", "axes_quality": "real_axes"}
    for picture in pictures(Book(ROOT / "reports")):
        cited = re.search(r"\(([a-z_0-9, ]+?)(?:, (?:H200|CPU))?\)\.", picture.caption)[1]
        behind = [stand_ins.get(name, name) for name in cited.split(", ")]
        assert behind == rebuild.FIGURES[picture.stem], picture.caption


def test_runs_of_two_studies_do_not_share_a_folder(tmp_path):
    folders = [word for figure in rebuild.FIGURES
               for command in rebuild.commands(figure, tmp_path, ROOT / "reports", tmp_path)
               for word in command if word.startswith("hydra.run.dir=")]  # fmt: skip
    assert len(set(folders)) == len(folders)
    qwen = rebuild.commands("eviction", tmp_path, ROOT / "reports", tmp_path)[1]
    assert qwen[2:6] == ["experiment=real_axes", "model=gguf",
                         f"model.path={tmp_path.resolve()}/qwen2.5-coder-0.5b-instruct.gguf",
                         "eval=books_32k"]  # fmt: skip


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
