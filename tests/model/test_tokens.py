"""Which tokens a cache is told: those that stand where their keys say, and no others."""

from __future__ import annotations

import pytest
import torch

from kvlab.model import PagedCache, prefill
from kvlab.model.tokens import in_order, usual

SIZE = 8
IDS = torch.randint(1, 128, (1, 44), generator=torch.Generator().manual_seed(3))
ORDER = torch.arange(6)[None]
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def paged(model, **axes) -> PagedCache:
    axes = {"format": "fp32", "block_size": SIZE, "prefix": "hash"} | axes
    return PagedCache.for_model(model, **axes)


def shifted(columns) -> torch.Tensor:
    places = ORDER.clone()
    places[:, columns] += 1
    return places


@pytest.mark.parametrize(("mask", "positions", "good"), [
    (None, None, True), (None, ORDER, True), (None, ORDER.expand(2, -1), True),
    (None, ORDER + 1, False), (None, shifted(2), False), (None, shifted(0), False),
    (None, shifted(5), False), (None, ORDER[0], False), (None, ORDER[:, :5], False),
    (None, torch.cat([ORDER, shifted(3)]), False), (None, ORDER.repeat(3, 1), False),
    (PADDED, None, False), (PADDED, (PADDED.cumsum(1) - 1).clamp(min=0), True),
    (PADDED, (PADDED.cumsum(1) - 1).masked_fill(PADDED == 0, 9), True),
    (PADDED, ORDER, False), (PADDED.flip(1), None, False), (PADDED[None], None, False),
    (torch.tensor([[1, 1, 0, 1, 1, 1], [1] * 6]), None, False),
])
def test_every_column_stands_at_its_place(mask, positions, good):
    assert usual(torch.zeros(2, 6, dtype=torch.long), mask, positions) == good


def test_places_of_rows_that_hold_tokens_already():
    places = torch.tensor([[7, 5, 6], [10, 11, 12]])
    assert in_order(places, [5, 10], [1, 0], 3)
    assert not in_order(places, [5, 10], [0, 0], 3)
    assert not in_order(places, [5, 11], [1, 0], 3)


FORWARDS = {  # how a caller may hand over ids, positions and cache -> known afterwards
    "by name": (lambda m, c, p: m(input_ids=IDS, position_ids=p, past_key_values=c), 40),
    "ids by place": (lambda m, c, p: m(IDS, position_ids=p, past_key_values=c), 40),
    "all by place": (lambda m, c, p: m(IDS, None, p, c), 40),
    "embeddings": (lambda m, c, p: m(inputs_embeds=m.get_input_embeddings()(IDS) + 0.5,
                                     position_ids=p, past_key_values=c), 0),
    "an inner place": (lambda m, c, p: m(IDS, position_ids=moved(p), past_key_values=c), 0),
    "other places": (lambda m, c, p: m(IDS, position_ids=p + 7, past_key_values=c), 0),
}  # fmt: skip


def moved(positions):
    return torch.cat([positions[:, :20], positions[:, :20], positions[:, 40:]], 1)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_told_is_what_was_computed(model, name, last):
    forward, known = FORWARDS[name]
    places = torch.arange(44)[None]
    cache, plain = paged(model), paged(model, prefix="none")
    if last:  # a first request whose keys are those of its tokens; the second takes them over
        prefill(model, IDS, cache)
        cache.finish()
    out = forward(model, cache, places).logits
    assert torch.equal(out, forward(model, plain, places).logits)
    cache.finish()
    result = prefill(model, IDS, cache)
    assert result.cached == (40 if last else known)
    cold = prefill(model, IDS, paged(model, prefix="none")).logits
    assert torch.allclose(result.logits, cold, atol=1e-4)


KEPT = {
    "one": ({"logits_to_keep": 1}, 1),
    "a tensor": ({"logits_to_keep": torch.tensor([3, 43])}, 2),
    "one in a tensor": ({"logits_to_keep": torch.tensor([1])}, 1),
    "true": ({"logits_to_keep": True}, 1),
    "all": ({}, 44),
    "hidden states": ({"logits_to_keep": 1, "output_hidden_states": True}, 1),
    "labels": ({"labels": IDS}, 44),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_caller_gets_what_was_asked_for(model, name):
    arguments, count = KEPT[name]
    cache, plain = paged(model), paged(model, prefix="none")
    prefill(model, IDS, cache)
    cache.finish()
    out = model(IDS, past_key_values=cache, **arguments)
    expected = model(IDS, past_key_values=plain, **arguments)
    assert out.logits.shape[1] == count == expected.logits.shape[1]
    assert torch.allclose(out.logits, expected.logits, atol=1e-4)
    for a, b in zip(out.hidden_states or (), expected.hidden_states or (), strict=True):
        assert a.shape == b.shape
    assert cache.audit(cache.rows[0])[0]["hit_tokens"] == (40 if name == "one" else 0)


def test_the_config_may_ask_for_hidden_states(model):
    cache = paged(model)
    prefill(model, IDS, cache)
    cache.reset()
    prefill(model, IDS, cache)
    cache.finish()
    model.config.output_hidden_states = True
    prefill(model, IDS, cache)
    cache.finish()
    out = model(IDS, past_key_values=cache, logits_to_keep=1)
    assert out.hidden_states[0].shape[1] == 44


def test_ids_of_a_forward_that_failed_are_of_no_other(model):
    cache = paged(model)

    def fail(*args):
        raise ValueError("before attention")

    handle = model.model.embed_tokens.register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="before attention"):
        model(IDS, past_key_values=cache)
    assert cache.coming is None
    handle.remove()
    model(IDS, use_cache=True)  # without the cache: attention never sees it
    other = torch.roll(IDS, 1, 1)
    model.model(other, past_key_values=cache)  # the decoder alone: its ids are not seen
    cache.finish()
    assert prefill(model, IDS, cache).cached == 0


def test_a_row_that_took_over_a_prefix_may_go_on_with_embeddings(model):
    cache = paged(model)
    prefill(model, IDS, cache)
    cache.finish()
    cache.start(IDS)
    rest = model.get_input_embeddings()(IDS[:, 40:]) + 0.5
    model(inputs_embeds=rest, position_ids=torch.arange(40, 44)[None], past_key_values=cache)
    follow = torch.randint(1, 128, (1, 12), generator=torch.Generator().manual_seed(4))
    prefill(model, follow, cache)
    cache.finish()
    cache.check()
    assert prefill(model, torch.cat([IDS, follow], 1), cache).cached == 40
