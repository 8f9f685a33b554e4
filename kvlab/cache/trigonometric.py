"""TriAttention: attention to be expected from queries that point where they always do."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.cache.keys import Whole
from kvlab.core import BadInput
from kvlab.kinds import shown


class TriAttention(Whole):
    """A trigonometric series in the distance to queries to come, for each key.

    TriAttention (Mao et al. 2026, https://arxiv.org/abs/2604.04921): before rotation, a head's
    queries lie around a centre. For each pair of dims that turns with a frequency w, the centre q
    as a complex number meets a key k, turned as it is stored, from a place t ahead of the newest
    token as Re(q exp(i w t) conj(k)): a series in cosines of their distance, summed over the pairs,
    the mean over 1, 2, 4, ... `reach` tokens ahead. What a query's length in a pair has beyond its
    centre's counts times |k|. As z-scores of each query head; the most of a group.
    centres: by layer, query head and pair of dims: "real", "imaginary", "norm" (mean length).
    """

    name = "triattention"
    decodes = True  # though it looks at no query: a choice is made of what is scored
    caps = True  # and at no logit
    placed = True

    def __init__(self, centres: dict, reach: int = 65536):
        try:
            parts = [torch.tensor(centres[n]) for n in ("real", "imaginary", "norm")]
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput("observes.centres", shown(centres), "must have the numbers real, "
                           f"imaginary and norm: {error}") from error
        real, imaginary, norm = parts
        self.centre, self.norm = torch.complex(real.float(), imaginary.float()), norm.float()
        self.ahead = 2.0 ** torch.arange(int(reach).bit_length(), dtype=torch.float64)

    def fit(self, layers: int, query_heads: int, width: int) -> None:
        """Raises `BadInput` where the centres are of another model, or positions not plain."""
        if self.rotary is None or 2 * len(self.rotary) != width:
            raise BadInput("policy", self.name, "scores by the frequencies of plain rotary "
                           "positions, which this model does not have; policy=rkv")
        wanted, found = (layers, query_heads, width // 2), tuple(self.centre.shape)
        if len(found) != 3 or found[0] < layers or found[1:] != wanted[1:]:
            raise BadInput("policy.centres", " x ".join(map(str, found)), "must be {} layers of {} "
                           "query heads with {} pairs of dims here".format(*wanted))

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        heads, place = k.shape[1], self.place
        mine = slice(None) if place.head is None else slice(
            place.head * q.shape[0], (place.head + 1) * q.shape[0])
        centre, norm = (x[place.layer, mine].to(k.device) for x in (self.centre, self.norm))
        first, second = k.float().permute(1, 0, 2).chunk(2, -1)
        turned, size = centre * self._turn(place.seen).to(k.device), norm - centre.abs()
        size, real, imaginary = (x.unflatten(0, (heads, -1))
                                 for x in (size, turned.real, turned.imag))
        found = real @ first.transpose(1, 2) + imaginary @ second.transpose(1, 2)
        found = found + size @ torch.hypot(first, second).transpose(1, 2)  # [H, G, n]
        spread = found.std(-1, correction=0, keepdim=True).clamp_min(1e-6)
        return ((found - found.mean(-1, keepdim=True)) / spread).amax(1)

    def _turn(self, seen: int) -> Tensor:
        """By what a query that is yet to come turns, the mean over `ahead`: complex [D / 2]."""
        angle = (seen + self.ahead)[:, None] * self.rotary.double().cpu()
        return torch.polar(torch.ones_like(angle), angle).mean(0).to(torch.complex64)

    def weight(self, steps, queries):
        return 1.0
