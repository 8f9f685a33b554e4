"""Axis `offload`: where blocks go that leave the device."""

from functools import partial

from kvlab import axes
from kvlab.core import OutOfHost
from kvlab.offload.base import NoOffload, NoShelf
from kvlab.offload.shelf import HostStore, Shelf

__all__ = ["HostStore", "NoOffload", "NoShelf", "OutOfHost", "Shelf", "by_name"]

by_name = partial(axes.by_name, "offload")
