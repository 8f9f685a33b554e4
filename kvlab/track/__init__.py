"""AXIS track: the run folder, and who else hears of its numbers. Imports no torch."""

from kvlab.track.base import JsonlTracker, Tracker
from kvlab.track.environment import collect as collect_environment
from kvlab.track.folder import RunFolder
from kvlab.track.online import WandbTracker
from kvlab.track.owner import Busy, Owner, own
from kvlab.track.place import Place
from kvlab.track.rows import FAILED, encode, identity, plain, read_rows, standing

__all__ = [
    "Busy",
    "FAILED",
    "JsonlTracker",
    "Owner",
    "Place",
    "RunFolder",
    "Tracker",
    "WandbTracker",
    "collect_environment",
    "encode",
    "identity",
    "own",
    "plain",
    "read_rows",
    "standing",
]
