"""Scores of single tokens by layer and key/value head, where tokens are chosen and not blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvlab.cache.scores import Scorer, by_kv_head
from kvlab.core import BlockId, SeqId
from kvlab.kernel import shares_ref
from kvlab.kernel.attend_ref import visible
from kvlab.pool import BlockPool


@dataclass
class Standing:
    """How the sealed tokens of one sequence stand, in the order of its table.

    score  fp32 [L, H, n]
    steps  int16 [L, H, n], in how many steps each was scored; 0: never
    most   the largest of `steps` that there can be
    """

    score: Tensor
    steps: Tensor
    most: int = 0

    @property
    def nbytes(self) -> int:
        return self.score.nbytes + self.steps.nbytes

    @property
    def tokens(self) -> int:
        return self.score.shape[-1]

    def grown(self, tokens: int) -> Standing:
        """With tokens at the end that nobody has scored; they stand at the mean of the others."""
        new = tokens - self.tokens
        if new <= 0:
            return self
        mean = self.score.mean(-1, keepdim=True) if self.tokens else self.score.sum(-1, True)
        score = torch.cat((self.score, mean.expand(-1, -1, new)), -1)
        return Standing(score, torch.nn.functional.pad(self.steps, (0, new)), self.most)

    def moved(self, scorer: Scorer, new: Tensor, queries: int) -> Standing:
        """After one more step of so many queries, with its scores `new` [L, H, n]."""
        weights = tuple(scorer.weight(n, queries) for n in range(self.most + 1))
        if min(weights) == 1.0:
            return Standing(new, self.steps + 1, self.most + 1)
        weight = on_device(weights, new.device)[self.steps.long()]
        return Standing(torch.lerp(self.score, new, weight), self.steps + 1, self.most + 1)

    def layer(self, layer: int) -> Standing:
        """Of one layer, [1, H, n]."""
        at = slice(layer, layer + 1)
        return Standing(self.score[at], self.steps[at], self.most)

    def chosen(self, index: Tensor) -> Standing:
        """Of the tokens `index` [L, H, m] of each head."""
        return Standing(self.score.gather(-1, index), self.steps.gather(-1, index), self.most)

    def cut(self, tokens: int) -> Standing:
        """Of the first `tokens`."""
        parts = (x[..., :tokens].clone() for x in (self.score, self.steps))
        return Standing(*parts, self.most)


@lru_cache(8)
def on_device(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32; the layers of a step ask for the same, and each sending costs a wait."""
    with torch.inference_mode(False):
        return torch.tensor(numbers).to(device, non_blocking=True)


class Standings:
    """How the sealed tokens of each sequence of a layer group stand; the pool's meter hears of the
    bytes."""

    def __init__(self, pool: BlockPool):
        self.meter, self._told = pool.meter, 0
        self._none = pool.geometry.layers, pool.geometry.kv_heads, 0, pool.device
        self.of: dict[SeqId, Standing] = {}

    def __getitem__(self, seq: SeqId) -> Standing:
        if seq in self.of:
            return self.of[seq]
        *shape, device = self._none
        zero = torch.zeros(*shape, device=device)
        return Standing(zero, zero.short())

    def __setitem__(self, seq: SeqId, standing: Standing) -> None:
        self.of[seq] = standing
        self._tell()

    def fork(self, parent: SeqId, child: SeqId) -> None:
        if parent in self.of:
            self.of[child] = self.of[parent]  # never written in place

    def close(self, seq: SeqId) -> None:
        self.of.pop(seq, None)
        self._tell()

    def cut(self, seq: SeqId, tokens: int) -> None:
        """Forget all but the first `tokens` sealed ones."""
        if seq in self.of:
            self.of[seq] = self.of[seq].cut(tokens)
            self._tell()

    def choose(self, seq: SeqId, index: Tensor, tokens: int) -> None:
        """Of `tokens` only those of `index` [L, H, m] are left, in this order."""
        self[seq] = self[seq].grown(tokens).chosen(index)

    def _tell(self) -> None:
        now = self.nbytes
        self.meter.add(now - self._told)
        self._told = now

    def __deepcopy__(self, memo: dict) -> Standings:
        other = object.__new__(type(self))
        memo[id(self)] = other
        vars(other).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items()}, _told=0)
        other._tell()
        return other

    def ranked(self, seq: SeqId, tokens: int) -> Tensor:
        """Scores fp32 [L, H, tokens] of the sealed tokens of `seq`, a copy."""
        return self[seq].grown(tokens).score.clone()

    @property
    def nbytes(self) -> int:
        """Forks share what neither has changed."""
        return sum(s.nbytes for s in {id(s): s for s in self.of.values()}.values())


class TokenWatch:
    """Collects the scores of sealed tokens in a step, by layer and key/value head.

    Stands where `Watch` stands for blocks and hears the same, but the ledger is told nothing.
    scorer: what is asked of queries and keys. pool: of the layer group. standings: what was made of
    its answers so far.
    """

    active = True
    touches = False  # attention counts as use of blocks: nobody asks here

    def __init__(self, scorer: Scorer, pool: BlockPool):
        self.scorer, self.standings = scorer, Standings(pool)
        self.heads, self.block_size = pool.geometry.kv_heads, pool.block_size
        self._shares = (pool.fused or shares_ref).token_shares
        self.looking = False  # whether a step of single tokens is scored
        self.seq: SeqId = 0  # whose tokens are noted now
        self._parts: list[Tensor] = []  # of one layer
        self._step: dict[SeqId, list[Tensor]] = {}  # scores of each layer so far
        self._queries = 1

    # ---- chunks, and single tokens that are looked at

    def segment(
        self, blocks: list[BlockId], q: Tensor, k: Tensor, v: Tensor, scale: float,
        seen: Tensor | None = None,
    ) -> None:
        """See `Watch.segment`."""
        if q.shape[1] > 1 or self.looking:
            self._note(q, k, v, scale, seen)

    def _note(self, q, k, v, scale, seen=None) -> None:
        self._parts.append(self.scorer.part(q, k, v, scale=scale, block_size=1, seen=seen))

    def sealing(
        self, blocks: list[BlockId], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> None:
        """See `Watch.sealing`."""
        if blocks and (q.shape[1] > 1 or self.looking):
            last, count = min(self.scorer.queries, q.shape[1]), len(blocks) * self.block_size
            seen = visible(last, count, k.shape[0] - last, 0, True, None, k.device)
            self._note(q[:, -last:], k[:count], v[:count], scale, seen)

    def found(self, lse: Tensor) -> Tensor | None:
        """End a layer: scores fp32 [H, n] of the sealed tokens noted; None if none were.

        lse: [Hq, T] over everything that its queries saw.
        """
        parts, self._parts = self._parts, []
        if not parts:
            return None
        found = by_kv_head(self.scorer.by_head(parts, lse), self.heads)
        self._queries = lse.shape[1]
        return found.expand(self.heads, -1)

    def layer(self, lse: Tensor) -> None:
        """See `Watch.layer`."""
        found = self.found(lse)
        if found is not None:
            self._step.setdefault(self.seq, []).append(found)

    # ---- single tokens through the kernels: nothing is looked at there

    def mass(self, tables, query_heads: int) -> None:
        return None

    def decoded(self, tables, mass: None) -> None:
        """See `Watch.decoded`."""

    def captured(self) -> None:
        self.abort()

    def replayed(self, tables, mass: None) -> None:
        """See `Watch.replayed`."""

    def shares(self, blocks: list[BlockId], shares: list[float]) -> None:
        """See `Watch.shares`."""

    # ---- the end of a step

    def stand(self, seq: SeqId) -> None:
        """Let all sealed tokens of `seq` stand as this step scored them, if it did."""
        found = self._step.pop(seq, None)
        if found is not None:
            old = self.standings[seq].grown(found[0].shape[-1])
            self.standings[seq] = old.moved(self.scorer, torch.stack(found), self._queries)

    def row(
        self, seq: SeqId, layer: int, k: Tensor, v: Tensor, tokens: int, q: Tensor | None,
        lse: Tensor | None, scale: float,
    ) -> Standing:
        """How the first `tokens` of k, v [n, H, D] stand in a layer, within a step: [1, H, n].

        k, v: all that the layer has, the step's own tokens the last; q, lse: of the step, or None.
        """
        old = self.standings[seq].layer(layer).grown(tokens)
        if q is None:
            return old
        new = self.scorer.of_tokens(q, k, v, lse, scale=scale, shares=self._shares)
        new = new[:, :tokens].expand(self.heads, -1)
        return old.moved(self.scorer, new[None], q.shape[1])

    def commit(self, fresh: list[BlockId]) -> None:
        """See `Watch.commit`; `stand` takes what the step was told, sequence by sequence."""

    def abort(self) -> None:
        """Forget a step that failed, or is done."""
        self._step, self._parts = {}, []
        self.looking = False

    def forget(self, blocks: list[BlockId]) -> None:
        """See `Watch.forget`: nothing here is kept by block."""

    @property
    def nbytes(self) -> int:
        return self.standings.nbytes
