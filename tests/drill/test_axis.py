"""The drill: an axis that nobody has heard of. Two places say it: the table, and its yamls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
MODULE = '''
class Bland:
    """The member that changes nothing."""
    name = "none"

class Hot(Bland):
    name = "hot"
    def __init__(self, scoville: int = 3):
        self.scoville = scoville
'''
YAMLS = {"none": "_target_: spice.Bland\n", "hot": "_target_: spice.Hot\nscoville: 3\n"}
# The table with the axis in it, before anything else of kvlab is loaded: as if it stood there.
TABLE = '''
import sys
from kvlab import axes
axes.TABLE["spice"] = axes.Axis("spice", "none", {
    "none": axes.Member("spice.Bland", "nothing"), "hot": axes.Member("spice.Hot", "it burns"),
})
axes.AXES += ("spice",)
'''
SHOWS = {
    "the cache takes it by name": """
        from kvlab import cache
        assert cache.CacheSpec().spice.name == "none"
        assert cache.CacheSpec(spice="hot").spice.scoville == 3
        try:
            cache.CacheSpec(spice="mild")
        except Exception as error:
            assert "spice=mild: known: hot, none" in str(error)
        """,
    "the command line takes it, names variants by it and refuses what it does not have": """
        import hydra
        from kvlab.config import add_config_dir, conf_dir, make_plan
        from kvlab.core import BadInput
        run = add_config_dir(["experiment=none", "track=none"], FOLDER)
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            variants = "variants=['spice=hot spice.scoville=9', 'spice=none format=int8']"
            first, second = make_plan([*run, variants]).variants
            assert first.spec.spice.scoville == 9 and second.spec.spice.name == "none"
            assert first.params == {"spice": "hot", "spice.scoville": 9}
            assert (first.name, second.name) == ("hot spice.scoville=9", "no spice int8")
            for wrong, told in {"spice=ht": "did you mean hot?",
                                "spice.scovile=3": "no such key",
                                "spice=hot spice.scoville=x": "must be a whole number"}.items():
                try:
                    make_plan([*run, *wrong.split()])
                except BadInput as error:
                    assert told in str(error), error
                else:
                    raise AssertionError(wrong)
        """,
    "controls, the search, the full cache and the table of what composes know of it": """
        from kvlab.cache import CacheSpec
        from kvlab.core import Variant
        from kvlab.eval import compat, pareto
        from kvlab.eval.controls import controls
        from kvlab.eval.setting import is_same
        full = CacheSpec()
        assert not is_same(CacheSpec(spice="hot"), full) and is_same(CacheSpec(), full)
        given = {"policy": "lru", "budget_blocks": 4}
        both = [Variant(n, {}, CacheSpec(spice=n, **given)) for n in ("none", "hot")]
        assert {c.spec.spice.name for c in controls(both, 64)} == {"none", "hot"}
        assert "spice" in pareto.SPACE
        name, settings, spec = pareto.composition({"format": "int4", "spice": "hot"})
        assert (name, spec.spice.name) == ("int4 hot", "hot") and settings["spice"] == "hot"
        assert compat.row("spice", "hot")[0].startswith("spice=hot")
        assert "spice" in compat.live()
        """,
}  # fmt: skip


@pytest.mark.parametrize("told", SHOWS)
def test_an_axis_is_added_in_two_places(told, tmp_path):
    (tmp_path / "spice.py").write_text(MODULE)
    (tmp_path / "spice").mkdir()
    for name, text in YAMLS.items():
        (tmp_path / "spice" / f"{name}.yaml").write_text(text)
    shown = "\n".join(line.removeprefix(" " * 8) for line in SHOWS[told].splitlines())
    script = f"{TABLE}\nsys.path.insert(0, {str(tmp_path)!r})\nFOLDER = {str(tmp_path)!r}\n{shown}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=HERE.parents[1], check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
