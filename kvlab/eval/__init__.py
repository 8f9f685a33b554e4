"""Measures: quality paired with the full cache, recall, bytes and time."""

from kvlab.eval.evaluate import Cost, Evaluate
from kvlab.eval.pareto import Pareto
from kvlab.eval.prefill_speed import PrefillSpeed
from kvlab.eval.recall import Recall
from kvlab.eval.speed import DecodeSpeed
from kvlab.eval.study import Study

__all__ = ["Cost", "DecodeSpeed", "Evaluate", "Pareto", "PrefillSpeed", "Recall", "Study"]
