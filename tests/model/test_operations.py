"""Operations of the library's cache: a PagedCache answers as DynamicCache does, or refuses."""

from __future__ import annotations

import copy
import io
import pickle
from inspect import signature

import pytest
import torch
from transformers import DynamicCache

from kvlab import PagedCache, prefill
from kvlab.core import BadInput, KvlabError, OutOfBlocks
from kvlab.model.decode import generate

T = torch.tensor
AXES = [{}, {"prefix": "hash", "policy": "lru", "budget_blocks": 90}]


@pytest.fixture(scope="module")
def model():
    from tiny import make_tiny_model

    return make_tiny_model("Llama")


def words(*shape, seed=1):
    return torch.randint(1, 128, shape, generator=torch.Generator().manual_seed(seed))


def run(model, ids, cache):
    """Logits of one forward, without padding."""
    name = "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"
    with torch.no_grad():
        return model(ids, use_cache=True, **{name: cache}).logits


def pair(model, rows=3, tokens=21, **axes):
    """The library's cache and ours, both filled with the same rows."""
    ids, ours = words(rows, tokens), paged(model, **axes)
    model.set_attn_implementation("sdpa")
    theirs = DynamicCache(config=model.config)
    run(model, ids, theirs)
    model.set_attn_implementation("kvlab_paged")
    run(model, ids, ours)
    return theirs, ours


def paged(model, **axes):
    return PagedCache.for_model(model, **{"format": "fp32", "block_size": 8} | axes)


def same_next(model, theirs, ours, rows):
    """Both answer the next tokens alike, one by one and several at once."""
    assert theirs.get_seq_length() == ours.get_seq_length()
    for tokens in (1, 4):
        ids = words(rows, tokens, seed=tokens)
        model.set_attn_implementation("sdpa")
        want = run(model, ids, theirs)
        model.set_attn_implementation("kvlab_paged")
        torch.testing.assert_close(run(model, ids, ours), want, rtol=1e-4, atol=1e-4)
    ours.check()


def accounts(cache):
    return list(cache.rows), cache.seen, cache.stats(), dict(cache.sequences.lengths)


# ---- crop


@pytest.mark.parametrize("count", [0, -1, -5, -8, T(-6), -21, -40], ids=str)
def test_crop(model, count):
    theirs, ours = pair(model)
    theirs.crop(count)
    ours.crop(count)
    same_next(model, theirs, ours, 3)


@pytest.mark.parametrize("count", [1, 21, T(3), -1.5, T(-2.0), False, True, None, "3"], ids=str)
def test_impossible_crops_are_refused(model, count):
    _, ours = pair(model)
    before = accounts(ours)
    with pytest.raises(BadInput, match="tokens_to_remove="):
        ours.crop(count)
    assert accounts(ours) == before


def test_an_empty_cache_is_cropped_to_nothing(model):
    ours = paged(model)
    ours.crop(-3)
    assert ours.get_seq_length() == 0 and not ours.rows


# ---- rows

SELECTIONS = [
    ("reorder_cache", T([2, 0, 1]), 3), ("reorder_cache", T([1, 1, 1]), 3),
    ("reorder_cache", T([2, 0], dtype=torch.int32), 2), ("reorder_cache", T([0, 2, 2, 1, 0]), 5),
    ("batch_repeat_interleave", 1, 3), ("batch_repeat_interleave", 3, 9),
    ("batch_repeat_interleave", T([2, 0, 1]), 3),
    ("batch_select_indices", T([2, 0]), 2), ("batch_select_indices", T([-1, -3]), 2),
    ("batch_select_indices", T([True, False, True]), 2), ("batch_select_indices", [1, 1], 2),
    ("batch_select_indices", slice(1, None), 2),
]  # fmt: skip


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize(("verb", "value", "rows"), SELECTIONS, ids=str)
def test_rows(model, verb, value, rows, axes):
    theirs, ours = pair(model, **axes)
    getattr(theirs, verb)(value)
    getattr(ours, verb)(value)
    same_next(model, theirs, ours, rows)
    ours.finish()
    assert not ours.sequences.lengths


@pytest.mark.parametrize(("verb", "value"), [
    ("reorder_cache", T([0, 3])), ("reorder_cache", T([-1, 0])), ("reorder_cache", T([0.0, 1.0])),
    ("reorder_cache", T([True, False, True])), ("reorder_cache", T([[0, 1]])),
    ("reorder_cache", T([], dtype=torch.long)),
    ("batch_repeat_interleave", 0), ("batch_repeat_interleave", -1),
    ("batch_repeat_interleave", T([1, 2])), ("batch_repeat_interleave", 1.5),
    ("batch_select_indices", T([3])), ("batch_select_indices", T([True, False])),
    ("batch_select_indices", T([False] * 3)), ("batch_select_indices", T(1)),
    ("batch_select_indices", 1), ("batch_select_indices", T([0.5])),
    ("batch_select_indices", T([], dtype=torch.long)), ("batch_select_indices", None),
], ids=str)  # fmt: skip
def test_impossible_rows_are_refused(model, verb, value):
    _, ours = pair(model)
    before = accounts(ours)
    with pytest.raises(BadInput):
        getattr(ours, verb)(value)
    assert accounts(ours) == before
    ours.check()


@pytest.mark.parametrize("verb", ["reorder_cache", "batch_select_indices"])
def test_without_tokens_there_are_no_rows(model, verb):
    theirs, ours = DynamicCache(config=model.config), paged(model)
    for cache in (theirs, ours):
        getattr(cache, verb)(T([5, 6]))
        cache.batch_repeat_interleave(4)
    same_next(model, theirs, ours, 2)


@pytest.mark.parametrize("axes", [{"policy": "none"}, {"policy": "lru"},
                                  {"policy": "fifo", "prefix": "hash"}], ids=str)  # fmt: skip
def test_repeats_without_room_leave_nothing(model, axes):
    cache = paged(model, budget_blocks=5, **axes)
    prefill(model, words(1, 21), cache)
    before = accounts(cache)
    with pytest.raises(OutOfBlocks):
        cache.batch_repeat_interleave(8)
    assert accounts(cache) == before
    cache.batch_repeat_interleave(2)
    cache.finish()
    cache.check()
    assert not cache.sequences.lengths
    assert prefill(model, words(1, 38, seed=2), cache).tokens == 38


@pytest.mark.parametrize("budget", [5, 18, 20])
def test_beams_without_room(model, budget):
    """Too few blocks for the prompts, for the first fork, or later."""
    cache, ids = paged(model, budget_blocks=budget, policy="none"), words(1, 21)
    name = "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"
    with pytest.raises(OutOfBlocks):
        model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=6, do_sample=False,
                       max_new_tokens=40, **{name: cache})  # fmt: skip
    cache.check()
    cache.finish()
    cache.check()
    assert cache.stats().blocks == 0 and not cache.sequences.lengths


def test_a_step_that_failed_is_forgotten(model):
    """A forward that broke between layers: what comes next finds the cache as it was before."""
    for verb, value, rows in (("crop", -2, 3), ("reorder_cache", T([1, 0, 2]), 3),
                              ("batch_repeat_interleave", 2, 6)):  # fmt: skip
        theirs, ours = pair(model)
        ours.begin(ours.rows, [4] * 3)
        for cache in (theirs, ours):
            getattr(cache, verb)(value)
        same_next(model, theirs, ours, rows)
    ours.begin(ours.rows, [2] * 6)
    ours.reset()
    ours.finish()
    ours.reset()
    ours.check()
    assert not ours.rows and ours.stats().allocated_bytes == 0


def test_finish_after_a_row_was_closed_elsewhere(model):
    _, ours = pair(model)
    ours.close(ours.rows[1])
    ours.finish()
    ours.finish()
    ours.check()
    assert ours.stats().blocks == 0


# ---- copies


def no_copy(module, memo):
    raise AssertionError("the model is not part of its cache")


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_deep_copies_answer_as_the_librarys(model, axes, monkeypatch):
    theirs, ours = pair(model, **axes)
    monkeypatch.setattr(torch.nn.Module, "__deepcopy__", no_copy, raising=False)
    before = accounts(ours)
    for _ in range(2):
        twin = copy.deepcopy(ours)
        assert all(layer.cache.rows is twin.rows for layer in twin.layers)
        same_next(model, copy.deepcopy(theirs), twin, 3)
    assert accounts(ours) == before
    same_next(model, theirs, ours, 3)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "bf16"])
def test_deep_copies_of_quantized_caches(model, format):
    ours = pair(model, format=format)[1]
    twin, ids = copy.deepcopy(ours), words(3, 6, seed=9)
    assert torch.equal(run(model, ids, twin), run(model, ids, ours))


@pytest.mark.parametrize("way", [copy.copy, pickle.dumps, lambda c: torch.save(c, io.BytesIO())])
def test_other_copies_are_refused(model, way):
    _, ours = pair(model)
    with pytest.raises(KvlabError, match="copy.deepcopy"):
        way(ours)


# ---- ends and lengths


def test_eos_in_every_form(model):
    ids = words(1, 9)
    plain = generate(model, ids, paged(model), 12)[0].tolist()
    eos = plain[3]
    stop = plain.index(eos) + 1
    for form in (eos, [eos], [127 - eos, eos], (eos,), {eos}, T(eos), T([eos, 0])):
        got = generate(model, ids, paged(model), 12, eos=form)[0].tolist()
        ends = {eos, *(form.reshape(-1).tolist() if isinstance(form, torch.Tensor) else
                       [form] if isinstance(form, int) else form)}  # fmt: skip
        first = next(i for i, token in enumerate(plain) if token in ends) + 1
        assert got == plain[:first] and first <= stop
    for form in (None, [], T([], dtype=torch.long)):
        assert generate(model, ids, paged(model), 12, eos=form)[0].tolist() == plain
    for form in (-1, 1.5, True, [None], "2", T([0.5])):
        with pytest.raises(BadInput, match="eos="):
            generate(model, ids, paged(model), 2, eos=form)


def test_rows_that_ended_repeat_their_own_end(model):
    ids = words(2, 9)
    a, b = generate(model, ids, paged(model), 12).tolist()
    got = generate(model, ids, paged(model), 12, eos=[a[1], b[4]])
    for row, plain in zip(got.tolist(), (a, b)):
        end = next((i for i, t in enumerate(plain) if t in (a[1], b[4])), len(plain))
        assert row[: end + 1] == plain[: end + 1][: len(row)]
        assert set(row[end:]) <= {plain[end]} if end < len(row) else True


@pytest.mark.parametrize("count", [0, -1, True, 2.0, None, "3"])
def test_impossible_numbers_of_tokens_are_refused(model, count):
    cache = paged(model)
    with pytest.raises(BadInput, match="max_new_tokens="):
        generate(model, words(1, 5), cache, count)
    assert not cache.rows


def test_one_new_token(model):
    ids = words(2, 9)
    want = generate(model, ids, paged(model), 3)[:, :1]
    assert torch.equal(generate(model, ids, paged(model), 1, eos=[5]), want)


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (5,)])
def test_prompts_of_nothing_are_refused(model, shape):
    for axes in AXES:
        cache = paged(model, **axes)
        for call in (lambda: prefill(model, words(*shape), cache),  # noqa: B023
                     lambda: generate(model, words(*shape), cache, 3)):  # noqa: B023, fmt: skip
            with pytest.raises(BadInput, match="input_ids="):
                call()
        assert not cache.rows
