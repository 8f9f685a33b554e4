"""One decode step that may be captured: fixed shapes, tensors in place, no look at the host."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvlab.cache import ModelFacts
from kvlab.core import KvlabError
from kvlab.kernel.step_ref import Past
from kvlab.model.adapter import PagedCache
from kvlab.model.doors import Logits, PagedLayer
from kvlab.model.fuse import fused
from kvlab.model.library import cache_parameter


class StepCache(Cache):
    """The model's view of a `PagedCache` inside one step: it attends, it neither begins nor ends.

    The driver calls the cache's `begin` before and `commit` after; between them nothing here may
    depend on a length. The library asks for one to place a mask that is never built.
    """

    seen = 0

    def __init__(self, cache: PagedCache):
        self.paged = cache
        self.served = 0  # layers that attended in the run under way
        super().__init__(layers=[PagedLayer(self, i) for i in range(cache.geometry.layers)])

    @property
    def facts(self) -> ModelFacts:
        return self.paged.facts

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def past(self, scale: float) -> Past | None:
        """What one launch over all layers may read; None where more than that is at work."""
        groups = self.paged.groups
        alone = len(groups) == 1 and self.paged.decodes
        return groups[0].past(scale) if alone else None

    def check_served(self) -> None:
        """Raises `KvlabError` unless every layer attended over this cache once."""
        served, self.served = self.served, 0
        if served != len(self.layers):
            raise KvlabError(f"{served} of {len(self.layers)} layers attended over the cache that "
                             "the model was given: transformers hands it on in another way here")

    def get_mask_sizes(self, *args) -> tuple[int, int]:
        return 1, 0  # one query that sees everything: there is no mask

    def forward(
        self, layer: PagedLayer, query: Tensor, mask, how: Logits, positions: Tensor | None = None
    ):
        """Attention of one layer, [B, Hq, 1, D] -> [B, 1, Hq, D]."""
        (keys, values), layer.pending = layer.pending, None
        self.served += 1
        window = self.paged.geometry.shapes[layer.index].window
        return self.paged.attend(layer.index, query, keys, values, scale=how.scale, window=window,
                                 sinks=how.sinks)  # fmt: skip


class Step:
    """`model` over static inputs: ids and positions int64 [B, 1], logits [B, V] in place.

    cache: a `StepCache`, or a cache of the library that keeps its tensors in place. `run` computes,
    `capture` records one run, and `replay` repeats it. Positions advance by themselves, so that the
    host uploads nothing.
    """

    def __init__(self, model, cache: Cache, rows: int):
        self.model, self.cache = model, cache
        self.ids, self.positions = (
            torch.zeros(rows, 1, dtype=torch.long, device=model.device) for _ in range(2)
        )
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self._expected: list[int] | None = None

    def at(self, positions: list[int]) -> None:
        """The positions [B] of the tokens of the next run."""
        if positions != self._expected:
            self.positions.copy_(torch.tensor(positions)[:, None], non_blocking=True)
        self._expected = [p + 1 for p in positions]

    def forget(self) -> None:
        """Runs came between that were no steps: positions are uploaded anew."""
        self._expected = None

    def run(self) -> None:
        """Compute the logits of `ids`, through fused layers."""
        with fused(self.model):
            self._forward()

    def _forward(self) -> None:
        given = {cache_parameter(self.model): self.cache}
        self.logits = self.model(
            input_ids=self.ids, position_ids=self.positions, use_cache=True, logits_to_keep=1,
            **given,
        ).logits[:, -1]
        self.positions.add_(1)
        if isinstance(self.cache, StepCache):
            self.cache.check_served()

    def warm_up(self) -> None:
        """Run once beside the main stream: kernels are compiled, libraries get their handles.

        It writes the token's key and value where the replay writes them again.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.run()
            self.positions.sub_(1)
        torch.cuda.current_stream().wait_stream(side)

    def capture(self) -> None:
        """Record one run; nothing is computed."""
        self.graph = None  # its memory first
        graph = torch.cuda.CUDAGraph()
        with fused(self.model), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._forward()
        self.graph = graph

    def replay(self) -> None:
        self.graph.replay()
