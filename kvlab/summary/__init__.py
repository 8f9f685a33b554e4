"""Axis `summary`: what stands for blocks that were evicted."""

from __future__ import annotations

from kvlab.core import BadInput
from kvlab.summary.base import Entries, NoSummary, Queries, Summary
from kvlab.summary.fitted import Fitted
from kvlab.summary.kept import RandomTokens
from kvlab.summary.merged import Merged, MergeMean

SUMMARIES = {
    member.name: member for member in (NoSummary, Merged, Fitted, MergeMean, RandomTokens)
}
__all__ = [
    "SUMMARIES", "Entries", "Fitted", "MergeMean", "Merged", "NoSummary", "Queries", "RandomTokens",
    "Summary", "by_name",
]


def by_name(name: str, **parameters) -> NoSummary:
    """A summary of this short name; BadInput lists the known names for an unknown one."""
    if name not in SUMMARIES:
        raise BadInput("summary", name, "known: " + ", ".join(sorted(SUMMARIES)))
    return SUMMARIES[name](**parameters)
