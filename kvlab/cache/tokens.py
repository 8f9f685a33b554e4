"""Scores of single tokens by layer and key/value head, where tokens are chosen and not blocks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.cache.heads import Kept
from kvlab.cache.scores import Place, Scorer
from kvlab.core import BlockId, CacheGeometry, SeqId
from kvlab.kernel import shares_ref
from kvlab.pool import BlockPool
from kvlab.source import Ask


class Heard(NamedTuple):
    """What a step's scores are of: `looked` queries at the end, which stand for `queries`, the
    tokens decoded since the last look among them; `behind`: tokens behind the sealed ones."""

    looked: int
    queries: int
    behind: int


@dataclass
class Standing:
    """How the sealed tokens of one sequence stand, in the order of its table.

    score  fp32 [L, H, n], -inf where a head has no such token
    steps  int16 [L, H, n], in how many steps each was scored; 0: never. Of a scorer that `joins`,
           what it counts, in its dtype
    most   the largest of the int16 `steps` that there can be
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
        there = self.score > -torch.inf
        mean = torch.where(there, self.score, 0).sum(-1, keepdim=True)
        mean = mean / there.sum(-1, keepdim=True).clamp_min(1)
        score = torch.cat((self.score, mean.expand(-1, -1, new)), -1)
        return Standing(score, F.pad(self.steps, (0, new)), self.most)

    def moved(self, scorer: Scorer, new: Tensor, step: Heard) -> Standing:
        """After one more step, with its scores `new` [L, H, n]."""
        if scorer.joins is not None:
            return self._joined(scorer, new, step)
        weights = tuple(scorer.weight(n, step.looked) for n in range(self.most + 1))
        if min(weights) < 1.0:
            weight = on_device(weights, new.device)[self.steps.long()]
            moved = torch.lerp(self.score, new, weight)
            new = torch.where(self.score > -torch.inf, moved, self.score)
        return Standing(new, self.steps + 1, self.most + 1)

    def _joined(self, scorer: Scorer, new: Tensor, step: Heard) -> Standing:
        place = torch.arange(self.tokens, device=new.device)
        saw = (self.tokens + step.behind - place).clamp_max(step.queries)
        if step.looked < step.queries:
            new = new * (saw / step.looked)
        score, count = scorer.joined(self.score, self.steps, new, saw, step.queries)
        there = self.score > -torch.inf
        return Standing(torch.where(there, score, self.score), torch.where(there, count, 0))

    def layer(self, layer: int) -> Standing:
        """Of one layer, [1, H, n]."""
        at = slice(layer, layer + 1)
        return Standing(self.score[at], self.steps[at], self.most)

    def chosen(self, kept: Kept, size: int) -> Standing:
        """Of the tokens that each head keeps, in blocks of `size`."""
        score, steps = (x.gather(-1, kept.index) for x in (self.score, self.steps))
        if kept.counts is not None:
            own = size * torch.tensor(kept.counts, device=score.device)[..., None]
            at = torch.arange(score.shape[-1], device=score.device)
            score = score.masked_fill(at >= own, -torch.inf)
        return Standing(score, steps, self.most)

    def padded(self, tokens: int) -> Standing:
        """With tokens at the end that no head has."""
        new = tokens - self.tokens
        return Standing(F.pad(self.score, (0, new), value=-torch.inf), F.pad(self.steps, (0, new)),
                        self.most)  # fmt: skip

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

    def __init__(self, pool: BlockPool, counts: torch.dtype | None = None):
        """counts: dtype of `Standing.steps`."""
        self.meter, self._told = pool.meter, 0
        self._none = pool.geometry.layers, pool.geometry.kv_heads, 0, pool.device
        self._counts = counts or torch.int16
        self.of: dict[SeqId, Standing] = {}
        self.seen: dict[SeqId, int] = {}  # tokens of each sequence when it was last scored
        self.over: set[SeqId] = set()  # whose context is over, where a policy waits for that

    def __getitem__(self, seq: SeqId) -> Standing:
        if seq in self.of:
            return self.of[seq]
        *shape, device = self._none
        zero = torch.zeros(*shape, device=device)
        return Standing(zero, zero.to(self._counts))

    def __setitem__(self, seq: SeqId, standing: Standing) -> None:
        self.of[seq] = standing
        self._tell()

    def fork(self, parent: SeqId, child: SeqId) -> None:
        if parent in self.of:
            self.of[child] = self.of[parent]  # never written in place
            self.seen[child] = self.seen.get(parent, 0)
        if parent in self.over:
            self.over.add(child)

    def close(self, seq: SeqId) -> None:
        self.of.pop(seq, None)
        self.seen.pop(seq, None)
        self.over.discard(seq)
        self._tell()

    def cut(self, seq: SeqId, tokens: int) -> None:
        """Forget all but the first `tokens` sealed ones."""
        if seq in self.of:
            self.of[seq] = self.of[seq].cut(tokens)
            self._tell()

    def choose(self, seq: SeqId, kept: Kept, tokens: int, size: int) -> None:
        """Of `tokens` only those `kept`, in blocks of `size`, are left, in their order."""
        self[seq] = self[seq].grown(tokens).chosen(kept, size)

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
        self.scorer, self.standings = scorer, Standings(pool, scorer.joins)
        self.heads = pool.geometry.kv_heads
        self._shares = (pool.fused or shares_ref).token_shares
        self.layers = tuple(range(pool.geometry.layers))  # their numbers in the model
        self.looking = False  # whether a step of single tokens is scored
        self._step: dict[SeqId, list[Tensor]] = {}  # scores of each layer so far
        self._heard: dict[SeqId, tuple[Heard, int]] = {}  # and the tokens seen then

    def of_layers(self, layers: Sequence[int], g: CacheGeometry) -> None:
        """Their numbers in a model of the shapes `g`. Raises `BadInput`, see `Scorer.fit`."""
        self.layers = tuple(layers)
        self.scorer.fit(g.layers, g.query_heads, g.shapes[layers[0]].k_width)

    # ---- chunks, and single tokens that are looked at

    def scores(
        self, ask: Ask, lse: Tensor, k: Tensor, v: Tensor, tokens: int, seen: int,
        there: Tensor | None = None,
    ) -> Tensor:
        """Of a layer's tokens k, v [n, H, D], the step's own the last, how the first `tokens` did
        in this step: fp32 [H, tokens]. lse: [Hq, T] over everything that its queries saw. seen: of
        the sequence, by the end of the step. there: bool [n, H], which of them each head has, -inf
        for the others; None: all."""
        how = {"scale": ask.scale, "shares": self._shares}
        place = self.scorer.place = Place(self.layers[ask.layer], seen)
        if there is None:
            found = self.scorer.of_tokens(ask.q, k, v, lse, **how)
            return found[:, :tokens].expand(self.heads, -1)
        found = k.new_full((self.heads, len(k)), -torch.inf, dtype=torch.float32)
        group = ask.q.shape[0] // self.heads
        for head in range(self.heads):
            at = there[:, head].nonzero()[:, 0]
            mine, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
            self.scorer.place = place._replace(head=head)
            found[head, at] = self.scorer.of_tokens(
                ask.q[mine], k[at, own], v[at, own], lse[mine], **how)[0]
        return found[:, :tokens]

    def note(self, seq: SeqId, scores: Tensor, queries: int, behind: int, seen: int) -> None:
        """Hear of one layer of a step, in order; `stand` takes all of them over. behind: tokens
        behind those that are scored; seen: of the sequence, this step's `queries` included."""
        self._step.setdefault(seq, []).append(scores)
        since = seen - self.standings.seen.get(seq, 0) if queries == 1 else queries
        self._heard[seq] = Heard(queries, max(queries, since), behind), seen

    def sealing(self, blocks, q, k, v, scale) -> None:
        """See `Watch.sealing`: all tokens of a layer are scored at once, by `scores`."""

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
            old, (step, seen) = self.standings[seq].grown(found[0].shape[-1]), self._heard[seq]
            self.standings[seq] = old.moved(self.scorer, torch.stack(found), step)
            self.standings.seen[seq] = seen

    def row(
        self, seq: SeqId, layer: int, new: Tensor | None, tokens: int, queries: int, behind: int
    ) -> Standing:
        """How `tokens` tokens, with others `behind` them, stand in a layer, within a step that
        gives them the scores `new` [H, tokens], or none: [1, H, tokens]."""
        old = self.standings[seq].layer(layer).grown(tokens)
        step = Heard(queries, queries, behind)
        return old if new is None else old.moved(self.scorer, new[None], step)

    def commit(self, fresh: list[BlockId]) -> None:
        """See `Watch.commit`; `stand` takes what the step was told, sequence by sequence."""

    def abort(self) -> None:
        """Forget a step that failed, or is done."""
        self._step, self._heard = {}, {}
        self.looking = False

    def forget(self, blocks: list[BlockId]) -> None:
        """See `Watch.forget`: nothing here is kept by block."""

    @property
    def nbytes(self) -> int:
        return self.standings.nbytes
