"""Axis `summary`: what stands for blocks that were evicted."""

from __future__ import annotations

from functools import partial

from kvlab import axes
from kvlab.summary.base import Entries, NoSummary, Queries, Summary
from kvlab.summary.fitted import Fitted
from kvlab.summary.kept import RandomTokens
from kvlab.summary.merged import Merged, MergeMean

__all__ = [
    "Entries", "Fitted", "MergeMean", "Merged", "NoSummary", "Queries", "RandomTokens", "Summary",
    "by_name",
]


by_name = partial(axes.by_name, "summary")
