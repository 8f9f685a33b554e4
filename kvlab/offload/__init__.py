"""Axis `offload`: where blocks go that leave the device."""

from kvlab.core import BadInput
from kvlab.offload.base import NoOffload, NoShelf, OutOfHost
from kvlab.offload.shelf import HostStore, Shelf

__all__ = ["HostStore", "NoOffload", "NoShelf", "OFFLOADS", "OutOfHost", "Shelf", "by_name"]

OFFLOADS = {"none": NoOffload, "host": HostStore}


def by_name(name: str, **parameters) -> NoOffload:
    """An offload of this short name; BadInput lists the known names for an unknown one."""
    if name not in OFFLOADS:
        raise BadInput("offload", name, "known: " + ", ".join(sorted(OFFLOADS)))
    return OFFLOADS[name](**parameters)
