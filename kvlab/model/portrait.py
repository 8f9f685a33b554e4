"""What a model's layers store and see, asked of the model itself: one token goes through it.

No list of architectures: whatever hands its keys and values to the cache and attends through the
library's interface is taken as it is; what does not is refused with the reason that it shows.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvlab.cache import CacheSpec
from kvlab.core import BadInput, CacheGeometry, KvlabError, LayerShape
from kvlab.model.doors import ATTENTION, PagedLayer, Untouchable
from kvlab.model.library import cache_parameter
from kvlab.model.visibility import window_of

# Kinds of layers by the library's names that hold keys and values; others keep a state, or nothing.
ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")


class Portrait(NamedTuple):
    """shapes: of each layer; query_heads: of all."""

    shapes: tuple[LayerShape, ...]
    query_heads: int


def model_geometry(model: nn.Module, spec: CacheSpec) -> CacheGeometry:
    """The shape of `model` with the block size of `spec`. Raises `BadInput` as `portrait` does."""
    asked = portrait(model)
    return CacheGeometry.of(asked.shapes, asked.query_heads, spec.block_size)


_known: WeakKeyDictionary[nn.Module, tuple[str, Portrait]] = WeakKeyDictionary()


def portrait(model: nn.Module) -> Portrait:
    """The portrait of `model`, asked again when its configuration has changed.

    Raises `BadInput` with the reason why a `PagedCache` cannot serve this model.
    """
    config = model.config.get_text_config(decoder=True)
    told = config.to_json_string(use_diff=False)
    if model not in _known or _known[model][0] != told:
        _known[model] = told, _asked(model, config)
    return _known[model][1]


def _asked(model: nn.Module, config) -> Portrait:
    _check_kind(model, config)
    sitter = Sitter(config.num_hidden_layers)
    with _switched(model), _rotary_kept(model), torch.no_grad():
        try:
            decoder = model.get_decoder()
            ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            decoder(input_ids=ids, use_cache=True, **{cache_parameter(decoder): sitter})
        except Untouchable as error:
            raise _refused(config, "its layers compute themselves with what the cache gives back "
                           "(latents as in MLA, or an attention of their own), and a PagedCache "
                           "gives back no tensor") from error
        except Exception as error:  # whatever a model does with a cache that is none of its own
            raise _refused(config, _first_line(error)) from error
    missing = [n for n, shape in enumerate(sitter.shapes) if shape is None]
    if missing:
        raise _refused(config, f"layer {missing[0]} of {len(sitter.shapes)} does not attend over "
                               "its cache through the library's interface")
    return Portrait(tuple(sitter.shapes), sitter.forward.query_heads)


def _check_kind(model: nn.Module, config) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refused(config, "it has an encoder, whose keys are no past of the decoder")
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    odd = [kind for kind in kinds if kind not in ATTENDING]
    if odd:
        raise _refused(config, f"{len(odd)} of its {len(kinds)} layers are of kind {odd[0]}, which "
                               "is no attention over keys and values alone")


def _refused(config, reason: str) -> BadInput:
    return BadInput("model", config.model_type, f"cannot run over a PagedCache: {reason}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if isinstance(error, KvlabError) and lines else (
        f"{type(error).__name__}: {lines[0] if lines else 'without a word'}")  # fmt: skip


class Sitter(Cache):
    """A cache of nothing: it notes what each layer brings, and answers with zeros."""

    seen = 0

    def __init__(self, layers: int):
        super().__init__(layers=[PagedLayer(self, i) for i in range(layers)])
        self.forward = Sketch(layers)

    @property
    def shapes(self) -> list[LayerShape | None]:
        return self.forward.shapes

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def open_forward(self, module, *brought) -> None:
        """Any model may sit."""

    def abort(self) -> None:
        """There is nothing to undo."""


class Sketch:
    """What the layers of a forward have shown so far."""

    def __init__(self, layers: int):
        self.shapes: list[LayerShape | None] = [None] * layers
        self.query_heads = 0

    @property
    def step(self) -> Sketch:
        return self

    def enter(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask, softcap) -> int | None:
        """See `Forward.enter`."""
        if self.query_heads not in (0, q.shape[1]):
            raise KvlabError(f"its layers have {self.query_heads} and {q.shape[1]} query heads")
        self.query_heads, window = q.shape[1], window_of(mask)
        self.shapes[layer] = LayerShape(k.shape[1], k.shape[3], v.shape[3], window, softcap)
        return window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        return q.new_zeros(q.shape[0], 1, q.shape[1], v.shape[3])


@contextmanager
def _switched(model: nn.Module):
    """`model` attends through kvlab, and as before afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _rotary_kept(model: nn.Module):
    """Rotary embeddings whose frequencies follow the input are as before afterwards."""
    parts = [m for m in model.modules() if hasattr(m, "rope_type")]
    kept = [(m, dict(vars(m)), dict(m._buffers)) for m in parts]
    try:
        yield
    finally:
        for module, attributes, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers = buffers
