"""One contract for all that attention may read.

Attention is one loop over sources, for chunks and for decoded tokens alike. Each gives parts, a
part gives an output and the natural log of its sum of exponentials (lse), and parts over disjoint
keys merge exactly (online softmax, https://arxiv.org/abs/1805.02867).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvlab.core import BlockId, SeqId
from kvlab.kernel import attend_ref, attend_sdpa
from kvlab.kernel.attend_ref import Partial
from kvlab.source.step import Extent
from kvlab.source.sum import Sum
from kvlab.source.tables import DecodeTables


@dataclass(slots=True)
class Ask:
    """What one layer of a step asks of the past of one sequence.

    layer   place of the layer in its group
    extent  what the step does to the sequence
    q       [Hq, T, D]
    k, v    [T, H, D], the step's own tokens, which are not stored yet
    scale   of the logits
    window  the model's own sliding window in tokens, None without
    before  [Hq's T]: of the step's own tokens, how many each query sees; None: those up to its own.
            Given for queries of padding, which stand for no token and of which no policy hears.
    softcap of the logits, None without; sinks: logits [Hq] beside them, see `with_sinks`
    """

    layer: int
    extent: Extent
    q: Tensor
    k: Tensor | None
    v: Tensor | None
    scale: float
    window: int | None = None
    before: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Part(NamedTuple):
    """Keys and values that are read at a time, [n, H, D]; valid until the next part is asked for.

    start   position of the first key, where the model has a sliding window
    bias    fp32 [n, H], natural log, added to the logits: how many tokens each key stands for
    queries [Hq, T, D] if these keys meet others than the step's own (positions moved)
    causal  the keys are the step's own tokens, of which a query sees those up to its own
    seen    bool [T, n] in the place of the other rules
    blocks  the sealed blocks that these keys are, of which policies hear; none for other keys
    """

    keys: Tensor
    values: Tensor
    start: int = 0
    bias: Tensor | None = None
    queries: Tensor | None = None
    causal: bool = False
    seen: Tensor | None = None
    blocks: Iterable[BlockId] = ()

    def attend(self, ask: Ask) -> Partial:
        """out [Hq, T, D] and lse fp32 [Hq, T]; or several of each, see `attend_parts`."""
        q = ask.q if self.queries is None else self.queries
        pair, how = (self.keys, self.values), {"scale": ask.scale, "softcap": ask.softcap}
        if self.seen is not None:
            return attend_ref.attend(q, *pair, seen=self.seen, **how)
        if self.bias is not None:
            return attend_sdpa.attend(q, *pair, bias=self.bias, **how)
        span = {"window": ask.window, "q_start": ask.extent.past, "k_start": self.start}
        if self.causal:
            return attend_sdpa.attend(q, *pair, causal=True, **span, **how)
        return attend_sdpa.attend_parts(q, *pair, **span, **how)


class Token(NamedTuple):
    """What one layer of a step of one token in every row asks, through the kernels.

    q       [B, Hq, D]
    tables  sealed blocks and open places of the rows, on the device
    watch   who gives a buffer for each block's share of attention; None if nobody listens
    new     k, v [B, H, D] of the step's own tokens, which whoever reads the open tails stores on
            the way; None where they are stored already

    `extents`, by row, is for sources that look at the host; one that may be captured must not.
    """

    layer: int
    extents: list[Extent]
    q: Tensor
    scale: float
    tables: DecodeTables
    watch: object = None
    new: tuple[Tensor, Tensor] | None = None

    def row(self, number: int) -> Ask:
        """What one row asks."""
        q = self.q[number, :, None]
        return Ask(self.layer, self.extents[number], q, None, None, self.scale)


class Read(NamedTuple):
    """A part of a decode step: out [B, Hq, D], lse fp32 [B, Hq], -inf where a row read nothing.

    mass: [B, Hq, max_blocks], shares of attention among the blocks of `Token.tables`, all of which
    were read; merging makes them shares of all.
    """

    out: Tensor
    lse: Tensor
    mass: Tensor | None = None


class Source:
    """Something that attention may read in the layers of one group; this one is empty.

    A member writes `parts`, and what else it needs. The cache calls `open`, `fork`, `crop` and
    `close` for every sequence, `begin` and then `commit` or `abort` for every sequence of a step.

    obstacle: why a decode step that reads this source cannot be captured, "" if it can. It can
    where `decode` waits for nothing and depends on nothing but tensors that stay in place.
    """

    obstacle = "a source of the past looks at the host"

    # ---- the life of a sequence

    def open(self, seq: SeqId) -> None:
        """A sequence without tokens."""

    def fork(self, parent: SeqId, child: SeqId) -> None:
        """`child`, which is open, gets what its parent has; sealed contents are shared."""

    def crop(self, seq: SeqId, length: int) -> None:
        """Only the first `length` tokens stay."""

    def close(self, seq: SeqId) -> None:
        """Give everything back."""

    # ---- a step

    def begin(self, e: Extent) -> None:
        """Take the memory that the step needs; `commit` must not fail."""

    def sealing(self, layer: int, e: Extent, k: Tensor) -> None:
        """The keys [n*S, H, D] of the blocks that a chunk fills, before they are quantized."""

    def commit(self, e: Extent) -> None:
        """The step's blocks are in the table; the open place of a full one is still there."""

    def abort(self, e: Extent) -> None:
        """The step is undone."""

    def tell(self, watch) -> list[tuple[SeqId, int]]:
        """End a step: let `watch.shares` hear what was read; blocks (sequence, index) that should
        come back from host memory."""
        return []

    # ---- a chunk

    def parts(self, ask: Ask) -> Iterator[Part]:
        """What a query of `ask` may see here. Whoever has to fetch starts the next fetch before it
        yields, so that it runs beside the attention."""
        return iter(())

    def observe(self, ask: Ask, lse: Tensor) -> None:
        """After a layer: `lse` [Hq, T] over everything that its queries saw."""

    # ---- one token in every row, through the kernels

    def widen(self, rows: int, blocks: int) -> None:
        """Make room ahead for steps of so many rows, and blocks of a row: what `prepare` writes to
        stays where it is until a step is larger."""

    def prepare(self, extents: list[Extent], rows: int) -> None:
        """Between steps: write in place what `decode` will read on the device.

        rows: of the step's tensors; those behind the extents are of no sequence.
        """

    def in_place(self) -> list:
        """What `prepare` writes to; a captured step ends with any of these objects."""
        return []

    def decode(self, ask: Token) -> list[Read]:
        """What the rows read here, from `parts` unless a member knows a shorter way."""
        rows = [self._row(ask.row(number)) for number in range(len(ask.extents))]
        if not any(rows):
            return []
        nothing = ask.q.new_zeros(ask.q.shape[1:], dtype=torch.float32)
        nothing = nothing[:, None], nothing.new_full((len(nothing), 1), -torch.inf)
        out, lse = zip(*(row or nothing for row in rows))
        return [Read(torch.stack(out)[:, :, 0].to(ask.q.dtype), torch.stack(lse)[:, :, 0])]

    def _row(self, ask: Ask) -> Partial | None:
        total, found = Sum(None), False
        for part in self.parts(ask):
            total.add(part.attend(ask))
            found = True
        return total.result() if found else None

    # ---- accounts

    nbytes = 0  # of the past on the device; the pool's meter knows of them
    host_nbytes = 0  # of the past in host memory
    digest_nbytes = 0  # of `nbytes`, what a choice goes by
    digest_used_nbytes = 0  # of those, what stands for blocks that are there
    workspace_nbytes = 0  # on the device, whatever the number of tokens: buffers, decode tables

    @property
    def capturable(self) -> bool:
        """Whether a decode step that reads this source may be captured."""
        return not self.obstacle


def overriding(sources: Iterable[Source], method: str) -> list[Source]:
    """Those that do something there: most steps pass by the others without a call."""
    empty = getattr(Source, method)
    return [source for source in sources if getattr(type(source), method) is not empty]
