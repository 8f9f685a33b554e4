"""Axis `policy`: which evictable block leaves first."""

from __future__ import annotations

from kvlab.policy.adaptive import USES_TOLD, Adaptive
from kvlab.policy.admission import AdmitCost, AdmitReuse
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
from kvlab.policy.classes import WALRU, Learned
from kvlab.policy.classic import FIFO, LFU, LRU, Random
from kvlab.policy.fifo_queues import S3FIFO, SIEVE
from kvlab.policy.greedy_dual import GDSF
from kvlab.policy.leaves import PGDSF, LeafFirst
from kvlab.policy.lru_queues import ARC, MQ
from kvlab.policy.moment import Moment
from kvlab.policy.priority import Hybrid, Priority
from kvlab.policy.requests import RequestARC, RequestLFU
from kvlab.policy.scored import (
    H2O,
    RKV,
    TOVA,
    Compactor,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    KVzip,
    LagKV,
    SnapKV,
)
from kvlab.policy.shadows import SHIFT, SPREAD, share_of, thinned
from kvlab.policy.shuffled import Shuffled
from kvlab.policy.timed import TTL, KeepUntilReturn
from kvlab.policy.triattention import TriAttention

__all__ = [
    "ARC", "Adaptive", "AdmitCost", "AdmitReuse", "AttentionMass", "Belady", "BlockMeta",
    "Compactor", "EvictionPolicy", "ExpectedAttention", "FIFO", "GDSF", "H2O", "Hybrid", "KVzip",
    "KeepUntilReturn", "KeyDiff", "KeyNorm", "LFU", "LRU", "LagKV", "LeafFirst", "Learned", "MQ",
    "Moment", "NoEviction", "PGDSF", "Priority", "PriorityPolicy", "RKV", "Random", "RequestARC",
    "RequestLFU", "S3FIFO", "SHIFT", "SIEVE", "SPREAD", "Shuffled", "SnapKV", "TOVA", "TTL",
    "TriAttention", "USES_TOLD", "WALRU", "asked", "by_name", "names", "share_of", "thinned",
]  # fmt: skip
