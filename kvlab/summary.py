"""Axis `summary`: what stands for blocks that were evicted."""

from __future__ import annotations

from kvlab.core import BadInput


class NoSummary:
    """Nothing: evicted blocks leave a hole."""

    name = "none"
    makes = False  # whether evicted blocks leave entries behind


SUMMARIES = {"none": NoSummary}


def by_name(name: str, **parameters) -> NoSummary:
    """A summary of this short name; BadInput lists the known names for an unknown one."""
    if name not in SUMMARIES:
        raise BadInput("summary", name, "known: " + ", ".join(sorted(SUMMARIES)))
    return SUMMARIES[name](**parameters)
