"""What there is to choose from, told in a line each."""

from __future__ import annotations

import pytest

from kvlab import axes
from kvlab.config import conf_dir, listing
from kvlab.core import BadInput


def test_every_option_of_every_group_is_told_in_a_line():
    told = listing(width=100)
    assert max(map(len, told.splitlines())) <= 100
    for group in (f for f in conf_dir().iterdir() if f.is_dir()):
        name = "hydra/launcher" if group.name == "launcher" else group.name
        [block] = [b for b in told.split("\n\n") if b.startswith(f"{name}=\n")]
        names = [line.split()[0] for line in block.splitlines()[1:]]
        assert names == sorted(file.stem for file in group.glob("*.yaml"))


@pytest.mark.parametrize("group", ["experiment", "job", "task", "model", "data", *axes.AXES])
def test_what_people_choose_has_words(group):
    for line in listing([group]).splitlines()[1:]:
        assert len(line.split()) > 2, f"{group}: {line.strip()} says nothing of itself"


def test_an_unknown_group_is_refused():
    with pytest.raises(BadInput, match="list=nothing: no such group; known: budget"):
        listing(["nothing"])
