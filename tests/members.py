"""Policies that a test of a live cache may take by their names alone."""

from __future__ import annotations

from kvlab.core import BadInput
from kvlab.policy import asked, by_name, names


def live() -> list[str]:
    """All that evict, but those that need more than a live run says by itself: the future, what
    requests say of themselves, or something measured of the model."""
    return [name for name in names()
            if asked(name).evicts and not asked(name).asks and _can_be_made(name)]  # fmt: skip


def _can_be_made(name: str) -> bool:
    try:
        by_name(name)
    except BadInput:
        return False
    return True
