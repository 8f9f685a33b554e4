"""Measures: quality paired with the full cache, bytes and time."""

from kvlab.eval.evaluate import Cost, Evaluate

__all__ = ["Cost", "Evaluate"]
