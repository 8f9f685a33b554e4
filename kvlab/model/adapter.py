"""PagedCache as a cache of transformers: one object for `generate()` and for our own drivers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvlab import cache as core
from kvlab.cache import NO_FACTS, CacheSpec
from kvlab.core import BadInput, KvlabError
from kvlab.model.columns import Columns, Plan
from kvlab.model.doors import ATTENTION, Logits, PagedLayer
from kvlab.model.forward import Forward, known_tokens
from kvlab.model.identity import LiveModel
from kvlab.model.portrait import model_geometry
from kvlab.model.refusals import refuse_gradients, refuse_other_cap
from kvlab.model.room import adaptive_budget
from kvlab.model.rows import removed_columns, selected_rows
from kvlab.model.shape import check_shared_rotary, rotary_frequencies
from kvlab.model.tokens import left_pads, watch_ends, watch_tokens
from kvlab.model.visibility import window_of


class PagedCache(core.PagedCache, Cache):
    """`kvlab.cache.PagedCache` that transformers models take as `past_key_values`.

    Make it with `for_model`. Rows of a batch are sequences; left padding is not stored. With
    prefix=hash the first forward of `generate()` computes only what is not known; `finish` ends
    a request, so that the next one may begin with what it left.
    """

    def __init__(
        self, geometry, spec=None, *, device="cpu", dtype=torch.float32, inv_freq=None,
        facts=NO_FACTS,
    ):
        core.PagedCache.__init__(
            self, geometry, spec, device=device, dtype=dtype, inv_freq=inv_freq, facts=facts
        )
        Cache.__init__(self, layers=[PagedLayer(self, i) for i in range(geometry.layers)])
        self._rows: list[int] = []
        self.columns = Columns(0)  # of the rows: what transformers counts
        self._forward: Forward | None = None  # the one under way
        self._fresh = False  # rows begin with what is known, and nothing was computed yet
        self.begun_by_hook = False  # and it was a forward of the model that opened them
        # ids [B, T] of the forward that is about to run, and its positions if given
        self._late: list[tuple[list[tuple[int, int]], Tensor]] = []
        self.coming: tuple[Tensor, Tensor | None] | None = None
        self.teller = None  # who rewrites the prompt before a chunk (summary=text)

    @classmethod
    def for_model(
        cls, model, spec: CacheSpec | None = None, *, tokenizer=None, **axes
    ) -> PagedCache:
        """An empty cache for `model`, which from now on attends through kvlab.

        axes: the arguments of `CacheSpec` (format="int4", block_size=16, ...), or one `spec`.
        tokenizer: what summary=text reads and writes with.
        Raises `BadInput` for a model that cannot run over a PagedCache, with the reason.
        """
        if spec is not None and axes:
            raise BadInput(next(iter(axes)), next(iter(axes.values())), "give spec or axes only")
        spec = spec or CacheSpec(**axes)
        geometry = model_geometry(model, spec)
        model.set_attn_implementation(ATTENTION)
        if spec.budget_bytes == "adaptive":
            spec = replace(spec, budget_bytes=adaptive_budget(model, spec))
        facts = NO_FACTS
        watch_ends(model)
        if spec.prefix.shares:
            watch_tokens(model)
            check_shared_rotary(model)
            facts = LiveModel(model)
        cache = cls(
            geometry, spec, device=model.device, dtype=model.dtype,
            inv_freq=rotary_frequencies(model), facts=facts,
        )
        cache.teller = spec.summary.teller(model, tokenizer, cache)
        return cache

    # ---- what transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    @property
    def rows(self) -> list[int]:
        """The sequences of the batch, in order."""
        return self._rows

    @rows.setter
    def rows(self, rows: list[int]) -> None:
        """Sequences opened before become the rows, padded on the left to one length."""
        self._rows = list(rows)
        self.seen = max(map(self.length, rows), default=0)

    @property
    def seen(self) -> int:
        """Columns that the rows have seen, padding included: what transformers counts."""
        return self.columns.seen

    @seen.setter
    def seen(self, columns: int) -> None:
        """Rows that another driver filled count as so many columns, their tokens being the last."""
        self.columns = Columns.padded([self.length(row) for row in self.rows], columns)

    def reset(self) -> None:
        """Forget everything, known prefixes included, and give all bytes back."""
        self.finish()
        self.recheck()
        self.drop_prefixes()

    def finish(self) -> None:
        """End the request of all rows. With prefix=hash what they computed stays known.

        A forward that failed between layers is undone; ending twice does nothing more.
        """
        self.abort()
        rows, self.rows, self.coming = self.rows, [], None
        for layer in self.layers:
            layer.reset()
        here = self.sequences.lengths
        self.close_all([row for row in rows if row in here])  # or its opener closed it

    def start(self, ids: Tensor, mask: Tensor | None = None) -> int:
        """Open a row for each prompt in `ids` [B, T], on the known prefix of each.

        Returns the columns that need not be computed, the same for all rows: the last one always
        is. mask: [B, T], 0 for left padding; rows whose paddings differ by no whole number of
        blocks cannot skip the same columns and start cold. Does nothing while there are rows.
        """
        pads = left_pads(ids, mask)
        if self.rows or pads is None:
            return 0
        prompts = [row[pad:] for row, pad in zip(ids.cpu().numpy(), pads)]
        self.rows = self.open_together(prompts, pads)
        self._fresh = True
        seen = pads[0] + self.length(self.rows[0]) if len(ids) else 0
        self.seen = seen * any(map(self.length, self.rows))  # cold rows skip no padding either
        return self.seen

    def crop(self, tokens_to_remove) -> None:
        """Forget the last columns of every row: -n forgets n, padding counted as the library does.

        A count beyond the length empties the rows. Raises `BadInput` for a positive count, and
        `KvlabError`, all rows being as before, where a block that would be cut was evicted.
        """
        columns = removed_columns(tokens_to_remove)
        self.abort()
        if columns:
            self.truncate_all(dict(zip(self.rows, map(int, self.columns.left(columns)))))
            self.columns.crop(columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was. All rows or, with an error, none."""
        self._select("beam_idx", beam_idx, lambda rows: rows.index_select(0, beam_idx.cpu()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, its copies behind it. All rows or, with an error, none."""
        times = repeats.cpu() if isinstance(repeats, Tensor) else repeats
        self._select("repeats", repeats, lambda rows: rows.repeat_interleave(times, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows by number or by a mask [B]. All rows or, with an error, none."""
        at = indices.cpu() if isinstance(indices, Tensor) else indices
        self._select("indices", indices, lambda rows: rows[at, ...])

    def _select(self, key: str, value, select: Callable[[Tensor], Tensor]) -> None:
        """Row i becomes what row `select([0, 1, ...])[i]` was; the library's own operation says
        which. Without tokens there are no rows yet, and nothing happens.
        """
        self.abort()
        if self.seen:
            sources = selected_rows(len(self.rows), key, value, select)
            self._become(sources)

    def _become(self, sources: list[int]) -> None:
        """A row's first copy is the row itself, the others are forks."""
        free = dict(enumerate(self.rows))
        chosen = [free.pop(s, None) for s in sources]
        forks = iter(self.fork_all([self.rows[s] for s, c in zip(sources, chosen) if c is None]))
        self._rows = [next(forks) if c is None else c for c in chosen]
        self.sequences.close(list(free.values()))
        self.columns.select(sources)

    # ---- which tokens they are

    def tell_later(self, tokens: Tensor, positions: list[int]) -> None:
        """Tokens [B] that the rows have just computed at `positions`, from a driver whose forward
        the cache does not see. They are looked at when a request ends: until then nobody waits.
        """
        if self.spec.prefix.shares:
            self._late.append((list(zip(self.rows, positions)), tokens.clone()))

    def _catch_up(self) -> None:
        late, self._late = self._late, []
        tokens = torch.cat([t for _, t in late]).tolist() if late else ()
        for (row, at), token in zip((place for places, _ in late for place in places), tokens):
            self.tell(row, [token], at)

    # ---- one forward of the model

    def forward(self, layer: PagedLayer, query: Tensor, mask, how: Logits, positions=None):
        """Attention of one layer; the first one opens the step, the last one commits it.

        query [B, Hq, T, D] -> [B, T, Hq, D]; mask: what `paged_mask` returned, or a 4D mask of the
        caller; positions [1 or B, T], None for those that follow.
        """
        keys, values = layer.pending
        layer.pending = None
        try:
            out = self._layer(layer.index, query, keys, values, mask, how, positions)
        except BaseException:
            self.abort()
            raise
        return out

    def _layer(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask, how: Logits, positions):
        window = window_of(mask)
        refuse_gradients(q, k, v)
        refuse_other_cap(self.geometry.shapes[layer].softcap, how.softcap)
        self._check_fits(layer, q, k, v)
        if layer == 0:
            self._forward = Forward.begun(self, q, mask, positions)
        if self._forward is None:
            raise KvlabError(f"layer {layer} attended first: a PagedCache wants the layers of a "
                             "model in order, each once")
        out = self._forward.attend(self, layer, mask, q, k, v, how, window)
        if layer == len(self.layers) - 1:
            forward, self._forward, self._fresh = self._forward, None, False
            self.begun_by_hook = False
            self.columns.advance(forward.plan, positions)  # first: a budget may fail to evict
            self.commit()
        return out

    def _check_fits(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        shape, heads = self.geometry.shapes[layer], self.geometry.query_heads
        made = heads, shape.kv_heads, shape.k_width, shape.v_width
        found = q.shape[1], k.shape[1], k.shape[3], v.shape[3]
        if found != made:
            raise KvlabError(f"this cache was made for {made[0]} query heads, {made[1]} key/value "
                             f"heads and a head width of {_width(*made[2:])}; this model has "
                             f"{found[0]}, {found[1]} and {_width(*found[2:])}")

    def undo_forward(self) -> int | None:
        """A forward has ended: undo it if it did not reach the last layer.

        Returns in how many layers it attended then. Rows that it opened on known prefixes go, too,
        or the same prompt would come again behind them.
        """
        forward, self._forward = self._forward, None
        self.begun_by_hook = False
        if forward is not None:
            self.abort()
        if self._fresh:
            self._fresh = False
            self.finish()
        return None if forward is None else forward.layers

    def admit(self, batch: int) -> Columns:
        """The columns of a batch of so many rows that is about to come, new or those that are here.

        Raises `KvlabError` for another number of rows than the cache holds.
        """
        self.abort()  # what a forward that failed between layers left behind
        if self.teller is not None:
            self.teller.admit()
        if self.rows and len(self.rows) != batch:
            raise KvlabError(f"the cache holds {len(self.rows)} rows, the batch has {batch}")
        return self.columns if self.rows else Columns(batch)

    def take(self, columns: Columns, plan: Plan, positions: Tensor | None) -> None:
        """Open the step of `plan`; what its mask hides for good is forgotten before."""
        fresh = not self.rows
        if fresh:
            self.rows = [self.open() for _ in range(columns.rows)]
            self.columns = columns
        if plan.keep:
            self.truncate_all({self.rows[row]: count for row, count in plan.keep.items()})
            self.columns.hide(plan.keep)
        coming, self.coming = self.coming, None
        self._catch_up()
        for row, ids in known_tokens(self, coming, plan, positions):
            self.keep_apart(row) if ids is None else self.tell(row, ids)
        try:
            self.begin(self.rows, plan.counts)
        except BaseException:
            if fresh:  # another batch may come first
                self.finish()
            raise


def _width(k: int, v: int) -> str:
    return f"{k}" if k == v else f"{k} for keys and {v} for values"
