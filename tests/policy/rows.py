"""Every policy, once: the list that the shared tests run over. A new policy adds its row here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvlab import policy
from kvlab.policy import BlockMeta, EvictionPolicy


class Row(NamedTuple):
    """A way to build a policy and, where its order is a function of the metadata, that function."""

    name: str
    build: Callable[[], EvictionPolicy]
    key: Callable[[BlockMeta], tuple] | None = None
    by_use: bool = True  # a touched block outlives an otherwise equal untouched one
    by_pin: bool = False  # pins leave their mark on later choices


CENTRES = {"real": [[[1.0]]], "imaginary": [[[0.5]]], "norm": [[[2.0]]]}
ROWS = [
    Row("fifo", policy.FIFO, lambda m: (m.born,), by_use=False),
    Row("lru", policy.LRU, lambda m: (m.last,)),
    Row("lfu", policy.LFU, lambda m: (m.hits, m.last)),
    Row("random", policy.Random, by_use=False, by_pin=True),
    Row(
        "priority",
        lambda: policy.Priority(prefix_blocks=2),
        lambda m: (m.level, m.depth < 2, m.last),
    ),
    Row("hybrid", policy.Hybrid),
    Row("attention_mass", policy.AttentionMass, lambda m: (m.score, m.last)),
    Row("h2o", policy.H2O, lambda m: (m.score, m.last)),
    Row("snapkv", policy.SnapKV, lambda m: (m.score, m.last)),
    Row("expected_attention", policy.ExpectedAttention, lambda m: (m.score, m.last)),
    Row("key_norm", policy.KeyNorm, lambda m: (m.score, m.last)),
    Row("key_diff", policy.KeyDiff, lambda m: (m.score, m.last)),
    Row("kvzip", policy.KVzip, lambda m: (m.score, m.last)),
    Row("lagkv", policy.LagKV, lambda m: (m.score, m.last)),
    Row("compactor", policy.Compactor, lambda m: (m.score, m.last)),
    Row("rkv", policy.RKV, lambda m: (m.score, m.last)),
    Row("tova", policy.TOVA, lambda m: (m.score, m.last)),
    Row("triattention", lambda: policy.TriAttention(CENTRES), lambda m: (m.score, m.last)),
    Row("sieve", policy.SIEVE),
    Row("s3fifo", lambda: policy.S3FIFO(promote=1)),
    Row("arc", policy.ARC),
    Row("mq", lambda: policy.MQ(lifetime=20)),
    Row("gdsf", policy.GDSF),
    Row("pgdsf", policy.PGDSF),
    Row("leaf_first", policy.LeafFirst),
    Row("adaptive", lambda: policy.Adaptive(memory=50)),
    Row("shuffled", policy.Shuffled, by_use=False, by_pin=True),
    Row("request_lfu", policy.RequestLFU, lambda m: (m.hits, m.last)),
    Row("request_arc", policy.RequestARC),
    Row("ttl", policy.TTL, lambda m: (m.last,)),
    Row("keep_until_return", policy.KeepUntilReturn, lambda m: (m.last,)),
    Row("wa_lru", policy.WALRU, lambda m: (m.last,)),
    Row("learned", lambda: policy.Learned(future=[[*range(n, n + 9)] for n in range(50)] * 2),
        by_use=False),
    Row("admit_reuse", lambda: policy.AdmitReuse(door=0)),
    Row("admit_cost", policy.AdmitCost, by_use=False),
    Row("belady", lambda: policy.Belady(future=[*range(200)] * 2), by_use=False),
]
