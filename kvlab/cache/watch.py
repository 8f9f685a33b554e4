"""What the policies hear of a live model: which blocks got attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.blocks import SEALED, BlockLedger
from kvlab.cache.step import Piece
from kvlab.cache.tables import DecodeTables
from kvlab.core import BlockId
from kvlab.kernel.attend_ref import block_lse
from kvlab.policy import NoEviction

OBSERVED_QUERIES = 32  # of a chunk, the last ones: SnapKV's window, https://arxiv.org/abs/2404.14469


class Watch:
    """Collects the attention share of each sealed block over the layers of a step.

    H2O (https://arxiv.org/abs/2306.14048) sums attention weights; here a block's share is
    exp(lse of the block - lse of everything), averaged over heads, layers and observed queries,
    and its score is the mean over the steps since it was sealed. Only a share above the equal one
    counts as a touch: every readable block is read at every step, so being read says nothing.

    Everything stays on the device until `commit`, which transfers once.
    """

    def __init__(self, ledger: BlockLedger, layers: int):
        self.ledger, self.layers = ledger, layers
        self.active = not isinstance(ledger.policy, NoEviction)
        self._step: dict[int, tuple[list[BlockId], Tensor]] = {}
        self._parts: list[tuple[Piece, Tensor]] = []
        self._mean: dict[BlockId, tuple[float, int]] = {}
        self._mass: Tensor | None = None  # of a decode step, [B, max_blocks], and of which blocks
        self._rows: list[list[BlockId]] = []

    # ---- chunks

    def segment(self, piece: Piece, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        """Note one sealed piece: q [Hq, T, D] of the step, k, v [N*S, H, D] of its blocks."""
        if self.active:
            size = k.shape[0] // len(piece.blocks)
            last = q[:, -OBSERVED_QUERIES:]
            self._parts.append((piece, block_lse(last, k, scale=scale, block_size=size)))

    def layer(self, lse: Tensor) -> None:
        """End a layer: `lse` [Hq, T] over everything that its queries saw."""
        for piece, part in self._parts:
            total = lse[:, -part.shape[1] :, None]
            self._add(piece, torch.exp(part - total).mean((0, 1)) / self.layers)
        self._parts.clear()

    def _add(self, piece: Piece, shares: Tensor) -> None:
        _, sofar = self._step.get(id(piece), (None, 0))
        self._step[id(piece)] = (piece.blocks, sofar + shares)

    # ---- single tokens

    def mass(self, tables: DecodeTables, query_heads: int) -> Tensor | None:
        """A buffer [B, Hq, max_blocks] for the decode kernel to leave shares in, or None."""
        if not self.active:
            return None
        shape = (tables.table.shape[0], query_heads, tables.table.shape[1])
        return torch.empty(shape, dtype=torch.float32, device=tables.table.device)

    def decoded(self, tables: DecodeTables, mass: Tensor | None) -> None:
        """One layer's shares, as the decode kernel left them."""
        if mass is not None:
            shares = mass.mean(1) / self.layers
            self._mass = shares if self._mass is None else self._mass + shares
            self._rows = tables.blocks

    # ---- the end of a step

    def commit(self) -> None:
        """Tell the ledger: scores first, then touches, the least attended first."""
        shares = self._collect()
        held = {b: s for b, s in shares.items() if self.ledger.state(b) == SEALED}
        for block, share in held.items():
            mean, count = self._mean.get(block, (0.0, 0))
            mean += (share - mean) / (count + 1)
            self._mean[block] = mean, count + 1
            self.ledger.score(block, mean)
        equal = sum(held.values()) / max(1, len(held))
        self.ledger.touch(sorted((b for b in held if held[b] > equal), key=lambda b: (held[b], b)))

    def _collect(self) -> dict[BlockId, float]:
        """Share of each block in this step, summed over the sequences that read it."""
        named = [block for blocks, _ in self._step.values() for block in blocks]
        parts = [shares for _, shares in self._step.values()]
        for row, blocks in enumerate(self._rows):
            named += blocks
            parts.append(self._mass[row, : len(blocks)])
        shares: dict[BlockId, float] = {}
        for block, share in zip(named, torch.cat(parts).tolist() if parts else ()):
            shares[block] = shares.get(block, 0.0) + share
        self.abort()
        return shares

    def abort(self) -> None:
        """Forget a step that failed, or is done."""
        self._step.clear()
        self._parts.clear()
        self._mass, self._rows = None, []

    def forget(self, blocks: list[BlockId]) -> None:
        """Blocks that left: their ids will mean other contents."""
        for block in blocks:
            self._mean.pop(block, None)
