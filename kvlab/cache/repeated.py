"""KVzip: what the model looks at while it repeats the context."""

from __future__ import annotations

import torch

from kvlab.cache.keys import Whole
from kvlab.cache.scores import in_groups
from kvlab.kernel.attend_ref import capped

ROWS = 256  # queries whose logits are made at a time
SINKS = 4  # first tokens that a piece's attention is shared with


class KVzip(Whole):
    """The largest attention that a token gets while the model repeats its piece of the context.

    KVzip (Kim et al. 2025, https://arxiv.org/abs/2505.23416): attention of the repetition's queries
    over the first 4 tokens, the piece and the repetition itself, the most over queries and heads of
    a group. Nothing is scored but by `PagedCache.repeating`, which says what is repeated.
    span: tokens [start, end) of the piece under way; None: an ordinary step.
    """

    name = "kvzip"
    joins = torch.int16

    def of_tokens(self, q, k, v, lse, *, scale, shares):
        score = torch.zeros(k.shape[1], len(k), device=k.device)
        if self.span is None:
            return score
        (start, end), own = self.span, q.shape[1]
        sinks = min(SINKS, start)
        keys = torch.cat((k[:sinks], k[start:end], k[len(k) - own :])).float()
        before = sinks + end - start
        at = torch.arange(len(keys), device=k.device)
        for first in range(0, own, ROWS):
            asked = in_groups(q[:, first : first + ROWS], k.shape[1])
            x = capped(torch.einsum("hgtd,nhd->hgtn", asked, keys) * scale, self.softcap)
            last = before + first + torch.arange(x.shape[2], device=k.device)
            x = x.masked_fill_(at > last[:, None], -torch.inf).softmax(-1)[..., sinks:before]
            score[:, start:end] = torch.maximum(score[:, start:end], x.amax((1, 2)))
        return score

    def joined(self, old, count, new, saw, queries):
        return torch.where(count > 0, torch.maximum(old, new), new), (count + 1).clamp_max(1)
