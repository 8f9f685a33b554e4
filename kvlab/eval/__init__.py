"""Measures: quality paired with the full cache, bytes and time."""

from kvlab.eval.evaluate import Cost, Evaluate
from kvlab.eval.load import Load
from kvlab.eval.parity import Parity
from kvlab.eval.prefill_speed import PrefillSpeed
from kvlab.eval.serving import PrefixHitRate
from kvlab.eval.speed import DecodeSpeed

__all__ = [
    "Cost", "DecodeSpeed", "Evaluate", "Load", "Parity", "PrefillSpeed", "PrefixHitRate",
]  # fmt: skip
