"""The cache: puts the axes together."""

from kvlab.cache.paged import PagedCache
from kvlab.cache.prefix import Handle, ModelFacts
from kvlab.cache.spec import CacheSpec
from kvlab.cache.stats import CacheStats

__all__ = ["CacheSpec", "CacheStats", "Handle", "ModelFacts", "PagedCache"]
