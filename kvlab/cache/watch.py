"""What the policies hear of a live model: which blocks got attention."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.blocks import SEALED, BlockLedger
from kvlab.cache import scores
from kvlab.core import BlockId
from kvlab.kernel.attend_ref import visible
from kvlab.source import DecodeTables


class Watch:
    """Collects what the policy observes (`cache/scores.py`) of each sealed block in a step.

    A block's score is the mean over layers and, as the scorer weighs them, over steps. Only a score
    above the equal one counts as a touch: every readable block is read at every step, so being read
    says nothing. The equal share is that of blocks which nobody pins: a sink takes half of all
    attention, and measured by it no other block would ever be used. Everything stays on the device
    until `commit`, which transfers once.
    """

    def __init__(self, ledger: BlockLedger, layers: int, block_size: int):
        self.ledger, self.layers, self.block_size = ledger, layers, block_size
        observes = ledger.policy.observes
        self.active = observes is not None and ledger.policy.evicts
        self.scorer = scores.scorer_of(observes) if self.active else None
        self.touches = True  # whether attention counts as use
        self._blocks: list[BlockId] = []  # of one layer's parts
        self._parts: list[Tensor] = []
        self._step: dict[tuple[BlockId, ...], Tensor] = {}
        self._queries = 1
        self._scored: dict[BlockId, int] = {}  # in how many steps
        self._told: dict[BlockId, float] = {}
        self._mass: Tensor | None = None  # of decode steps, [B, max_blocks], and of which blocks
        self._rows: list[list[BlockId]] = []

    # ---- chunks

    def segment(
        self, blocks: list[BlockId], q: Tensor, k: Tensor, v: Tensor, scale: float,
        seen: Tensor | None = None,
    ) -> None:
        """Note sealed blocks: q [Hq, T, D] of the step, k, v [N*S, H, D] of the `blocks`.

        seen: bool [T, N*S] where the queries do not see all of it.
        """
        if not self.active or (q.shape[1] == 1 and not self.scorer.decodes):
            return
        self._blocks += blocks
        self._parts.append(
            self.scorer.part(q, k, v, scale=scale, block_size=self.block_size, seen=seen)
        )

    def sealing(
        self, blocks: list[BlockId], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> None:
        """Note the blocks that the step itself fills, which a query sees up to its own token.

        q [Hq, T, D]; k, v [n, H, D]: the open tail and the step's tokens.
        """
        if blocks and self.active:
            last, count = min(self.scorer.queries, q.shape[1]), len(blocks) * self.block_size
            seen = visible(last, count, k.shape[0] - last, 0, True, None, k.device)
            self.segment(blocks, q[:, -last:], k[:count], v[:count], scale, seen)

    def layer(self, lse: Tensor) -> None:
        """End a layer: `lse` [Hq, T] over everything that its queries saw."""
        if self._parts:
            key = tuple(self._blocks)
            step = self.scorer.scores(self._parts, lse) / self.layers
            self._step[key] = self._step[key] + step if key in self._step else step
            self._queries = lse.shape[1]
        self._blocks, self._parts = [], []

    # ---- single tokens

    def mass(self, tables: DecodeTables, query_heads: int) -> Tensor | None:
        """A buffer [B, Hq, max_blocks] for the decode kernel to leave shares in, or None."""
        if not (self.active and self.scorer.decodes):
            return None
        shape = (tables.table.shape[0], query_heads, tables.table.shape[1])
        return torch.empty(shape, dtype=torch.float32, device=tables.table.device)

    def decoded(self, tables: DecodeTables, mass: Tensor | None) -> None:
        """One layer's shares, as the decode kernel left them."""
        if mass is not None:
            shares = mass.mean(1) / self.layers
            self._mass = shares if self._mass is None else self._mass + shares
            self._rows = tables.blocks
            self._queries = 1

    def captured(self) -> Tensor | None:
        """Where a step that was captured, not run, leaves its shares; forgets that step."""
        mass = self._mass
        self.abort()
        return mass

    def replayed(self, tables: DecodeTables, mass: Tensor | None) -> None:
        """A captured step has run again: `mass` is what `captured` gave."""
        if mass is not None:
            self._mass, self._rows, self._queries = mass, tables.blocks, 1

    def shares(self, blocks: list[BlockId], shares: list[float]) -> None:
        """What stands for the attention of `blocks` where a token reads a choice only."""
        if self.active and self.scorer.decodes:
            for block, share in zip(blocks, shares):
                self._told[block] = self._told.get(block, 0.0) + share
            self._queries = 1

    # ---- the end of a step

    def commit(self, fresh: list[BlockId]) -> None:
        """Tell the ledger: scores first, then touches, the least attended first.

        fresh: blocks sealed in this step. One that nobody scored starts from the mean of the
        others: with nothing it would be the first to leave.
        """
        if not self.active:
            return
        found = self._collect()
        held = {b: s for b, s in found.items() if self.ledger.state(b) == SEALED}
        for block, value in held.items():
            self.ledger.score(block, self._moved(block, value))
        rivals = {b: s for b, s in held.items() if not self.ledger.meta(b).pins}
        equal = sum(rivals.values()) / max(1, len(rivals))
        for block in fresh:
            if block not in held:
                self.ledger.score(block, equal)
        if not self.touches:
            return
        above = [b for b in rivals if rivals[b] > equal and b not in fresh]
        self.ledger.touch(sorted(above, key=lambda b: (rivals[b], b)))

    def _moved(self, block: BlockId, value: float) -> float:
        """The block's score after one more step."""
        count = self._scored.get(block, 0)
        self._scored[block] = count + 1
        old = self.ledger.meta(block).score
        return old + (value - old) * self.scorer.weight(count, self._queries)

    def _collect(self) -> dict[BlockId, float]:
        """What each block got in this step, summed over the sequences that read it."""
        named = [block for blocks in self._step for block in blocks]
        parts = list(self._step.values())
        for row, blocks in enumerate(self._rows):
            named += blocks
            parts.append(self._mass[row, : len(blocks)])
        found = self._told
        for block, value in zip(named, torch.cat(parts).tolist() if parts else ()):
            found[block] = found.get(block, 0.0) + value
        self.abort()
        return found

    def abort(self) -> None:
        """Forget a step that failed, or is done."""
        self._step = {}
        self._blocks, self._parts = [], []
        self._mass, self._rows, self._told = None, [], {}

    nbytes = 0  # of what is kept of single tokens

    def forget(self, blocks: list[BlockId]) -> None:
        """Blocks that left: their ids will mean other contents."""
        for block in blocks:
            self._scored.pop(block, None)
