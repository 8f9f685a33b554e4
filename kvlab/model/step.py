"""One decode step that may be captured: fixed shapes, tensors in place, no look at the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvlab.cache import Running
from kvlab.core import KvlabError
from kvlab.kernel.step_ref import Past
from kvlab.model.adapter import PagedCache
from kvlab.model.doors import PagedLayer
from kvlab.model.fuse import Fusing
from kvlab.model.library import cache_parameter
from kvlab.model.refusals import refuse_other_depth

Driver = Literal["auto", "eager", "graph", "static"]
DRIVERS = ("auto", "eager", "graph", "static")
ROOMY = 8 << 30  # bytes that nobody has taken of a device


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, device: torch.device, pool=None) -> Iterator[None]:
    """Within it `graph` records, on a stream beside, over memory of `pool`.

    `torch.cuda.graph` gives all cached memory back first, and whoever computes next waits for it to
    be taken again: each cache of a study, for each document. Where much is free it stays.
    """
    capped = torch.cuda.get_per_process_memory_fraction(device) < 1
    if capped or torch.cuda.mem_get_info(device)[0] < ROOMY:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(_beside(device)):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


@lru_cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class StepForward:
    """A forward inside one step: it attends, it neither begins nor ends.

    windows: the model's own, by layer.
    """

    def __init__(self, windows: list[int | None]):
        self.windows = windows
        self.step: Running | None = None
        self.served = 0  # layers that attended in the run under way

    def enter(self, layer: int, *asked) -> int | None:
        """The sliding window of a layer that is about to attend."""
        self.served += 1
        return self.windows[layer]


class StepCache(Cache):
    """The model's view of a `PagedCache` inside one step.

    The driver calls the cache's `begin` before and `commit` after; between them nothing here may
    depend on a length. The library asks for one to place a mask that is never built.
    """

    seen = 0

    def __init__(self, cache: PagedCache):
        self.core = cache.core
        self.forward = StepForward([shape.window for shape in cache.geometry.shapes])
        super().__init__(layers=[PagedLayer(self, i) for i in range(cache.geometry.layers)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def past(self, scale: float) -> Past | None:
        """What one launch over all layers may read; None where more than that is at work."""
        groups = self.core.groups
        alone = len(groups) == 1 and self.core.running.decodes
        return groups[0].past(scale) if alone else None

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        return 1, 0  # one query that sees everything: there is no mask

    def open_forward(self, module, *asked) -> None:
        """The first layer attends, of the model that the cache was made for."""
        self.core.lineage.facts.check(module)
        refuse_other_depth(len(self.layers), module)
        self.forward.step = self.core.running

    def abort(self) -> None:
        """The driver undoes a step that failed; no layer of it counts for the next one."""
        self.forward.served, self.forward.step = 0, None

    def check_served(self) -> None:
        """Raises `KvlabError` unless every layer attended over this cache once."""
        served, self.forward.served, self.forward.step = self.forward.served, 0, None
        if served != len(self.layers):
            raise KvlabError(f"{served} of {len(self.layers)} layers attended over the cache that "
                             "the model was given: transformers hands it on in another way here")


class Step:
    """`model` over static inputs: ids and positions int64 [B, T], logits [B, V] in place.

    T is 1, of a decode step, or the tokens of a chunk, whose inputs are given.

    cache: a `StepCache`, or a cache of the library that keeps its tensors in place. `run` computes,
    `capture` records one run, and `replay` repeats it. Positions advance by themselves, so that the
    host uploads nothing.
    inputs: ids and positions that lie somewhere already. greedy: the likeliest token of each row
    takes the place of its id, for the next run.
    """

    def __init__(
        self, model, cache: Cache, rows: int, inputs: tuple[Tensor, Tensor] | None = None,
        greedy: bool = False, fusing: Fusing | None = None,
    ):
        self.model, self.cache, self.greedy = model, cache, greedy
        self.fusing = fusing or Fusing(model)
        self.ids, self.positions = inputs or (
            torch.zeros(rows, 1, dtype=torch.long, device=model.device) for _ in range(2)
        )
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._expected: list[int] | None = None

    def at(self, positions: list[int]) -> None:
        """The positions [B] of the first tokens of the next run."""
        tokens = self.ids.shape[1]
        if positions != self._expected:
            each = torch.tensor(positions)[:, None] + torch.arange(tokens)
            self.positions.copy_(each, non_blocking=True)
        self._expected = [p + tokens for p in positions]

    def forget(self) -> None:
        """Runs came between that were no steps: positions are uploaded anew."""
        self._expected = None

    def run(self) -> None:
        """Compute the logits of `ids`, through fused layers."""
        with self.fusing.on():
            self._forward()

    def _forward(self) -> None:
        given = {cache_parameter(self.model): self.cache}
        self.logits = self.model(
            input_ids=self.ids, position_ids=self.positions, use_cache=True, logits_to_keep=1,
            **given,
        ).logits[:, -1]
        self.positions.add_(self.ids.shape[1])
        if self.greedy:
            self.ids.copy_(self.logits.argmax(-1, keepdim=True))
        if isinstance(self.cache, StepCache):
            self.cache.check_served()

    def warm_up(self) -> None:
        """Run once beside the main stream: kernels are compiled, libraries get their handles.

        It writes the token's key and value where the replay writes them again.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ids = self.ids.clone()
            self.run()
            self.positions.sub_(self.ids.shape[1])
            self.ids.copy_(ids)
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, pool=None) -> None:
        """Record one run; nothing is computed. pool: of memory, shared with graphs that never run
        at the same time."""
        self.graph = None  # its memory first
        graph = torch.cuda.CUDAGraph()
        with self.fusing.on(), recording(graph, self.ids.device, pool):
            self._forward()
        self.graph = graph

    def replay(self) -> None:
        self.graph.replay()
