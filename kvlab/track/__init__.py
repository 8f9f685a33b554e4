"""AXIS track: the run folder, and who else hears of its numbers. Imports no torch."""

from kvlab.track.base import JsonlTracker, Tracker
from kvlab.track.environment import collect as collect_environment
from kvlab.track.folder import RunFolder
from kvlab.track.online import WandbTracker
from kvlab.track.rows import encode, identity, plain, read_rows

__all__ = [
    "JsonlTracker",
    "RunFolder",
    "Tracker",
    "WandbTracker",
    "collect_environment",
    "encode",
    "identity",
    "plain",
    "read_rows",
]
