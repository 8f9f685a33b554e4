"""Masks and positions as the library means them: answered as DynamicCache does, or refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import ARCHITECTURES
from transformers import DynamicCache, StaticCache

from kvlab import PagedCache, prefill
from kvlab.core import BadInput, KvlabError
from kvlab.model.columns import Columns
from kvlab.model.decode import generate
from kvlab.model.library import cache_parameter

SOURCE = torch.Generator().manual_seed(3)


def words(*shape):
    return torch.randint(1, 128, shape, generator=SOURCE)


def left(lengths):
    """Ids and mask, padded on the left."""
    width = max(lengths)
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    return words(len(lengths), width) * mask, mask


def counted(mask):
    """Positions as `generate()` gives them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


class Pair:
    """The same forwards over a cache of the library's and over one of ours."""

    def __init__(self, model, **axes):
        self.model, self.axes = model, {"format": "fp32", "block_size": 4} | axes
        self.theirs, self.ours = DynamicCache(config=model.config), None

    @torch.no_grad()
    def _logits(self, cache, ids, mask, **told):
        told = {"input_ids": ids, "attention_mask": mask, "use_cache": True} | told
        return self.model(**told, **{cache_parameter(self.model): cache}).logits

    def equal(self, ids, mask=None, where=None, **told):
        self.model.set_attn_implementation("sdpa")
        want = self._logits(self.theirs, ids, mask, **told)
        new = PagedCache.for_model(self.model, **self.axes)
        self.ours = new if self.ours is None else self.ours
        got = self._logits(self.ours, ids, mask, **told)
        if where is not None:
            want, got = want[where], got[where]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        self.ours.check()

    def refused(self, match, *args, **told):
        ids, mask = *args, *[None] * (2 - len(args))
        with pytest.raises(KvlabError, match=match):
            self._logits(self.ours, ids, mask, **told)
        self.ours.check()


@pytest.fixture(params=ARCHITECTURES)
def pair(request, tiny_model):
    return Pair(tiny_model(request.param))


@pytest.fixture
def llama(tiny_model):
    return Pair(tiny_model("Llama"))


def test_padding_inside_the_past(pair):
    """A row that ended early is padded until the others have ended, then comes the next turn."""
    ids, mask = left([9, 14])
    pair.equal(ids, mask, mask.bool(), position_ids=counted(mask))
    for step in range(5):
        mask = torch.cat([mask, torch.tensor([[1], [int(step < 2)]])], 1)
        ids = words(2, 1)
        pair.equal(ids, mask, position_ids=counted(mask)[:, -1:])
    more, new = left([7, 4])
    mask = torch.cat([mask, new], 1)
    pair.equal(more, mask, position_ids=counted(mask)[:, -7:])
    assert [pair.ours.length(row) for row in pair.ours.rows] == [21, 20], "padding is not stored"


def test_tokens_that_a_later_mask_hides_at_the_end_of_a_row_are_forgotten(pair):
    """`generate()` shows what it feeds to rows that have ended; the next turn hides it."""
    mask = torch.ones(2, 14).long()
    pair.equal(words(2, 14), mask)
    mask[1, 9:] = 0
    mask = torch.cat([mask, torch.ones(2, 5).long()], 1)
    pair.equal(words(2, 5), mask, position_ids=counted(mask)[:, -5:])
    assert [pair.ours.length(row) for row in pair.ours.rows] == [19, 14]


def test_one_token_that_does_not_see_the_tokens_before_it(llama):
    llama.equal(words(1, 12))
    mask = torch.ones(1, 13).long()
    mask[0, 8:12] = 0
    llama.equal(words(1, 1), mask, position_ids=torch.tensor([[8]]))
    assert llama.ours.length(llama.ours.rows[0]) == 9
    llama.refused("padding", words(1, 1), torch.ones(1, 14).long())


def test_hidden_tokens_in_the_middle_are_refused(llama):
    llama.equal(words(1, 12))
    mask = torch.ones(1, 13).long()
    mask[0, 2:5] = 0
    llama.refused("forgets only the last", words(1, 1), mask)


@pytest.mark.parametrize("hidden", [[(0, slice(8, 12))], [(0, slice(3, 6))],
                                    [(0, slice(0, 3)), (1, slice(5, 7)), (1, slice(11, 12))]])
@pytest.mark.parametrize("block", [1, 4, 16])
def test_right_padding_and_holes(tiny_model, hidden, block):
    """Padding is answered too, as far as it sees anything: `generate()` may go on from it."""
    pair = Pair(tiny_model("Qwen3"), block_size=block)
    mask = torch.ones(2, 12).long()
    for row, columns in hidden:
        mask[row, columns] = 0
    sees = mask.cumsum(1) > 0
    pair.equal(words(2, 12), mask, sees)
    pair.equal(words(2, 1), torch.cat([mask, torch.ones(2, 1).long()], 1))


def test_padding_that_comes_one_column_at_a_time(pair):
    ids, mask = left([3, 6])
    for column in range(6):
        span = slice(column, column + 1)
        pair.equal(ids[:, span], mask[:, : column + 1], mask[:, span].bool(),
                   position_ids=counted(mask)[:, span])
    assert [pair.ours.length(row) for row in pair.ours.rows] == [3, 6]


def test_a_mask_that_is_too_short_hides_the_rest(llama):
    llama.equal(words(1, 8), torch.tensor([[1, 1, 1, 1, 1]]))
    assert llama.ours.length(llama.ours.rows[0]) == 5


def test_no_mask_behind_padding_is_refused(llama):
    ids, mask = left([3, 6])
    llama.equal(ids, mask, mask.bool())
    llama.refused("no attention mask came", words(2, 2))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_four_dimensional_masks(llama, kind):
    """Causal with padding is followed; what else there is, is refused."""
    def four(seen):
        if kind == torch.bool:
            return seen[:, None]
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)[:, None]

    _, mask = left([5, 8])
    causal = torch.ones(8, 8).tril().bool()
    llama.equal(words(2, 8), four(causal & mask.bool()[:, None]), mask.bool())
    tree = causal.clone()
    tree[6, 5] = False
    llama.refused("causal with padding", words(2, 8), four(torch.cat(
        [mask.bool()[:, None].expand(-1, 8, -1), tree.expand(2, 8, 8)], 2)))


def test_masks_that_say_something_else_are_refused(llama):
    llama.equal(words(1, 4))
    llama.refused("other numbers", words(1, 2), torch.full((1, 1, 2, 6), -1.0))
    seen = torch.ones(1, 4, 2, 6).tril(4).bool()
    seen[:, 1, :, 0] = False
    llama.refused("head to head", words(1, 2), seen)


def test_positions_of_any_kind(pair):
    """Keys are stored as they come; where they stand is the caller's."""
    odd = torch.tensor([[7, 8, 9, 7, 8, 9, 30, 31]])
    pair.equal(words(2, 8), position_ids=odd)
    pair.equal(words(2, 3), position_ids=torch.tensor([[3, 4, 5], [40, 41, 42]]))


def test_packed_sequences_without_a_cache(llama):
    """The library sees from positions where a sequence begins; on a switched model as well."""
    model = llama.model
    ids, positions = words(1, 12), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        want = model(ids, position_ids=positions, use_cache=False).logits
        PagedCache.for_model(model, format="fp32")
        got = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: None,
                                  lambda c: StaticCache(config=c, max_cache_len=40)])
@pytest.mark.parametrize("chunks", [(20,), (7, 12, 1)])
@pytest.mark.parametrize("architecture, window", [("Llama", None), ("Mistral", 8)])
def test_the_librarys_caches_on_a_switched_model(tiny_model, make, chunks, architecture, window):
    """Baselines run there: the same logits, whatever the mask."""
    more = {} if window is None else {"sliding_window": window}
    model, (ids, mask) = tiny_model(architecture, **more), left([11, 20])
    name, out = cache_parameter(model), []
    for attention in ("sdpa", "kvlab_paged"):
        model.set_attn_implementation(attention)
        cache, at = make(model.config), 0
        for size in chunks if cache is not None else (20,):
            stop = at + size
            out.append(model(
                ids[:, at:stop], attention_mask=mask[:, :stop],
                position_ids=counted(mask)[:, at:stop], use_cache=cache is not None,
                **{name: cache},
            ).logits[mask[:, at:stop].bool()])
            at = stop
    half = len(out) // 2
    for want, got in zip(out[:half], out[half:]):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_padding_between_tokens_under_a_sliding_window(tiny_model):
    """The library's window counts padding; below its width that is no matter."""
    pair = Pair(tiny_model("Mistral", sliding_window=16))
    mask = torch.ones(2, 10).long()
    mask[1, 6:8] = 0
    pair.equal(words(2, 10), mask, mask.bool())
    mask = torch.cat([mask, torch.ones(2, 8).long()], 1)
    pair.refused("sliding window of 16", words(2, 8), mask)


@pytest.mark.parametrize("chunk", [3, 64])
def test_ragged_rows_through_kvlabs_own_drivers(pair, chunk):
    """Both turns ragged: prefill, then the decode driver, against the library's forward."""
    model = pair.model
    (ids, mask), (more, new) = left([9, 14]), left([7, 4])
    pair.equal(ids, mask, mask.bool(), position_ids=counted(mask))
    both = torch.cat([mask, new], 1)
    ours, theirs = pair.ours, pair.theirs
    model.set_attn_implementation("sdpa")
    told = {"attention_mask": both, "position_ids": counted(both)[:, -7:], "use_cache": True}
    want = model(more, **told, **{cache_parameter(model): theirs}).logits[:, -1]
    PagedCache.for_model(model, format="fp32")
    got = prefill(model, more, ours, attention_mask=new, chunk_tokens=chunk).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    fresh = PagedCache.for_model(model, format="fp32", block_size=4)
    generate(model, ids, fresh, 1, attention_mask=mask, chunk_tokens=chunk)
    again = generate(model, more, fresh, 1, attention_mask=new, chunk_tokens=chunk)
    assert again[:, 0].tolist() == want.argmax(-1).tolist()


def test_generate_wants_a_token_in_the_last_column(tiny_model):
    model = tiny_model()
    cache = PagedCache.for_model(model, format="fp32")
    with pytest.raises(BadInput, match="pad on the left"):
        generate(model, words(1, 4), cache, 2, attention_mask=torch.tensor([[1, 1, 1, 0]]))


def test_what_attention_over_blocks_cannot_do_is_refused(llama):
    llama.equal(words(1, 4))
    llama.refused("output_attentions", words(1, 2), output_attentions=True)
    model = llama.model
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    llama.refused("dropout", words(1, 2))
    model.eval()
    llama.refused("softly capped at None", words(1, 2), softcap=30.0)
    llama.refused("'position_bias'", words(1, 2), position_bias=30.0)
    model.requires_grad_(True)
    with pytest.raises(KvlabError, match="gradients"):
        model(words(1, 2), **{cache_parameter(model): llama.ours})
    model.requires_grad_(False)


def test_hidden_states_come_as_from_the_librarys_cache(llama):
    name, ids = cache_parameter(llama.model), words(2, 9)
    found = []
    for attention, cache in (("sdpa", llama.theirs), ("kvlab_paged", None)):
        llama.model.set_attn_implementation(attention)
        cache = cache or PagedCache.for_model(llama.model, format="fp32")
        out = llama.model(inputs_embeds=llama.model.get_input_embeddings()(ids), use_cache=True,
                          output_hidden_states=True, logits_to_keep=torch.tensor([2, 5]),
                          **{name: cache})
        found.append([*out.hidden_states, out.logits])
    for want, got in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_positions_after_a_crop_are_those_before():
    columns = Columns.padded([3, 5], 5)
    plan = columns.plan(None if columns.real is None else _more(columns, 2), 2)
    columns.advance(plan, torch.tensor([[3, 4], [5, 6]]))
    assert columns.next_positions() == [5, 7]
    columns.crop(3)
    assert columns.next_positions() == [2, 4] and columns.seen == 4
    columns.advance(columns.plan(_more(columns, 1), 1), torch.tensor([[9], [4]]))
    columns.crop(1)
    with pytest.raises(KvlabError, match="one by one"):
        columns.next_positions()


def _more(columns, tokens):
    return np.concatenate([columns.real, np.ones((columns.rows, tokens), bool)], 1)


def test_the_static_step_keeps_to_the_models_own_window(tiny_model):
    """Mistral's layers do not know their window, their config does."""
    model, ids = tiny_model("Mistral", sliding_window=8), words(1, 24)
    tokens = []
    for driver in ("eager", "static"):
        cache = PagedCache.for_model(model, format="fp32", block_size=4)
        tokens.append(generate(model, ids, cache, 12, driver=driver).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("driver", ["eager", "static"])
def test_padding_between_tokens_when_decoding_leaves_the_window(tiny_model, driver):
    model, mask = tiny_model("Mistral", sliding_window=8), torch.ones(2, 7).long()
    mask[1, 2:4] = 0
    cache = PagedCache.for_model(model, format="fp32", block_size=4)
    with pytest.raises(KvlabError, match="sliding window of 8"):
        generate(model, words(2, 7), cache, 4, attention_mask=mask, driver=driver)


def test_columns_agree_with_plain_arrays():
    """Random turns, crops and selections against a list of bools for each row."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        columns, rows = Columns(3), [[], [], []]
        for _ in range(12):
            kind = rng.integers(4)
            if kind == 0 and columns.seen:
                count = int(rng.integers(0, columns.seen + 2))
                columns.crop(count)
                rows = [row[: max(0, len(row) - count)] for row in rows]
            elif kind == 1:
                chosen = rng.integers(0, len(rows), 3).tolist()
                columns.select(chosen)
                rows = [list(rows[i]) for i in chosen]
            else:
                tokens = int(rng.integers(1, 5))
                new = rng.random((3, tokens)) < 0.7
                real = np.concatenate([np.array(rows, bool).reshape(3, -1), new], 1)
                columns.advance(columns.plan(None if real.all() else real, tokens))
                rows = [row + more.tolist() for row, more in zip(rows, new)]
            held = np.ones((3, columns.seen), bool) if columns.real is None else columns.real
            assert held.tolist() == rows
            assert columns.lengths().tolist() == columns.next_positions() == [sum(r) for r in rows]
