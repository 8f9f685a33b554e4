"""Axis `policy`: which evictable block leaves first."""

from __future__ import annotations

from kvlab.policy.adaptive import Adaptive
from kvlab.policy.attention_mass import AttentionMass
from kvlab.policy.base import (
    BlockMeta,
    EvictionPolicy,
    NoEviction,
    PriorityPolicy,
    asked,
    by_name,
    names,
)
from kvlab.policy.belady import Belady
from kvlab.policy.classic import FIFO, LFU, LRU, Random
from kvlab.policy.fifo_queues import S3FIFO, SIEVE
from kvlab.policy.greedy_dual import GDSF
from kvlab.policy.leaves import PGDSF, LeafFirst
from kvlab.policy.lru_queues import ARC, MQ
from kvlab.policy.priority import Hybrid, Priority
from kvlab.policy.scored import TOVA, ExpectedAttention, KeyNorm, SnapKV
from kvlab.policy.shuffled import Shuffled

__all__ = [
    "ARC", "Adaptive", "AttentionMass", "Belady", "BlockMeta", "EvictionPolicy",
    "ExpectedAttention", "FIFO", "GDSF", "Hybrid", "KeyNorm", "LFU", "LRU", "LeafFirst", "MQ",
    "NoEviction", "PGDSF", "Priority", "PriorityPolicy", "Random", "S3FIFO", "SIEVE", "Shuffled",
    "SnapKV", "TOVA", "asked", "by_name", "names",
]  # fmt: skip
