"""Windows: ranges of protected and readable tokens."""

from __future__ import annotations

import pytest

from kvlab.core import BadInput
from kvlab.window import NoWindow, SinkWindow, by_name


def test_no_window():
    assert NoWindow().protected(9) == []
    assert NoWindow().readable(9) == [(0, 9)]
    assert NoWindow().readable(0) == []


@pytest.mark.parametrize(
    ("length", "ranges"),
    [(0, []), (3, [(0, 3)]), (12, [(0, 12)]), (13, [(0, 4), (5, 13)]), (99, [(0, 4), (91, 99)])],
)
def test_sinks_and_recent(length, ranges):
    window = SinkWindow(4, 8)
    assert window.protected(length) == ranges
    assert window.readable(length) == ([(0, length)] if length else [])
    assert SinkWindow(4, 8, middle=False).readable(length) == ranges


def test_without_sinks():
    assert SinkWindow(0, 8).protected(10) == [(2, 10)]


@pytest.mark.parametrize("arguments", [(-1, 8), (4, 0), (4.5, 8), (4, "8"), (True, 8)], ids=repr)
def test_senseless_arguments_are_refused(arguments):
    with pytest.raises(BadInput, match="window"):
        SinkWindow(*arguments)


def test_rerotation_needs_a_window_without_middle():
    assert SinkWindow(4, 8, middle=False, rerotate=True).rerotate
    assert not NoWindow().rerotate and not SinkWindow().rerotate
    with pytest.raises(BadInput, match="window.rerotate=True: needs window.middle=false"):
        SinkWindow(4, 8, rerotate=True)


def test_names():
    assert by_name("sink", recent=5).recent == 5
    with pytest.raises(BadInput, match="known: none, sink"):
        by_name("sliding")
