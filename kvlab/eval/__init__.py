"""Measures: quality paired with the full cache, bytes and time."""

from kvlab.eval.evaluate import Cost, Evaluate
from kvlab.eval.prefill_speed import PrefillSpeed
from kvlab.eval.prefix_ttft import PrefixTTFT
from kvlab.eval.speed import DecodeSpeed

__all__ = ["Cost", "DecodeSpeed", "Evaluate", "PrefillSpeed", "PrefixTTFT"]
