"""How tokens stand that are chosen among: their scores by layer and key/value head, over steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kvlab.cache.heads import Kept
from kvlab.cache.scores import Scorer
from kvlab.core import SeqId
from kvlab.pool import BlockPool


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

    def of_layers(self, layers: slice) -> Standing:
        """Of some layers."""
        return Standing(self.score[layers], self.steps[layers], self.most)

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

    def cut(self, start: int, end: int | None = None) -> Standing:
        """Of the tokens [start, end); of the first `start` where no end is given."""
        part = slice(start) if end is None else slice(start, end)
        parts = (x[..., part].clone() for x in (self.score, self.steps))
        return Standing(*parts, self.most)

    def followed(self, tail: Standing | None) -> Standing:
        """With those of `tail` behind them."""
        if tail is None:
            return self
        parts = (torch.cat((x, y), -1) for x, y in
                 ((self.score, tail.score), (self.steps, tail.steps)))  # fmt: skip
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
        self.all = counts is not None  # whether tokens behind the sealed ones are scored, too
        self.of: dict[SeqId, Standing] = {}
        # of the tokens behind the sealed ones, of a scorer that counts who saw them
        self.tails: dict[SeqId, Standing] = {}
        self.seen: dict[SeqId, int] = {}  # tokens of each sequence when it was last scored
        self.over: set[SeqId] = set()  # whose context is over, where a policy waits for that
        self.lazy: dict[SeqId, float] = {}  # attention to the window, where the budget looks at it

    def __getitem__(self, seq: SeqId) -> Standing:
        if seq in self.of:
            return self.of[seq]
        *shape, device = self._none
        zero = torch.zeros(*shape, device=device)
        return Standing(zero, zero.to(self._counts))

    def __setitem__(self, seq: SeqId, standing: Standing) -> None:
        self.of[seq] = standing
        self._tell()

    def whole(self, seq: SeqId, tokens: int = 0, layers: slice = slice(None)) -> Standing:
        """Of at least `tokens` tokens, sealed or not; see `Standing.grown`. Of some layers, or all.
        """
        of, tail = self[seq], self.tails.get(seq)
        of, tail = of.of_layers(layers), tail and tail.of_layers(layers)
        return of.followed(tail).grown(tokens)

    def part(self, seq: SeqId, whole: Standing, sealed: int) -> None:
        """`seq` stands like this, of whose tokens so many are sealed."""
        self.tails.pop(seq, None)
        if whole.tokens > sealed:
            self.tails[seq] = whole.cut(sealed, whole.tokens)
            whole = whole.cut(sealed)
        self[seq] = whole

    def fork(self, parent: SeqId, child: SeqId) -> None:
        if parent in self.tails:
            self.tails[child] = self.tails[parent]
        if parent in self.of:
            self.of[child] = self.of[parent]  # never written in place
            self.seen[child] = self.seen.get(parent, 0)
        if parent in self.over:
            self.over.add(child)
        if parent in self.lazy:
            self.lazy[child] = self.lazy[parent]

    def close(self, seq: SeqId) -> None:
        self.of.pop(seq, None)
        self.tails.pop(seq, None)
        self.seen.pop(seq, None)
        self.over.discard(seq)
        self.lazy.pop(seq, None)
        self._tell()

    def cut(self, seq: SeqId, sealed: int, tokens: int, seen: int) -> None:
        """Forget all but the first `tokens`, of which so many are sealed; seen: of the sequence."""
        if seq in self.of:
            self.part(seq, self.whole(seq).cut(tokens if self.all else sealed), sealed)
            self.seen[seq] = min(seen, self.seen.get(seq, 0))

    def choose(self, seq: SeqId, kept: Kept, tokens: int, size: int) -> None:
        """Of `tokens` only those `kept`, in blocks of `size`, are left, in their order."""
        whole = self.whole(seq, tokens)
        chosen = whole.cut(tokens).chosen(kept, size)
        tail = whole.cut(tokens, whole.tokens) if whole.tokens > tokens else None
        self.part(seq, chosen.followed(tail), chosen.tokens)

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
        return self.whole(seq, tokens).score[..., :tokens].clone()

    @property
    def nbytes(self) -> int:
        """Forks share what neither has changed."""
        held = {id(s): s for s in (*self.of.values(), *self.tails.values())}
        return sum(s.nbytes for s in held.values())
