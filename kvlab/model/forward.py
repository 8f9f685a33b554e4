"""One forward of the model over the rows of a PagedCache, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvlab.cache import Running
from kvlab.core import KvlabError, SeqId
from kvlab.model.columns import Columns, Look, Plan
from kvlab.model.refusals import refuse_misfit, refuse_other_cap
from kvlab.model.visibility import Visibility, tokens_of, window_of


class NoForward:
    """No forward is under way."""

    layers = 0

    def enter(self, layer: int, q, k, v, mask, softcap: float | None) -> int | None:
        raise KvlabError(f"layer {layer} attended first: a PagedCache wants the layers of a "
                         "model in order, each once")


class Forward(NoForward):
    """One forward of the rows of a cache.

    plan: which columns are tokens, the same in all layers. mask: what the first layer got, and the
    sliding window that it tells. span: the columns over which a row has padding between tokens, 0
    without. step: what attends, the step under way in the cache. made: by layer, see
    `refuse_misfit`, and the cap of its logits.
    """

    def __init__(
        self, plan: Plan, mask, window: int | None, span: int, step: Running, made: list[tuple]
    ):
        self.plan, self.span, self.made, self._agreed = plan, span, made, [mask]
        self.step = step if plan.order is None and not plan.looks else Packed(plan, step)
        self.layers = 0  # that have attended
        self._windows = {id(mask): (window, mask)}  # of masks that were met

    @classmethod
    def begun(cls, cache, query: Tensor, mask, window: int | None, positions) -> Forward:
        """Open the step of `query` [B, Hq, T, D] in `cache`; raises before anything has changed."""
        batch, _, tokens, _ = query.shape
        columns = admitted(cache, batch)
        real = tokens_of(mask, batch, tokens, columns.seen + tokens)
        plan = columns.plan(real, tokens)
        step = take(cache, columns, plan, positions)  # first: what is hidden now is padding, too
        span = padded_span(columns, plan)
        if span:
            check_window(span, window)
        return cls(plan, mask, window, span, step, cache.made)

    def enter(self, layer: int, q, k, v, mask, softcap: float | None) -> int | None:
        """The sliding window of a layer that is about to attend, which its mask tells."""
        if layer != self.layers:
            raise KvlabError(f"layer {layer} attended where layer {self.layers} was due: a "
                             "PagedCache wants the layers of a model in order, each once")
        self.layers += 1
        if (q.shape[1], k.shape[1], k.shape[3], v.shape[3], softcap) != self.made[layer]:
            refuse_misfit(self.made[layer][:4], q, k, v)
            refuse_other_cap(self.made[layer][4], softcap)
        if id(mask) not in self._windows:
            found = window_of(mask)
            self._same(mask)
            check_window(self.span, found)
            self._windows[id(mask)] = found, mask  # which stays, so that its id does
        return self._windows[id(mask)][0]

    def _same(self, mask) -> None:
        """Layers may ask for other rules, but must agree on which columns are tokens."""
        if any(mask is seen for seen in self._agreed):
            return
        if not _same_padding(mask, self._agreed[0]):
            raise KvlabError("layers of one forward got different attention masks; a PagedCache "
                             "stores the same tokens in all of them")
        self._agreed.append(mask)


class Packed(NamedTuple):
    """A step of rows with padding between or behind their tokens, or that asks itself."""

    plan: Plan
    step: Running

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **how) -> Tensor:
        """As `Running.attend`, with tokens wherever the plan has them; padding sees what is before
        it."""
        found = [(look, self._look(layer, look, q, k, v, how)) for look in self.plan.looks]
        if self.plan.order is None:
            out = self.step.attend(layer, q, k, v, **how)
        else:
            order = torch.from_numpy(self.plan.order).to(q.device)[:, :, None, None]
            packed = (x.gather(2, order.transpose(1, 2).expand_as(x)) for x in (q, k, v))
            out = self.step.attend(layer, *packed, **how)
            out = torch.empty_like(out).scatter_(1, order.expand_as(out), out)
        for look, part in found:
            out[look.row, torch.from_numpy(look.columns).to(out.device)] = part.to(out.dtype)
        return out

    def _look(self, layer: int, look: Look, q: Tensor, k: Tensor, v: Tensor, how: dict) -> Tensor:
        """What the queries of padding see, [P, Hq, D]."""
        columns, real, before = (torch.from_numpy(x).to(q.device) for x in (
            look.columns, self.plan.real[look.row], look.before))
        keys, values = (x[look.row, :, real].transpose(0, 1) for x in (k, v))
        asked = q[look.row, :, columns]
        return self.step.look(
            layer, look.row, asked, keys, values, before, how["scale"], how["sinks"]
        )


def admitted(cache, batch: int) -> Columns:
    """The columns of a batch of so many rows that is about to come, new or those that are here.

    Raises `KvlabError` for another number of rows than the cache holds.
    """
    if cache.core.sequences.under_way:  # what a forward that failed between layers left behind
        cache.core.abort()
    if cache.teller is not None:
        cache.teller.admit()
    columns = cache.columns
    if columns.rows and columns.rows != batch:
        raise KvlabError(f"the cache holds {columns.rows} rows, the batch has {batch}")
    return columns if columns.rows else Columns(batch)


def take(cache, columns: Columns, plan: Plan, positions: Tensor | None) -> Running:
    """Open the step of `plan`; what its mask hides for good is forgotten before."""
    core, rows = cache.core, cache.rows
    fresh, requests = not rows, core.requests
    if fresh:
        cache.rows = rows = [requests.open() for _ in range(columns.rows)]
        cache.columns = columns
    if plan.keep:
        requests.truncate_all({rows[row]: count for row, count in plan.keep.items()})
        columns.hide(plan.keep)
    coming, cache.coming = cache.coming, None
    if core.spec.prefix.shares:
        requests.catch_up()
        for row, ids in known_tokens(cache, coming, plan, positions):
            core.lineage.keep_apart(row) if ids is None else requests.tell(row, ids)
    try:
        if core.spec.by_token and core.groups[0].watch.scorer.placed:
            check_places(core, rows, plan, positions)
        return core.begin(rows, plan.counts)
    except BaseException:
        if fresh:  # another batch may come first
            cache.finish()
        raise


def check_places(core, rows: list[int], plan: Plan, positions: Tensor | None) -> None:
    """Raises `KvlabError` where the tokens of a chunk do not stand at 0, 1, ... in their rows."""
    if positions is None or plan.tokens == 1:  # of single tokens nobody waits for the device
        return
    real = np.ones((len(rows), plan.tokens), bool) if plan.real is None else plan.real
    wanted = np.array([core.requests.length(row) for row in rows])[:, None] + real.cumsum(1) - 1
    if positions.dim() != 2 or (real & (positions.cpu().numpy() != wanted)).any():
        raise KvlabError(f"policy={core.spec.member.name} scores by the positions of tokens, and "
                         "these do not count the tokens of each row from 0 on; give position_ids "
                         "that do, or use kvlab.prefill")


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
