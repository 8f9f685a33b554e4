"""AXIS track: the run folder, and who else hears of its numbers. Imports no torch."""

from kvlab.track.base import JsonlTracker, Tracker
from kvlab.track.environment import collect as collect_environment
from kvlab.track.failure import Failure
from kvlab.track.folder import RunFolder, save_whole
from kvlab.track.online import WandbTracker
from kvlab.track.owner import Busy, Owner, own
from kvlab.track.place import Place
from kvlab.track.rows import (
    FAILED,
    canonical,
    decode,
    encode,
    identity,
    plain,
    read_objects,
    read_rows,
    standing,
)
from kvlab.track.shown import summary_keys

__all__ = [
    "Busy",
    "FAILED",
    "Failure",
    "JsonlTracker",
    "Owner",
    "Place",
    "RunFolder",
    "Tracker",
    "WandbTracker",
    "canonical",
    "collect_environment",
    "decode",
    "encode",
    "identity",
    "own",
    "plain",
    "read_objects",
    "read_rows",
    "save_whole",
    "standing",
    "summary_keys",
]
