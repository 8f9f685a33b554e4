"""The step under way: attention of one layer after another, over the sources of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.cache.beginnings import Beginnings, beginnings
from kvlab.cache.fixed import FixedChunk
from kvlab.cache.group import LayerGroup
from kvlab.core import BadInput
from kvlab.source import Ask, Extent


class Running:
    """What `PagedCache.begin` opens and `commit` or `abort` ends.

    rows: what the step does to each sequence, by row, then by layer group. place: number of its
    group, and place in there, of each layer. decodes: whether the sources are prepared for the
    kernels of a step of one token in every row. packed: the tokens of all sequences come in one
    row of the tensors, one behind the other, without padding. Those without a past come last.
    fixed: of a chunk of a fixed shape, who attends in each layer group, by its number.
    layers: by layer, its group, its place there, what the step does to the group's sequences, and
    the kernel that reads all there is, where one does.
    """

    def __init__(
        self, groups: list[LayerGroup], place: list[tuple[int, int]], rows: list[list[Extent]],
        decodes: bool,
    ):
        self.rows, self.decodes, self.packed = rows, decodes, False
        self.fixed: list[FixedChunk] | None = None
        self._place = place
        self._begun: dict[int, Beginnings | None] = {}  # by group, of a packed step
        self.longest = max([row[0].past for row in rows], default=0)
        none, by_group = [None] * len(place), []
        for number, group in enumerate(groups):
            kernels = (group.sources.sealed.kernels if decodes and group.plain else None) or none
            by_group.append((group, [row[number] for row in rows], kernels))
        self.layers = []
        for number, local in place:
            group, extents, kernels = by_group[number]
            self.layers.append((group, local, extents, kernels[local]))

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float,
        window: int | None = None, sinks: Tensor | None = None,
    ) -> Tensor:
        """See `PagedCache.attend`. The short way, of single tokens through the kernels, waits for
        nothing and depends on nothing but tensors that stay in place: it may be captured."""
        group, local, extents, kernel = self.layers[layer]
        if window is not None:
            group.check_window(window)
        if self.fixed is not None:
            return self._fixed(layer, q, k, v, scale, window, sinks)
        if self.packed:
            how = {"scale": scale, "window": window, "sinks": sinks}
            return self._in_one_row(group, local, extents, q, k, v, how)
        if not self.decodes or (window is not None and self.longest >= abs(window)):
            how = {"scale": scale, "window": window, "sinks": sinks}
            return self._by_row(group, local, extents, q, k, v, how)
        q, k, v = q[:, :, 0].contiguous(), k[:, :, 0].contiguous(), v[:, :, 0].contiguous()
        if kernel is not None and sinks is None:
            return kernel(q, scale=scale, new=(k, v))[0][:, None]
        return group.decode(local, extents, q, k, v, scale, sinks)[:, None]

    def _fixed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float,
               window: int | None, sinks: Tensor | None) -> Tensor:  # fmt: skip
        if window is not None or sinks is not None:
            what = "a sliding window" if sinks is None else "attention sinks"
            raise BadInput("prefill.driver", "graph", f"a layer of this model has {what}")
        number, local = self._place[layer]
        return self.fixed[number].attend(local, q, k, v, scale)

    def _by_row(self, group, local: int, extents: list[Extent], q: Tensor, k: Tensor, v: Tensor,
                how: dict) -> Tensor:  # fmt: skip
        def attended(row: int, e: Extent, new: slice) -> Tensor:
            keys, values = (x[row, :, new].transpose(0, 1) for x in (k, v))
            ask = Ask(local, e, q[row, :, new], keys, values, **how)
            ask.softcap = group.pool.shape.softcap
            return group.attend(ask).transpose(0, 1)

        if len(extents) == len(q) == 1 and extents[0].count == q.shape[2]:  # no padding
            part = attended(0, extents[0], slice(None))
            return part.to(q.dtype, memory_format=torch.contiguous_format)[None]
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        for row, e in enumerate(extents):
            if e.count:
                new = slice(q.shape[2] - e.count, None)
                out[row, new] = attended(row, e, new)
        return out

    def _in_one_row(self, group, local: int, extents: list[Extent], q: Tensor, k: Tensor, v: Tensor,
                    how: dict) -> Tensor:  # fmt: skip
        """q, k, v [1, heads, N, D] of the sequences' tokens -> [1, N, Hq, Dv]."""
        out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
        keys, values, end = k[0].transpose(0, 1), v[0].transpose(0, 1), 0
        if id(group) not in self._begun:
            self._begun[id(group)] = beginnings(group, extents)
        many = self._begun[id(group)] if how["sinks"] is None else None
        if many is not None:
            last = slice(out.shape[1] - many.bounds[-1], None)
            three = q[0].transpose(0, 1)[last], keys[last], values[last]
            out[0, last] = many.attend(local, *three, how["scale"])
            extents = extents[: -len(many.extents)]
        for e in extents:
            new = slice(end, end := end + e.count)
            ask = Ask(local, e, q[0, :, new], keys[new], values[new], **how)
            ask.softcap = group.pool.shape.softcap
            out[0, new] = group.attend(ask).transpose(0, 1)
        return out

    def look(
        self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, before: Tensor, scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """What queries q [Hq, P, D] that are not stored see of row `row`: all of its past and the
        first `before` [P] of its new tokens, k and v [n, H, D]. Fp32 [P, Hq, D]."""
        group, local, extents, _ = self.layers[layer]
        ask = Ask(local, extents[row], q, k, v, scale, before=before,
                  softcap=group.pool.shape.softcap, sinks=sinks)  # fmt: skip
        return group.look(ask).transpose(0, 1)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See `PagedCache.store`."""
        group, local, extents, _ = self.layers[layer]
        for row, e in enumerate(extents):
            if e.count:
                new = slice(k.shape[2] - e.count, None)
                keys, values = (x[row, :, new].transpose(0, 1) for x in (k, v))
                group.store(Ask(local, e, None, keys, values, 1.0))
