"""Axis `offload`: where blocks go that leave the device."""

from __future__ import annotations

from kvlab.core import BadInput


class NoOffload:
    """Nowhere: an evicted block is gone."""

    name = "none"
    keeps = False  # whether an evicted block can still be read


OFFLOADS = {"none": NoOffload}


def by_name(name: str, **parameters) -> NoOffload:
    """An offload of this short name; BadInput lists the known names for an unknown one."""
    if name not in OFFLOADS:
        raise BadInput("offload", name, "known: " + ", ".join(sorted(OFFLOADS)))
    return OFFLOADS[name](**parameters)
