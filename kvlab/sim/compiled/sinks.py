"""What becomes of what a tier gives up: it is gone, or goes to the tier below, bound to the
function `left` of that one."""

from __future__ import annotations

left = None  # that of the tier below, given by `bind`


def note(host, i, x):
    """The i-th block that leaves at a time."""


def sink(host, count):
    """So many have left, and can still be read."""


def note_down(host, i, x):
    host.lost[i] = x


def sink_down(host, count):
    left(host, host.below, host.lost, count)


GONE, DOWN = {"note": "note", "sink": "sink"}, {"note": "note_down", "sink": "sink_down"}
