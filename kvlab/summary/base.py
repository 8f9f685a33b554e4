"""What all summaries share: entries, the queries they answer, how many entries there may be.

An entry is one more key and value that attention reads, with a bias on its logit: the natural log
of how many tokens it stands for. A token is an entry of bias 0, so entries are summarized again
with the same code.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvlab import kinds
from kvlab.core import BadInput

SEGMENT_ENTRIES = 1024  # summarized together; a longer past is cut, so that the work is bounded
STAND_INS = 128         # keys that take the place of queries which nobody observed
LARGEST_LOGIT = 1e15    # beyond it every softmax is a choice of one, and squares would overflow


class Entries(NamedTuple):
    """k, v [n, H, D]; bias fp32 [n, H], natural log, added to the logits of the KV head."""

    k: Tensor
    v: Tensor
    bias: Tensor

    @property
    def count(self) -> int:
        return self.k.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self)

    def part(self, start: int, stop: int) -> Entries:
        """Entries [start, stop), views."""
        return Entries(*(x[start:stop] for x in self))

    def to(self, dtype: torch.dtype) -> Entries:
        """Keys and values in `dtype`; the bias stays fp32."""
        return Entries(self.k.to(dtype), self.v.to(dtype), self.bias)


class Queries(NamedTuple):
    """What attention asks of each KV head, by all query heads of its group.

    q: fp32 [H, m, D], the softmax scale multiplied in. lse: fp32 [H, m], natural log of the sum of
    exponentials over everything that each query saw.
    """

    q: Tensor
    lse: Tensor


def tokens(k: Tensor, v: Tensor) -> Entries:
    """Plain tokens, k and v [n, H, D], as entries that stand for themselves."""
    return Entries(k, v, torch.zeros(k.shape[:2], device=k.device))


def concat(parts: list[Entries]) -> Entries:
    """All entries of `parts`, in the dtype of the last."""
    return Entries(*map(torch.cat, zip(*(p.to(parts[-1].k.dtype) for p in parts))))


@kinds.members("summary")
class NoSummary:
    """Nothing: evicted blocks leave a hole."""

    name = "none"
    makes = False  # whether evicted blocks leave entries behind
    stands = False  # whether anything stands for tokens that are gone, entries or not
    _fallbacks = 0

    @property
    def fallbacks(self) -> int:
        """KV heads of pieces, so far, for which a simpler summary stood in."""
        return self._fallbacks

    def teller(self, model, tokenizer, cache) -> None:
        """Who rewrites the prompt of a model's cache, where a summary is made of text."""


class Summary(NoSummary):
    """A summary of evicted tokens that grows with them. A member writes `reduce`.

    ratio: entries for each evicted token. max_entries: of a sequence and layer; one more, and all
    of them are summarized again to half as many, so that older text is told in fewer words. null:
    no bound but the ratio.
    """

    makes = stands = True

    def __init__(self, ratio: float = 0.05, max_entries: int | None = None):
        if isinstance(ratio, bool) or not 0 < ratio <= 1:
            raise BadInput("summary.ratio", ratio, "must be above 0 and at most 1 entry a token")
        if max_entries is not None and max_entries < 2:
            raise BadInput("summary.max_entries", max_entries, "must be at least 2, or null")
        self.ratio, self.max_entries = ratio, max_entries

    def reduce(self, past: Entries, count: int, queries: Queries) -> Entries:
        """`count` fp32 entries that answer `queries`, which cover `past`, as all of `past` do."""
        raise NotImplementedError

    def summarize(self, past: Entries, count: int, queries: Queries | None = None) -> Entries:
        """At most `count` entries in the place of `past`; `past` itself where it has no more.

        queries: the last that attention asked; without them keys of `past` stand in.
        """
        if past.count <= count:
            return past
        pieces = min(count, -(-past.count // SEGMENT_ENTRIES))
        cuts = [i * past.count // pieces for i in range(pieces + 1)]
        shares = [(i + 1) * count // pieces - i * count // pieces for i in range(pieces)]
        done = []
        for start, stop, share in zip(cuts, cuts[1:], shares):
            part = past.part(start, stop).to(torch.float32)
            done.append(self.reduce(part, share, covering(queries or stand_ins(part), part)))
        return concat(done)

    def absorb(
        self, entries: Entries | None, new: Entries, seen: int, queries: Queries | None = None
    ) -> tuple[Entries, int]:
        """Entries after the tokens `new` were evicted, and how many of the old ones lead unchanged.

        seen: tokens evicted so far, `new` included. Tokens too few for an entry of their own go
        into the last one.
        """
        due = int(self.ratio * seen) - int(self.ratio * (seen - new.count))
        stable = 0 if entries is None else entries.count
        if not due and stable:
            stable -= 1
            new = concat([entries.part(stable, stable + 1), new])
        made = self.summarize(new, max(1, due), queries)
        whole = concat([entries.part(0, stable), made]) if stable else made
        if self.max_entries is None or whole.count <= self.max_entries:
            return whole, stable
        return self.summarize(whole, self.max_entries // 2, queries), 0


def stand_ins(past: Entries) -> Queries:
    """Keys as queries: scaled to the length sqrt(D) of a normalized query, times D ** -0.5."""
    step = -(-past.count // STAND_INS)
    q = torch.nn.functional.normalize(past.k[::step].float(), dim=-1).transpose(0, 1)
    return Queries(q, logits(q, past).logsumexp(-1))


def logits(q: Tensor, past: Entries) -> Tensor:
    """fp32 [H, m, n]: what queries [H, m, D] find at each entry, bias included; finite."""
    return products(q, past.k) + past.bias.T[:, None]


def products(q: Tensor, k: Tensor) -> Tensor:
    """fp32 [H, m, n] of q [H, m, D] and k [n, H, D], within +-LARGEST_LOGIT."""
    found = torch.einsum("hmd,nhd->hmn", q, k.float())
    return found.nan_to_num_(0.0).clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)


def shares(queries: Queries, past: Entries) -> Tensor:
    """fp32 [H, m, n]: each entry's share of all attention of each query."""
    return torch.exp(logits(queries.q, past) - queries.lse[..., None])


def covering(queries: Queries, past: Entries) -> Queries:
    """`queries` with totals no smaller than what `past` alone gives.

    A query older than a token never saw it, and may find more there than in all that it saw.
    """
    own = logits(queries.q, past).logsumexp(-1)
    return Queries(queries.q, torch.maximum(queries.lse, own))
