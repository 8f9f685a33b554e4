"""The only room that knows transformers: loading, the cache's door, the drivers."""

from kvlab.model.adapter import PagedCache
from kvlab.model.batching import continuous_batching
from kvlab.model.chunk import run_chunk
from kvlab.model.chunks import check_driver as check_prefill_driver
from kvlab.model.decode import Decoder, Driver, check_driver
from kvlab.model.device import prepare_device
from kvlab.model.lanes import Fetched, Lanes
from kvlab.model.library import cache_parameter
from kvlab.model.load import LoadedModel
from kvlab.model.outline import Outline, outline
from kvlab.model.packed import Packed
from kvlab.model.portrait import model_geometry, portrait
from kvlab.model.prefill import PrefillResult, forward_chunk, prefill
from kvlab.model.refusals import vocabulary
from kvlab.model.text_summary import TextSummary

__all__ = [
    "Decoder", "Driver", "Fetched", "Lanes", "LoadedModel", "Outline", "Packed", "PagedCache",
    "PrefillResult", "TextSummary", "cache_parameter", "check_driver",
    "check_prefill_driver", "continuous_batching",
    "forward_chunk", "model_geometry", "outline", "portrait", "prefill", "prepare_device",
    "run_chunk", "vocabulary",
]  # fmt: skip
