"""PagedCache as a cache of transformers: one object for `generate()` and for our own drivers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvlab import cache as core
from kvlab.cache import NO_FACTS, CacheSpec, Copies, Reach
from kvlab.core import BadInput
from kvlab.model.columns import Columns, Plan
from kvlab.model.doors import ATTENTION, PagedLayer
from kvlab.model.forward import Forward, NoForward
from kvlab.model.identity import LiveModel
from kvlab.model.portrait import model_geometry
from kvlab.model.refusals import refuse_misfit, refuse_other_depth
from kvlab.model.repeat import Repeater
from kvlab.model.room import adaptive_budget
from kvlab.model.rows import removed_columns, selected_rows
from kvlab.model.shape import check_shared_rotary, rotary_frequencies
from kvlab.model.tokens import Watched, left_pads, watch_ends, watch_tokens
from kvlab.model.visibility import window_of

NO_FORWARD = NoForward()


class PagedCache(Copies, Reach, Watched, Cache):
    """A `kvlab.cache.PagedCache` that transformers models take as `past_key_values`.

    Make it with `for_model`. Rows of a batch are sequences; left padding is not stored. With
    prefix=hash the first forward of `generate()` computes only what is not known; `finish` ends
    a request, so that the next one may begin with what it left.

    core: the cache itself, whose methods are reached from here: `stats`, `cache_prefix`,
    `attach_prefix`, `release_prefix`, `save`, `load`, ...
    """

    parts = ("core",)

    def __init__(
        self, geometry, spec=None, *, device="cpu", dtype=torch.float32, inv_freq=None,
        facts=NO_FACTS,
    ):
        self.core = core.PagedCache(
            geometry, spec, device=device, dtype=dtype, inv_freq=inv_freq, facts=facts
        )
        layers = geometry.layers
        Cache.__init__(self, layers=[PagedLayer(self, i, i == layers - 1) for i in range(layers)])
        # by layer: heads of queries and of keys, both widths, the cap of logits
        self.made = [(geometry.query_heads, s.kv_heads, s.k_width, s.v_width, s.softcap)
                     for s in geometry.shapes]  # fmt: skip
        self._rows: list[int] = []
        self.columns = Columns(0)  # of the rows: what transformers counts
        self.forward = NO_FORWARD  # the one under way
        self._fresh = False  # rows begin with what is known, and nothing was computed yet
        self.begun_by_hook = False  # and it was a forward of the model that opened them
        # ids [B, T] of the forward that is about to run, and its positions if given
        self.coming: tuple[Tensor, Tensor | None] | None = None
        self.chunks = None  # captured chunks of a prefill, see `model/chunks.py`
        self.teller = None  # who knows the tokens (summary=text, policy=kvzip)

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
        if spec.member.waits:
            cache.teller = Repeater(model, tokenizer, spec.member.piece)
        return cache

    # ---- what transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns.seen

    @property
    def rows(self) -> list[int]:
        """The sequences of the batch, in order."""
        return self._rows

    @rows.setter
    def rows(self, rows: list[int]) -> None:
        """Sequences opened before become the rows, padded on the left to one length."""
        self._rows = list(rows)
        self.seen = max(map(self.core.requests.length, rows), default=0)

    @property
    def seen(self) -> int:
        """Columns that the rows have seen, padding included: what transformers counts."""
        return self.columns.seen

    @seen.setter
    def seen(self, columns: int) -> None:
        """Rows that another driver filled count as so many columns, their tokens being the last."""
        lengths = list(map(self.core.requests.length, self._rows))
        self.columns = Columns.padded(lengths, columns)

    def reset(self) -> None:
        """Forget everything, known prefixes included, and give all bytes back."""
        self.finish()
        self.core.lineage.recheck()
        self.core.known.drop_prefixes()

    def finish(self) -> None:
        """End the request of all rows. With prefix=hash what they computed stays known.

        A forward that failed between layers is undone; ending twice does nothing more.
        """
        self.core.abort()
        rows, self.rows, self.coming = self.rows, [], None
        for layer in self.layers:
            layer.reset()
        here = self.core.sequences.lengths  # or its opener closed it
        self.core.requests.close_all([row for row in rows if row in here])

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
        requests = self.core.requests
        self.rows = requests.open_together(prompts, pads)
        self._fresh = True
        seen = pads[0] + requests.length(self.rows[0]) if len(ids) else 0
        self.seen = seen * any(map(requests.length, self.rows))  # cold rows skip no padding either
        return self.seen

    def crop(self, tokens_to_remove) -> None:
        """Forget the last columns of every row: -n forgets n, padding counted as the library does.

        A count beyond the length empties the rows. Raises `BadInput` for a positive count, and
        `KvlabError`, all rows being as before, where a block that would be cut was evicted.
        """
        columns = removed_columns(tokens_to_remove)
        self.core.abort()
        if columns:
            left = map(int, self.columns.left(columns))
            self.core.requests.truncate_all(dict(zip(self.rows, left)))
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
        self.core.abort()
        if self.seen:
            sources = selected_rows(len(self.rows), key, value, select)
            self._become(sources)

    def _become(self, sources: list[int]) -> None:
        """A row's first copy is the row itself, the others are forks."""
        free = dict(enumerate(self.rows))
        chosen = [free.pop(s, None) for s in sources]
        parents = [self.rows[s] for s, c in zip(sources, chosen) if c is None]
        forks = iter(self.core.requests.fork_all(parents))
        self._rows = [next(forks) if c is None else c for c in chosen]
        self.core.sequences.close(list(free.values()))
        self.columns.select(sources)
        if self.teller is not None:
            self.teller.select(sources)

    def tell_later(self, tokens: Tensor, positions: list[int]) -> None:
        """Tokens [B] that the rows have just computed at `positions`, from a driver whose forward
        the cache does not see. They are looked at when a request ends: until then nobody waits.
        """
        if self.spec.prefix.shares:
            self.core.requests.tell_later(list(zip(self.rows, positions)), tokens.clone())

    def end_context(self) -> None:
        """All tokens of a context are there: what policy=kvzip has waited for. Within `context`."""
        if self.teller is not None:
            self.teller.ended(self)

    # ---- one forward of the model

    def open_forward(self, module, q: Tensor, k: Tensor, v: Tensor, mask, positions) -> None:
        """The first layer of a forward attends: q [B, Hq, T, Dk], k and v [B, H, T, Dk or Dv].

        mask: what `paged_mask` returned, or a 4D mask of the caller; positions [1 or B, T], None
        for those that follow. Raises before anything has changed.
        """
        self.core.lineage.facts.check(module)
        refuse_other_depth(len(self.layers), module)
        window = window_of(mask)
        refuse_misfit(self.made[0][:4], q, k, v)
        self.forward = Forward.begun(self, q, mask, window, positions)

    def close_forward(self, positions) -> None:
        """The last layer has attended."""
        forward, self.forward, self._fresh = self.forward, NO_FORWARD, False
        self.begun_by_hook = False
        self.columns.advance(forward.plan, positions)  # first: a budget may fail to evict
        self.core.commit()

    def close_chunk(self, plan: Plan) -> None:
        """All layers have attended in a chunk of the rows that was no forward of the library's."""
        self._fresh = self.begun_by_hook = False
        self.columns.advance(plan)  # first: a budget may fail to evict
        self.core.commit()

    def undo_forward(self) -> int | None:
        """A forward has ended: undo it if it did not reach the last layer.

        Returns in how many layers it attended then. Rows that it opened on known prefixes go, too,
        or the same prompt would come again behind them.
        """
        forward, self.forward = self.forward, NO_FORWARD
        self.begun_by_hook = False
        if forward is not NO_FORWARD:
            self.core.abort()
        if self._fresh:
            self._fresh = False
            self.finish()
        return None if forward is NO_FORWARD else forward.layers
