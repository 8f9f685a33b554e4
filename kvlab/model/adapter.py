"""PagedCache as a cache of transformers: one object for `generate()` and for our own drivers.

transformers' attention layers do nothing with the result of `Cache.update` but hand it to the
registered attention function, so `update` stages the new keys and values and returns the layer
itself; the attention function finds cache, queries and new tokens in one place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from kvlab import cache as core
from kvlab.cache import CacheSpec, ModelFacts
from kvlab.cache.prefix import NO_FACTS
from kvlab.core import BadInput, KvlabError
from kvlab.model.dense import dense_attention, padding_mask
from kvlab.model.identity import model_identity
from kvlab.model.room import adaptive_budget
from kvlab.model.rows import removed_columns, selected_rows
from kvlab.model.shape import model_geometry, rotary_frequencies
from kvlab.model.tokens import left_pads, watch_tokens

ATTENTION = "kvlab_paged"
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


class PagedLayer(CacheLayerMixin):
    """One layer's door into the cache; holds nothing but the tokens on their way in."""

    is_compileable = False  # generate() must neither compile nor prebuild a mask
    is_sliding = False
    is_croppable = True

    def __init__(self, cache: PagedCache, index: int):
        super().__init__()
        self.cache, self.index = weakref.proxy(cache), index  # weakly: the cache owns its layers
        self.pending: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to reserve: blocks come with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Stage [B, H, T, D] twice; the attention function takes it from here."""
        self.pending = (key_states, value_states)
        return self, self

    def __getattr__(self, name: str):
        if name in ("shape", "transpose", "size", "dtype"):
            raise KvlabError(
                f"PagedCache needs the {ATTENTION} attention: make it with "
                "PagedCache.for_model(model), or call model.set_attn_implementation"
                f"({ATTENTION!r}) again"
            )
        raise AttributeError(name)

    def get_seq_length(self) -> int:
        return self.cache.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.pending = None

    def crop(self, tokens_to_remove: int) -> None:
        """The cache crops all layers at once."""

    def __getstate__(self) -> dict:
        """For a copy of the cache; tokens on their way in belong to a step of the original."""
        return vars(self) | {"pending": None}


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
        self.rows: list[int] = []
        self.seen = 0  # tokens a row has seen, padding included: what transformers counts
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
        Raises `BadInput` for other architectures than Llama, Mistral, Qwen2 and Qwen3.
        """
        if spec is not None and axes:
            raise BadInput(next(iter(axes)), next(iter(axes.values())), "give spec or axes only")
        spec = spec or CacheSpec(**axes)
        config = model.config.get_text_config(decoder=True)
        if config.model_type not in ARCHITECTURES:
            raise BadInput("model", config.model_type, f"must be one of {', '.join(ARCHITECTURES)}")
        model.set_attn_implementation(ATTENTION)
        if spec.budget_bytes == "adaptive":
            spec = replace(spec, budget_bytes=adaptive_budget(model, spec))
        geometry = model_geometry(config, spec)
        facts = NO_FACTS
        if spec.prefix.shares:
            watch_tokens(model)
            facts = ModelFacts(model_identity(model), model.num_parameters())
        cache = cls(
            geometry, spec, device=model.device, dtype=model.dtype,
            inv_freq=rotary_frequencies(model), facts=facts,
        )
        cache.teller = spec.summary.teller(model, tokenizer, cache)
        return cache

    # ---- what transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def reset(self) -> None:
        """Forget everything, known prefixes included, and give all bytes back."""
        self.finish()
        self.drop_prefixes()

    def finish(self) -> None:
        """End the request of all rows. With prefix=hash what they computed stays known.

        A forward that failed between layers is undone; ending twice does nothing more.
        """
        self.abort()
        rows, self.rows, self.seen, self.coming = self.rows, [], 0, None
        for layer in self.layers:
            layer.reset()
        for row in rows:
            if row in self._tokens:  # or whoever opened it has closed it
                self.close(row)

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
        self.seen = pads[0] + self.length(self.rows[0]) if len(ids) else 0
        self.seen *= any(map(self.length, self.rows))  # cold rows skip no padding either
        return self.seen

    def crop(self, tokens_to_remove) -> None:
        """Forget the last tokens of every row: -n forgets n, as the library counts.

        A count beyond the length empties the rows. Raises `BadInput` for a positive count, and
        `KvlabError`, all rows being as before, where a block that would be cut was evicted.
        """
        columns = removed_columns(tokens_to_remove)
        self.abort()
        if columns:
            self.truncate_all(self._left_after(columns))
            self.seen = max(0, self.seen - columns)

    def _left_after(self, columns: int) -> dict[int, int]:
        """Tokens that each row keeps when the last `columns` columns of the batch go."""
        return {row: max(0, self.length(row) - columns) for row in self.rows}

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
        self.rows = [next(forks) if c is None else c for c in chosen]
        for gone in free.values():
            self.close(gone)

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

    def forward(self, layer: PagedLayer, query: Tensor, mask: Tensor | None, scale, window):
        """Attention of one layer; the first one opens the step, the last one commits it."""
        batch, _, tokens, _ = query.shape
        if layer.index == 0:
            self._begin(batch, tokens, mask)
        keys, values = layer.pending
        layer.pending = None
        out = self.attend(layer.index, query, keys, values, scale=scale, window=window)
        if layer.index == len(self.layers) - 1:
            self.seen += tokens  # first: a relative budget may fail to evict after the commit
            self.commit()
        return out

    def _begin(self, batch: int, tokens: int, mask: Tensor | None) -> None:
        self.abort()  # what a forward that failed between layers left behind
        if self.teller is not None:
            self.teller.admit()
        if not self.rows:
            self.rows = [self.open() for _ in range(batch)]
        if len(self.rows) != batch:
            raise KvlabError(f"the cache holds {len(self.rows)} rows, the batch has {batch}")
        padded = mask is not None and tokens > 1  # decode never adds padding
        counts = mask[:, -tokens:].sum(1).tolist() if padded else [tokens] * batch
        self._note(tokens, [int(n) for n in counts], mask)
        self.begin(self.rows, [int(n) for n in counts])

    def _note(self, tokens: int, counts: list[int], mask: Tensor | None) -> None:
        """Tell each row which tokens it is about to compute, where they are known.

        Tokens at other positions than their place in the sequence make other keys: not told.
        """
        (coming, positions), self.coming = self.coming or (None, None), None
        self._catch_up()
        if coming is None or left_pads(coming, None if mask is None else mask[:, -tokens:]) is None:
            return
        ends = None if positions is None else positions[:, -1].expand(len(counts)).tolist()
        for i, (row, ids) in enumerate(zip(self.rows, coming.cpu().numpy())):
            if ends is None or ends[i] == self.length(row) + counts[i] - 1:
                self.tell(row, ids[tokens - counts[i] :])




def paged_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, **_
):
    """The registered attention: [B, Hq, T, D] -> [B, T, Hq, D]; `key`: a PagedLayer or a tensor."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(key, PagedLayer):
        return key.cache.forward(key, query, attention_mask, scale, sliding_window), None
    return dense_attention(module, query, key, value, attention_mask, scale, sliding_window), None


AttentionInterface.register(ATTENTION, paged_attention)
AttentionMaskInterface.register(ATTENTION, padding_mask)
