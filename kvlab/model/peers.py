"""The library's own caches, stepped beside ours; where captured, through the same fused layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from kvlab.model.library import cache_parameter, forward_with
from kvlab.model.step import Step


class Peer(NamedTuple):
    """A filled cache of the library and how it is stepped.

    step: tokens [B] -> logits [B, V]; replay: runs the captured step again, None where eager.
    """

    step: Callable[[Tensor], Tensor]
    replay: Callable[[], None] | None
    nbytes: int


def dynamic_eager(model, fill, rows: int, tokens: int, room: int) -> Peer:
    """DynamicCache as `generate()` runs it: every kernel of the forward launched by the host."""
    model.set_attn_implementation("sdpa")
    cache = filled(DynamicCache(config=model.config), model, fill)
    return Peer(_eager(model, cache, rows, tokens), None, _bytes(cache))


def quanto_int4_eager(model, fill, rows: int, tokens: int, room: int) -> Peer:
    """QuantizedCache, 4 bits with optimum-quanto. Raises ImportError where that is missing."""
    model.set_attn_implementation("sdpa")
    cache = filled(QuantizedCache("quanto", config=model.config, nbits=4), model, fill)
    return Peer(_eager(model, cache, rows, tokens), None, 0)


def static_fused_graph(model, fill, rows: int, tokens: int, room: int) -> Peer:
    """StaticCache of just the length that is needed, layers fused as ours, in a CUDA graph."""
    step, cache = _static(model, fill, rows, tokens, room)
    step.warm_up()
    step.capture()
    return Peer(_captured(step), step.replay, _bytes(cache))


def static_compiled_graph(model, fill, rows: int, tokens: int, room: int) -> Peer:
    """StaticCache under `torch.compile(fullgraph=True)`, in a CUDA graph: the library's own best.

    Layers are not replaced: Inductor does the fusing.
    """
    step, cache = _static(model, fill, rows, tokens, room)
    given = {cache_parameter(model): cache}
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def forward():
        step.logits = compiled(
            input_ids=step.ids, position_ids=step.positions, use_cache=True, logits_to_keep=1,
            **given,
        ).logits[:, -1]
        step.positions.add_(1)

    for _ in range(2):
        forward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    step.graph = graph
    return Peer(_captured(step), step.replay, _bytes(cache))


PEERS = {f.__name__.replace("_", " "): f for f in (
    dynamic_eager, quanto_int4_eager, static_fused_graph, static_compiled_graph)}


@torch.inference_mode()
def dynamic_prefill(model, chunk_tokens: int | None, ids: Tensor) -> DynamicCache:
    """A prompt [1, T] through DynamicCache and the library's SDPA, whole or in chunks."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk_tokens or ids.shape[1], 1):
        forward_with(model, cache, input_ids=part, logits_to_keep=1)
    return cache


def filled(cache, model, fill):
    """`cache` with the keys and values that `fill(layer)` gives, [B, H, T, D] each."""
    for layer in range(model.config.num_hidden_layers):
        cache.update(*fill(layer), layer)
    return cache


def _static(model, fill, rows: int, tokens: int, room: int):
    model.set_attn_implementation("sdpa")
    cache = filled(StaticCache(config=model.config, max_cache_len=tokens + room), model, fill)
    step = Step(model, cache, rows)
    step.at([tokens] * rows)
    return step, cache


def _captured(step: Step) -> Callable[[Tensor], Tensor]:
    def run(tokens: Tensor) -> Tensor:
        step.ids.copy_(tokens.reshape(-1, 1))
        step.replay()
        return step.logits

    return run


def _eager(model, cache, rows: int, tokens: int) -> Callable[[Tensor], Tensor]:
    positions = torch.full((rows, 1), tokens, device=model.device)

    def run(ids: Tensor) -> Tensor:
        out = forward_with(
            model, cache, input_ids=ids.reshape(-1, 1), position_ids=positions, logits_to_keep=1
        ).logits[:, -1]
        positions.add_(1)
        return out

    return run


def _bytes(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
