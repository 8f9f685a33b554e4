"""The only room that knows transformers: loading, the cache's door, the drivers."""

from kvlab.model.adapter import PagedCache
from kvlab.model.chunk import run_chunk
from kvlab.model.decode import Decoder, Driver, check_driver
from kvlab.model.device import prepare_device
from kvlab.model.library import cache_parameter
from kvlab.model.load import LoadedModel
from kvlab.model.outline import Outline, outline
from kvlab.model.portrait import model_geometry, portrait
from kvlab.model.prefill import PrefillResult, forward_chunk, prefill
from kvlab.model.text_summary import TextSummary

__all__ = [
    "Decoder", "Driver", "LoadedModel", "Outline", "PagedCache", "PrefillResult", "TextSummary",
    "cache_parameter", "check_driver", "forward_chunk", "model_geometry", "outline", "portrait",
    "prefill", "prepare_device", "run_chunk",
]  # fmt: skip
