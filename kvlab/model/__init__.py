"""The only room that knows transformers: loading, the cache's door, the drivers."""

from kvlab.model.adapter import PagedCache
from kvlab.model.prefill import PrefillResult, prefill

__all__ = ["PagedCache", "PrefillResult", "prefill"]
