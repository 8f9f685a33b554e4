"""Policies that a test of a live cache may take by their names alone."""

from __future__ import annotations

from kvlab.core import BadInput
from kvlab.policy import asked, by_name, names


def live() -> list[str]:
    """All that evict, but those that need more than a cache hears by itself: the future, what
    requests say of themselves, when a context is over, something measured of the model."""
    return [name for name in names() if (member := asked(name)).evicts and not member.asks
            and not member.waits and _can_be_made(name)]  # fmt: skip


def _can_be_made(name: str) -> bool:
    try:
        by_name(name)
    except BadInput:
        return False
    return True
