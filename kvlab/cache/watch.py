"""What the policies hear of a live model: which blocks got attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.blocks import SEALED, BlockLedger
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
    """

    def __init__(self, ledger: BlockLedger, layers: int):
        self.ledger, self.layers = ledger, layers
        self.active = not isinstance(ledger.policy, NoEviction)
        self._step: dict[BlockId, float] = {}
        self._parts: list[tuple[list[BlockId], Tensor]] = []
        self._mean: dict[BlockId, tuple[float, int]] = {}

    def segment(self, blocks: list[BlockId], q: Tensor, k: Tensor, scale: float) -> None:
        """Note one sealed segment: q [Hq, T, D] of the step, k [N*S, H, D] of its `blocks`."""
        if self.active:
            size = k.shape[0] // len(blocks)
            last = q[:, -OBSERVED_QUERIES:]
            self._parts.append((blocks, block_lse(last, k, scale=scale, block_size=size)))

    def layer(self, lse: Tensor) -> None:
        """End a layer: `lse` [Hq, T] over everything that its queries saw."""
        for blocks, part in self._parts:
            total = lse[:, -part.shape[1] :, None]
            shares = torch.exp(part - total).mean((0, 1)).tolist()
            for block, share in zip(blocks, shares):
                self._step[block] = self._step.get(block, 0.0) + share / self.layers
        self._parts.clear()

    def commit(self) -> None:
        """Tell the ledger: scores first, then touches, the least attended first."""
        shares, self._step = self._step, {}
        held = {b: s for b, s in shares.items() if self.ledger.state(b) == SEALED}
        for block, share in held.items():
            mean, count = self._mean.get(block, (0.0, 0))
            mean += (share - mean) / (count + 1)
            self._mean[block] = mean, count + 1
            self.ledger.score(block, mean)
        equal = sum(held.values()) / max(1, len(held))
        self.ledger.touch(sorted((b for b in held if held[b] > equal), key=lambda b: (held[b], b)))

    def abort(self) -> None:
        """Forget a step that failed."""
        self._step.clear()
        self._parts.clear()

    def forget(self, blocks: list[BlockId]) -> None:
        """Blocks that left: their ids will mean other contents."""
        for block in blocks:
            self._mean.pop(block, None)
