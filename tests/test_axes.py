"""The table of axes: every member has a yaml, every yaml a member; torch is not needed."""

from __future__ import annotations

import subprocess
import sys

import hydra
import pytest
import yaml

from kvlab import axes
from kvlab.config import conf_dir
from kvlab.config.compose import compose
from kvlab.core import BadInput

MEMBERS = [(axis, name) for axis in axes.AXES for name in axes.names(axis)]


@pytest.mark.parametrize("axis", axes.AXES)
def test_members_and_yamls_are_the_same(axis):
    assert {file.stem for file in (conf_dir() / axis).glob("*.yaml")} == set(axes.names(axis))


@pytest.mark.parametrize(("axis", "name"), MEMBERS)
def test_yaml_and_table_name_the_same_class(axis, name):
    member = axes.TABLE[axis].members[name]
    target = yaml.safe_load((conf_dir() / axis / f"{name}.yaml").read_text())["_target_"]
    found = axes.load(axis, member.path)
    if isinstance(found, type):
        assert axes.load(axis, target) is found and found.name == name
    else:  # a format is a pair of codecs: its yaml writes them out
        assert isinstance(found(**member.given), axes.load(axis, target))
        assert found(**member.given).name == name
    assert member.told


def test_the_null_member_is_the_default():
    with hydra.initialize_config_dir(str(conf_dir()), job_name="kvlab", version_base="1.3"):
        config = compose(["experiment=none"])
    for axis in axes.AXES:
        assert config.hydra.runtime.choices[axis] == axes.TABLE[axis].null
        assert config.cache[axis] == config[axis]
        assert axes.is_null(axis, axes.by_name(axis, axes.TABLE[axis].null)) or axis == "format"


@pytest.mark.parametrize("axis", axes.TABLE)
def test_an_unknown_member_is_refused_with_the_known_ones(axis):
    with pytest.raises(BadInput, match=f"{axis}=nonsense: known: .*{axes.names(axis)[-1]}"):
        axes.by_name(axis, "nonsense")
    with pytest.raises(BadInput, match=f"{axis}=no_such_module.X: cannot be imported"):
        axes.by_name(axis, "no_such_module.X")
    with pytest.raises(BadInput, match="cannot be called"):
        axes.by_name(axis, "kvlab.axes.AXES")


def test_a_member_of_a_higher_room_is_found_without_importing_it_first():
    """`summary=text` lives in the room of models, which the cache must not import."""
    script = ("import sys; from kvlab.cache import CacheSpec; "
              "assert 'kvlab.model' not in sys.modules; "
              "print(CacheSpec(summary='text').summary.name)")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "text"


def test_reading_the_table_imports_no_torch():
    script = "import sys, kvlab.axes; kvlab.axes.names('summary'); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
