"""One forward of the model over the rows of a PagedCache, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kvlab.core import KvlabError, SeqId
from kvlab.model.columns import Columns, Look, Plan
from kvlab.model.doors import Logits
from kvlab.model.visibility import Visibility, tokens_of


class Forward:
    """plan: which columns are tokens, the same in all layers; mask: what the first layer got; span:
    the columns over which a row has padding between tokens, 0 without."""

    def __init__(self, plan: Plan, mask, span: int):
        self.plan, self.span, self._agreed = plan, span, [mask]
        self.layers = 0  # that have attended

    @classmethod
    def begun(cls, cache, query: Tensor, mask, positions) -> Forward:
        """Open the step of `query` [B, Hq, T, D] in `cache`; raises before anything has changed."""
        batch, _, tokens, _ = query.shape
        columns = cache.admit(batch)
        real = tokens_of(mask, batch, tokens, columns.seen + tokens)
        plan = columns.plan(real, tokens)
        cache.take(columns, plan, positions)  # first: what is hidden now is padding, too
        return cls(plan, mask, padded_span(columns, plan))

    def attend(
        self, cache, layer: int, mask, q: Tensor, k: Tensor, v: Tensor, how: Logits,
        window: int | None,
    ) -> Tensor:
        """As `PagedCache.attend`, with tokens wherever the plan has them; q [B, Hq, T, D] ->
        [B, T, Hq, D]. Padding sees what is before it."""
        if layer != self.layers:
            raise KvlabError(f"layer {layer} attended where layer {self.layers} was due: a "
                             "PagedCache wants the layers of a model in order, each once")
        self.layers += 1
        self._same(mask)
        check_window(self.span, window)
        plan = self.plan
        found = [(look, self._look(cache, layer, look, q, k, v, how)) for look in plan.looks]
        asked = {"scale": how.scale, "window": window, "sinks": how.sinks}
        if plan.order is None:
            out = cache.attend(layer, q, k, v, **asked)
        else:
            order = torch.from_numpy(plan.order).to(q.device)[:, :, None, None]
            packed = (x.gather(2, order.transpose(1, 2).expand_as(x)) for x in (q, k, v))
            out = cache.attend(layer, *packed, **asked)
            out = torch.empty_like(out).scatter_(1, order.expand_as(out), out)
        for look, part in found:
            out[look.row, torch.from_numpy(look.columns).to(out.device)] = part.to(out.dtype)
        return out

    def _look(self, cache, layer: int, look: Look, q: Tensor, k: Tensor, v: Tensor, how):
        """What the queries of padding see, [P, Hq, D]."""
        columns, real, before = (torch.from_numpy(x).to(q.device) for x in (
            look.columns, self.plan.real[look.row], look.before))
        keys, values = (x[look.row, :, real].transpose(0, 1) for x in (k, v))
        return cache.look(layer, look.row, q[look.row, :, columns], keys, values, before, how.scale,
                          how.sinks)  # fmt: skip

    def _same(self, mask) -> None:
        """Layers may ask for other rules, but must agree on which columns are tokens."""
        if any(mask is seen for seen in self._agreed):
            return
        if not _same_padding(mask, self._agreed[0]):
            raise KvlabError("layers of one forward got different attention masks; a PagedCache "
                             "stores the same tokens in all of them")
        self._agreed.append(mask)


def padded_span(columns: Columns, plan: Plan) -> int:
    """The columns, those of `plan` included, over which a row has padding between tokens; or 0."""
    return columns.seen + plan.tokens if columns.interior(plan) else 0


def check_window(span: int, window: int | None) -> None:
    """Raises `KvlabError` where a model's own window reaches over padding that is not stored."""
    if window is not None and span > abs(window):
        raise KvlabError(f"the sliding window of {abs(window)} tokens of this model counts padding "
                         "between tokens, which a PagedCache does not store; pad on the left")


def _same_padding(a, b) -> bool:
    """Whether two masks, of whatever rule, hide the same columns."""
    if not (isinstance(a, Visibility) and isinstance(b, Visibility)):
        return False
    one, other = a.padding, b.padding
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def known_tokens(
    cache, coming: tuple[Tensor, Tensor | None] | None, plan: Plan, positions: Tensor | None
) -> Iterator[tuple[SeqId, np.ndarray | None]]:
    """Which tokens each row is about to compute; None where ids do not stand for them.

    coming: the ids [B, T] of the forward, None where nobody saw them. Tokens at other positions
    than their place in the sequence make other keys.
    """
    if not cache.spec.prefix.shares:
        return
    if coming is None or coming[0].shape != (len(cache.rows), plan.tokens):
        yield from ((row, None) for row in cache.rows)
        return
    ids = coming[0].cpu().numpy()
    at = None if positions is None else positions.expand(len(ids), -1).cpu().numpy()
    for i, (row, count) in enumerate(zip(cache.rows, plan.counts)):
        real = slice(None) if plan.real is None else plan.real[i]
        usual = cache.length(row) + np.arange(count)
        known = at is None or np.array_equal(at[i, real], usual)
        yield row, ids[i, real] if known else None
