"""Axis `retrieval`: which blocks of the past a decoded token reads."""

from __future__ import annotations

from kvlab.core import BadInput


class NoRetrieval:
    """All of them."""

    name = "none"
    selects = False  # whether a decoded token reads a choice of blocks only


RETRIEVALS = {"none": NoRetrieval}


def by_name(name: str, **parameters) -> NoRetrieval:
    """A retrieval of this short name; BadInput lists the known names for an unknown one."""
    if name not in RETRIEVALS:
        raise BadInput("retrieval", name, "known: " + ", ".join(sorted(RETRIEVALS)))
    return RETRIEVALS[name](**parameters)
