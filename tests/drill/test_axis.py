"""The drill: an axis that nobody has heard of. Two places say it: the table, and its yamls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

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


# Each shown for itself, whatever became of the others, in one process: kvlab is loaded once.
SCRIPT = """
import json, traceback
found = {}
for told, shown in SHOWS.items():
    try:
        exec(compile(shown, told, "exec"), {"FOLDER": FOLDER})
    except BaseException:
        found[told] = traceback.format_exc()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, str]:
    """What went wrong, by what was to be shown."""
    folder = tmp_path_factory.mktemp("axis")
    (folder / "spice.py").write_text(MODULE)
    (folder / "spice").mkdir()
    for name, text in YAMLS.items():
        (folder / "spice" / f"{name}.yaml").write_text(text)
    given = {"FOLDER": str(folder), "SHOWS": {told: dedent(text) for told, text in SHOWS.items()}}
    names = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    script = f"{TABLE}\n{names}\nsys.path.insert(0, FOLDER)\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=HERE.parents[1], check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("told", SHOWS)
def test_an_axis_is_added_in_two_places(told, faults):
    assert not faults.get(told), faults[told]
