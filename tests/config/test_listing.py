"""What there is to choose from, told in a line each."""

from __future__ import annotations

import pytest

from kvlab import axes
from kvlab.__main__ import main
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


def test_help_tells_the_other_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = capsys.readouterr().out
    for words in ("kvlab list", "kvlab advise", "kvlab.report", "my_module.MyPolicy",
                  'eval "$(kvlab -sc install=bash)"'):  # fmt: skip
        assert words in told


def test_completion_knows_groups_options_and_keys(capsys, monkeypatch):
    for typed, found in (("format=int", "format=int4 "), ("eval.doc", "eval.documents="),
                         ("polic", "policy=")):  # fmt: skip
        line = f"kvlab {typed}"
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert main(["-sc", "query=bash"]) == 0
        assert found in capsys.readouterr().out.replace("\n", " ") + " "
