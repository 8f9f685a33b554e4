"""The cache: puts the axes together."""

from kvlab.blocks import PrefixHandle as Handle
from kvlab.cache.copies import Copies
from kvlab.cache.facts import NO_FACTS, ModelFacts
from kvlab.cache.fixed import FixedChunk, Parts, fixed_chunk, obstacle, standing_bytes
from kvlab.cache.paged import PagedCache
from kvlab.cache.reach import Reach
from kvlab.cache.running import Running
from kvlab.cache.spec import CacheSpec
from kvlab.cache.stats import CacheStats

__all__ = [
    "CacheSpec", "CacheStats", "Copies", "FixedChunk", "Handle", "ModelFacts", "NO_FACTS",
    "PagedCache", "Parts", "Reach", "Running", "fixed_chunk", "obstacle", "standing_bytes",
]  # fmt: skip
