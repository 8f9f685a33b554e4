"""Axis `policy`: which evictable block leaves first."""

from __future__ import annotations

from kvlab.core import BadInput
from kvlab.policy.attention_mass import AttentionMass
from kvlab.policy.base import BlockMeta, EvictionPolicy, NoEviction, PriorityPolicy
from kvlab.policy.belady import Belady
from kvlab.policy.classic import FIFO, LFU, LRU, Random
from kvlab.policy.fifo_queues import S3FIFO, SIEVE
from kvlab.policy.greedy_dual import GDSF, PGDSF
from kvlab.policy.lru_queues import ARC, MQ
from kvlab.policy.priority import Hybrid, Priority

__all__ = [
    "ARC", "AttentionMass", "Belady", "BlockMeta", "EvictionPolicy", "FIFO", "GDSF", "Hybrid",
    "LFU", "LRU", "MQ", "NoEviction", "PGDSF", "Priority", "PriorityPolicy", "Random", "S3FIFO",
    "SIEVE", "by_name", "names",
]  # fmt: skip


def _classes() -> dict[str, type[EvictionPolicy]]:
    """Short name -> class: every exported policy that has a name."""
    exported = (globals()[name] for name in __all__)
    return {c.name: c for c in exported if isinstance(c, type) and getattr(c, "name", "")}


def names() -> list[str]:
    """The short names, sorted."""
    return sorted(_classes())


def by_name(name: str, **parameters) -> EvictionPolicy:
    """A new policy of this short name; BadInput lists the known names for an unknown one."""
    classes = _classes()
    if name not in classes:
        raise BadInput("policy", name, "known: " + ", ".join(sorted(classes)))
    return classes[name](**parameters)
