"""The table of what composes says what the code does, and is the one that is committed."""

from __future__ import annotations

import pytest

from kvlab.core import BadInput
from kvlab.eval import compat


def test_the_committed_table_is_current():
    assert compat.PAGE.read_text(encoding="utf-8") == compat.page(), (
        "out of date: python -m kvlab.eval.compat"
    )


def test_a_pair_that_composes_is_built_and_a_refused_one_says_why():
    assert compat.verdict({"format": "int4", "offload": "none"}) == ("", None)
    assert compat.verdict({"policy": "lru", "format": "int4"}).needs == "a budget"
    assert compat.verdict({"evict": "token"}).needs == "a policy that scores and a budget"
    told = compat.verdict({"window": "sink, rerotate", "retrieval": "quest"})
    assert told.refusal.startswith("window.rerotate: ")
    with pytest.raises(BadInput):
        compat.build({"window": "sink, rerotate", "retrieval": "quest"})


def test_every_refusal_names_an_axis_of_its_pair():
    for (a, _), (b, _), told in compat.pairs():
        if told.refusal:
            assert compat._axis(told.refusal.partition(": ")[0]) in (a, b)


def test_writes_where_it_is_told(tmp_path, capsys):
    assert compat.main([str(tmp_path / "x.md")]) == 0
    assert (tmp_path / "x.md").read_text().startswith("# Which axes compose")
