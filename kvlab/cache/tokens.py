"""Scores of single tokens by layer and key/value head, where tokens are chosen and not blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvlab.cache.scores import Place, Scorer
from kvlab.cache.standing import Heard, Standing, Standings
from kvlab.cache.together import Together
from kvlab.core import BlockId, CacheGeometry, SeqId
from kvlab.kernel import shares_ref
from kvlab.pool import BlockPool
from kvlab.source import Ask


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
        self.all = self.standings.all
        self._shares = (pool.fused or shares_ref).token_shares
        self.layers = tuple(range(pool.geometry.layers))  # their numbers in the model
        self.looking = False  # whether a step of single tokens is scored
        self._step: dict[SeqId, list[Tensor]] = {}  # scores of each layer so far
        self._heard: dict[SeqId, tuple[Heard, int]] = {}  # and the tokens seen then
        self._lazy: dict[SeqId, Tensor] = {}
        self._tails: dict[SeqId, list[Standing]] = {}  # of the layers that have chosen so far

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
        return self._of_layer(ask.layer, ask.q, k, v, lse, there, seen, how)[:, :tokens]

    def _of_layer(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, there: Tensor | None,
        seen: int, how: dict,
    ) -> Tensor:
        place = self.scorer.place = Place(self.layers[layer], seen)
        if there is None:
            return self.scorer.of_tokens(q, k, v, lse, **how).expand(self.heads, -1)
        found = k.new_full((self.heads, len(k)), -torch.inf, dtype=torch.float32)
        group = q.shape[0] // self.heads
        for head in range(self.heads):
            at = there[:, head].nonzero()[:, 0]
            mine, own = slice(head * group, (head + 1) * group), slice(head, head + 1)
            self.scorer.place = place._replace(head=head)
            found[head, at] = self.scorer.of_tokens(
                q[mine], k[at, own], v[at, own], lse[mine], **how)[0]
        return found

    def scores_of(self, some: Together, tokens: int, seen: int) -> Tensor:
        """The same of layers that attended one after another: fp32 [L, H, tokens]."""
        alike = len(set(some.scales)) == 1
        if self.scorer.layered and alike and some.there[0] is None:
            how = {"scale": some.scales[0], "shares": self._shares}
            asked = torch.stack(some.queries), some.k, some.v, torch.stack(some.lse)
            found = self.scorer.of_tokens(*asked, **how)[..., :tokens]
            return found.expand(-1, self.heads, -1)
        asked = zip(some.queries, some.k, some.v, some.lse, some.there)
        hows = ({"scale": scale, "shares": self._shares} for scale in some.scales)
        return torch.stack([self._of_layer(layer, *one, seen, how)[:, :tokens]
                            for layer, (one, how) in enumerate(zip(asked, hows), some.first)])

    def note(self, seq: SeqId, scores: Tensor, queries: int, behind: int, seen: int) -> None:
        """Hear of one layer of a step, in order; `stand` takes all of them over. behind: tokens
        behind the sealed ones; seen: of the sequence, this step's `queries` included."""
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

    def notice(self, seq: SeqId, lazy: Tensor) -> None:
        """What a layer gave the window of its attention in this step, see `lazy.window_share`."""
        self._lazy[seq] = lazy

    # ---- the end of a step

    def stand(self, seq: SeqId) -> None:
        """Let all sealed tokens of `seq` stand as this step scored them, if it did."""
        if seq in self._lazy:
            self.standings.lazy[seq] = float(self._lazy.pop(seq))
        found = self._step.pop(seq, None)
        if found is not None:
            tokens, (step, seen) = found[0].shape[-1], self._heard[seq]
            sealed = tokens - (step.behind if self.all else 0)
            step = step._replace(behind=step.behind - (tokens - sealed))
            old = self.standings.whole(seq, tokens)
            self.standings.part(seq, old.moved(self.scorer, torch.stack(found), step), sealed)
            self.standings.seen[seq] = seen

    def row(
        self, seq: SeqId, layers: slice, new: Tensor | None, tokens: int, queries: int, behind: int
    ) -> Standing:
        """How `tokens` tokens, with others `behind` them, stand in some layers, within a step that
        gives them the scores `new` [L, H, n], or none: [L, H, tokens]. Where all are scored,
        `chose` says later how those behind them stand."""
        all = tokens + behind * self.all
        now = self.standings.whole(seq, all, layers)
        if new is not None:
            step = Heard(queries, queries, behind - (all - tokens))
            now = now.moved(self.scorer, new, step)
        self._tails.setdefault(seq, []).append(now.cut(tokens, all))
        return now.cut(tokens)

    def chose(self, seq: SeqId, rows: list[Standing], seen: int) -> None:
        """All layers have chosen; `rows`: how what stays stands in each."""
        pairs = zip(rows, self._tails.pop(seq))
        whole = [row.followed(tail) for row, tail in pairs]
        score, steps = (torch.cat([getattr(r, n) for r in whole]) for n in ("score", "steps"))
        self.standings.part(seq, Standing(score, steps, rows[0].most), rows[0].tokens)
        self.standings.seen[seq] = seen

    def commit(self, fresh: list[BlockId]) -> None:
        """See `Watch.commit`; `stand` takes what the step was told, sequence by sequence."""

    def abort(self) -> None:
        """Forget a step that failed, or is done."""
        self._step, self._heard, self._lazy, self._tails = {}, {}, {}, {}
        self.looking = False

    def forget(self, blocks: list[BlockId]) -> None:
        """See `Watch.forget`: nothing here is kept by block."""

    @property
    def nbytes(self) -> int:
        return self.standings.nbytes
