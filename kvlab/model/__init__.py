"""The only room that knows transformers: loading, the cache's door, the drivers."""

from kvlab.model.adapter import PagedCache
from kvlab.model.library import cache_parameter
from kvlab.model.portrait import model_geometry, portrait
from kvlab.model.prefill import PrefillResult, prefill
from kvlab.model.text_summary import TextSummary

__all__ = [
    "PagedCache", "PrefillResult", "TextSummary", "cache_parameter", "model_geometry", "portrait",
    "prefill",
]  # fmt: skip
