"""Chunks of a fixed shape: what a layer does of them depends on no length that the host knows.

The past lies right-aligned in front of the chunk's own tokens: block ids of a device table, -1
where there is none, are dequantized to places that end where the chunk begins, and attention reads
its first key's place from the device. So the same launches serve any past that the table holds, and
may be captured. What is done between chunks (room, eviction, choosing, tables) is the host's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvlab.cache.choosing import ChoosingGroup
from kvlab.cache.group import LayerGroup
from kvlab.kernel import attend_sdpa
from kvlab.source import Ask, Extent, folded

ROOM = 1 << 28  # bytes of keys and values of all layers that may wait to be chosen among
LEAST = 64  # columns of a table


class Chosen(NamedTuple):
    """All layers of a chunk that are chosen among together; as `Together`, but nobody has to wait.
    """

    first: int
    stop: int
    n: int
    k: Tensor
    v: Tensor
    queries: list[Tensor]
    scales: list[float]
    lse: list[Tensor]
    there: list[None]


class Parts:
    """Who attends to fixed chunks of a cache, for the account of its workspace."""

    def __init__(self):
        self.parts: list[FixedChunk] = []

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __deepcopy__(self, memo: dict) -> Parts:
        """A copied cache makes its own."""
        return Parts()


class FixedChunk:
    """How the layers of `group` attend to a chunk of `tokens` tokens in each of `rows` sequences.

    columns: of the table of blocks, those of the past; it grows by doubling, up to `most`.
    told     int64 [rows, columns + blocks + 1]: the blocks of the past, those that the chunk fills,
             and, as two int32, between which places of the buffers its queries see
    buffers  keys and values [.., columns * S + tokens, H, D], past and chunk
    """

    def __init__(self, group: LayerGroup, rows: int, tokens: int):
        self.group, self.pool, self.rows, self.tokens = group, group.pool, rows, tokens
        self.size, self.blocks = group.block_size, tokens // group.block_size
        self.columns, self.told, self.buffers = 0, None, None
        with torch.inference_mode(False):
            asked = torch.tensor([0, tokens], dtype=torch.int32)
            self.asked = asked.to(self.pool.device)

    @property
    def most(self) -> int:
        """Columns that there may be."""
        return self.group.sources.sealed.segment_blocks - self.blocks

    @property
    def nbytes(self) -> int:
        """Of what is held here, the workspace's buffers not counted."""
        return self.asked.nbytes + (0 if self.told is None else self.told.nbytes)

    # ---- between chunks

    def fits(self, extents: list[Extent]) -> bool:
        """Whether a begun step is such a chunk, behind a past that a table may hold."""
        return all(self.suits(e) and len(self.held(e)) <= self.most for e in extents)

    def suits(self, e: Extent) -> bool:
        """The same but for the past."""
        return e.count == self.tokens and not (e.fill or e.adopted)

    def held(self, e: Extent) -> list[int]:
        """The blocks of the past that are there."""
        return [b for b in self.group.tables[e.seq].ids[: e.past // self.size] if b is not None]

    def foreseen(self, tokens: int) -> int:
        """Blocks of the past when the last chunk of a prompt of so many tokens comes."""
        return min(self.most, -(-tokens // self.size))

    def reserve(self, blocks: int) -> None:
        """Have columns for so many blocks, or as many as there may be."""
        if self.told is not None and blocks <= self.columns:
            return
        self.columns = min(max(LEAST, blocks, 2 * self.columns), self.most)
        width = self.columns + self.blocks + 1
        with torch.inference_mode(False):  # who writes later may be in another mode
            self.told = torch.full((self.rows, width), -1, device=self.pool.device)

    def prepare(self, extents: list[Extent]) -> None:
        """Tell the device of a begun step; one copy, for which nobody waits."""
        held = [self.held(e) for e in extents]
        self.reserve(max(map(len, held)))
        self.buffers = self.take()
        host = np.full(self.told.shape, -1, dtype=np.int64)
        first = self.columns * self.size
        for row, (ids, e) in enumerate(zip(held, extents)):
            host[row, self.columns - len(ids) : self.columns] = ids
            host[row, self.columns : -1] = self.sealing(e)
            span = np.array([first - len(ids) * self.size, first + self.tokens], dtype=np.int32)
            host[row, -1] = span.view(np.int64)[0]
        self.pool.sealed.coming.settle()  # a graph waits for nothing
        self._upload(torch.from_numpy(host))

    def _upload(self, host: Tensor) -> None:
        if self.told.is_cuda:
            host = host.pin_memory()  # of any size without a wait
        self.told.copy_(host, non_blocking=True)

    def sealing(self, e: Extent) -> list[int]:
        """The blocks that the layers themselves seal."""
        return e.sealing

    def take(self) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H, D] of one layer at a time, in the workspace."""
        pool, tokens = self.pool, self.columns * self.size + self.tokens
        return pool.workspace.take(tokens, pool.shape, pool.dtype, pool.device)

    def in_place(self) -> list:
        """What a capture reads, by identity and address."""
        return [id(self.told), *(x.data_ptr() for x in self.buffers)]

    def after(self, extents: list[Extent]) -> None:
        """All layers have attended, by themselves or replayed."""

    # ---- a layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, Hq, T, D], k and v [B, H, T, D] -> [B, T, Hq, D]; stores k and v."""
        pool, cut, out = self.pool, self.columns * self.size, []
        planes, (keys, values) = pool.sealed.layer(layer), self.buffers
        for row, (queries, own_k, own_v) in enumerate(zip(q, k, v)):
            table, sealing = self.told[row, : self.columns], self.told[row, self.columns : -1]
            pool.fused.gather(planes, pool.format, table, keys[:cut], values[:cut])
            keys[cut:], values[cut:] = own_k.transpose(0, 1), own_v.transpose(0, 1)
            out.append(self._attended(row, queries, keys, values, scale)[0])
            pool.fused.seal(keys[cut:], values[cut:], pool.format, planes, sealing)
        return self._joined(out, q)

    def _attended(self, row: int, q: Tensor, k: Tensor, v: Tensor, scale: float):
        span = self.told[row, -1:].view(torch.int32)
        parts = attend_sdpa.attend_span(q, k, v, self.asked, span, scale=scale)
        return folded(parts, self.pool.fused, None)

    def _joined(self, out: list[Tensor], q: Tensor) -> Tensor:
        parts = [x.transpose(0, 1).to(q.dtype) for x in out]
        return parts[0].contiguous()[None] if len(parts) == 1 else torch.stack(parts)


class FixedChoice(FixedChunk):
    """The same where each head chooses tokens: the layers leave what they have, and all are chosen
    among behind the chunk.

    buffers: [rows, L, n, H, D], those of this chunk shape alone. asked_of: by row, what the layers'
    last queries were, the logarithms of their sums, and scales.
    """

    def __init__(self, group: ChoosingGroup, rows: int, tokens: int):
        super().__init__(group, rows, tokens)
        self.reads = group.watch.scorer.reads
        self._clear()

    def _clear(self) -> None:
        self.queries, self.lse = ([[] for _ in range(self.rows)] for _ in range(2))
        self.scales: list[float] = []

    @property
    def most(self):
        g, shape = self.pool.geometry, self.pool.shape
        token = self.rows * g.layers * shape.elements * self.pool.dtype.itemsize
        return min(super().most, (ROOM // token - self.tokens) // self.size)

    @property
    def nbytes(self):
        return super().nbytes + sum(x.nbytes for x in self.buffers or ())

    def foreseen(self, tokens):
        """What a budget leaves is not known here: the table grows."""
        return 0

    def suits(self, e):
        return super().suits(e) and e.chosen is not None

    def sealing(self, e):
        return [-1] * self.blocks

    def take(self):
        g, shape = self.pool.geometry, self.pool.shape
        tokens = self.columns * self.size + self.tokens
        if self.buffers is not None and self.buffers[0].shape[2] == tokens:
            return self.buffers
        self.buffers = None  # first: both would not fit under a tight cap
        with torch.inference_mode(False):
            return tuple(torch.empty(self.rows, g.layers, tokens, g.kv_heads, width,
                                     dtype=self.pool.dtype, device=self.pool.device)
                         for width in (shape.k_width, shape.v_width))

    def attend(self, layer, q, k, v, scale):
        pool, cut, out = self.pool, self.columns * self.size, []
        if not layer:
            self._clear()
        self.scales.append(scale)
        last = 0 if self.reads is None else max(0, self.tokens - self.reads)
        few = self.reads is not None and 4 * self.reads <= self.tokens
        for row, (queries, own_k, own_v) in enumerate(zip(q, k, v)):
            pair = [x[row] for x in self.buffers]
            if not layer:
                table = self.told[row, : self.columns]
                planes, past = pool.sealed.layer(0), [x[:, :cut] for x in pair]
                pool.fused.gather(planes, pool.format, table, *past)
            keys, values = (x[layer] for x in pair)
            keys[cut:], values[cut:] = own_k.transpose(0, 1), own_v.transpose(0, 1)
            part, lse = self._attended(row, queries, keys, values, scale)
            out.append(part)
            seen = queries[:, last:]
            self.queries[row].append(seen.clone() if few else seen)
            self.lse[row].append(lse[:, last:])
        return self._joined(out, q)

    def after(self, extents):
        layers, end = self.pool.geometry.layers, self.columns * self.size
        for row, e in enumerate(extents):
            held = e.past // self.size * self.size
            k, v = (x[row][:, end - held :] for x in self.buffers)
            some = Chosen(0, layers, held + self.tokens, k, v, self.queries[row], self.scales,
                          self.lse[row], [None] * layers)  # fmt: skip
            self.group.choose(Ask(0, e, None, None, None, 1.0), some)


def standing_bytes(group: LayerGroup) -> int:
    """Bytes at most that its fixed chunks hold beside what eager ones do, tables not counted."""
    return ROOM if isinstance(group, ChoosingGroup) else 0


def fixed_chunk(group: LayerGroup, rows: int, tokens: int) -> FixedChunk:
    """For chunks of so many `tokens` in each of so many sequences; `obstacle` says where not."""
    kind = FixedChoice if isinstance(group, ChoosingGroup) else FixedChunk
    return kind(group, rows, tokens)


def obstacle(group: LayerGroup, tokens: int) -> str | None:
    """Why the layers of a chunk of so many tokens cannot do without the host, or None."""
    pool, shape, watch = group.pool, group.pool.shape, group.watch
    if pool.fused is None:
        return pool.why_plain or "without the Triton kernels blocks are read one by one"
    if tokens % group.block_size:
        return f"{tokens} tokens are no whole number of blocks of {group.block_size}"
    if not group.sources.plain:
        return "attention reads more than blocks and tails, or is listened to by what it reads"
    if pool.by_head:
        return "heads hold unlike numbers of tokens"
    if pool.apart.tokens:
        return "first tokens are kept beside their blocks"
    if group.recent.most:
        return "the newest tokens are read as computed, beside their blocks"
    if group.sources.sealed.window.rerotate:
        return "queries are turned piece by piece where positions move up"
    if shape.window is not None:
        return f"the model's own sliding window of {abs(shape.window)} tokens needs masks"
    if not attend_sdpa.spans(pool.dtype, shape.k_width, pool.device):
        return f"attention in {str(pool.dtype).removeprefix('torch.')} needs the past's length"
    if isinstance(group, ChoosingGroup):
        return _choice_obstacle(group)
    return "each layer's attention is scored by blocks" if watch.active else None


def _choice_obstacle(group: ChoosingGroup) -> str | None:
    if group.chooser.choice == "all":
        return "all layers choose alike, after the last of them"
    if group.chooser.budget.looks:
        return "the budget looks at each layer's attention"
    return None
