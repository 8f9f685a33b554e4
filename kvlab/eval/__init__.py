"""Measures: quality paired with the full cache, recall, bytes and time."""

from kvlab.eval.evaluate import Cost, Evaluate
from kvlab.eval.pareto import Pareto
from kvlab.eval.recall import Recall
from kvlab.eval.study import Study

__all__ = ["Cost", "Evaluate", "Pareto", "Recall", "Study"]
