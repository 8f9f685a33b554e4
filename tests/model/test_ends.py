"""A forward that does not reach the last layer, and prompts that look like known ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kvlab import PagedCache, prefill
from kvlab.core import KvlabError
from kvlab.model.library import cache_parameter

IDS = torch.randint(1, 128, (1, 40), generator=torch.Generator().manual_seed(2))


def paged(model, **axes) -> PagedCache:
    return PagedCache.for_model(model, **{"format": "fp32", "block_size": 8} | axes)


def last(model, cache, ids=IDS, **told):
    told = {cache_parameter(model): cache, "use_cache": True, "logits_to_keep": 1} | told
    with torch.no_grad():
        return model(ids, **told).logits[:, -1]


def raised(error):
    raise error


@pytest.fixture
def model(tiny_model):
    return tiny_model("Llama")


@pytest.fixture
def warm(model):
    """A cache that knows IDS, with no rows open."""
    cache = paged(model, prefix="hash")
    last(model, cache)
    cache.finish()
    assert cache.stats().prefix_tokens == 40
    return cache


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("place", ["model.embed_tokens", "model.layers.0", "model.layers.0.mlp"])
def test_an_interrupted_first_forward_opens_nothing(model, warm, place, error):
    """The same prompt, or another, then does not come behind the known one.

    torch does not say that a forward was interrupted: the next one notices, and is refused once.
    """
    module = model.get_submodule(place)
    module.forward = lambda *args, **kwargs: raised(error)
    with pytest.raises(error):
        last(model, warm)
    del module.forward
    if error is KeyboardInterrupt:
        with pytest.raises(KvlabError, match="run this one again"):
            last(model, warm)
    assert warm.rows == [] and warm.seen == 0
    torch.testing.assert_close(last(model, warm), last(model, paged(model)), rtol=1e-4, atol=1e-4)
    assert warm.seen == 40
    warm.finish()
    warm.check()


def test_a_refused_first_forward_opens_nothing(model, warm):
    model.requires_grad_(True)
    with pytest.raises(KvlabError, match="gradients"):
        model(IDS, **{cache_parameter(model): warm}, logits_to_keep=1)
    model.requires_grad_(False)
    assert warm.rows == []


@pytest.mark.parametrize("mask", [
    torch.full((1, 40), 2), torch.ones(1, 40), torch.ones(1, 40, dtype=torch.float16),
    {"full_attention": None},
])
def test_masks_of_any_kind_on_a_known_prompt(tiny_model, mask):
    """The library reads them as bools; some models take one for each kind of layer."""
    model = tiny_model("Qwen3")
    cache, want = paged(model, prefix="hash"), last(model, paged(model))
    for _ in range(2):
        got = last(model, cache, attention_mask=mask)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        cache.finish()


def test_padding_without_positions_is_not_a_known_prompt(model, warm):
    """The model then counts padding, so keys stand elsewhere."""
    ids = torch.cat([torch.zeros(1, 8).long(), IDS], 1)
    mask = (torch.arange(48) >= 8).long()[None]
    want = last(model, paged(model), ids, attention_mask=mask)
    got = last(model, warm, ids, attention_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    warm.finish()
    assert prefill(model, IDS, warm).cached == 32


@pytest.mark.parametrize("change", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}])
def test_a_model_of_other_layers_is_refused(tiny_model, model, change):
    cache, other = paged(model), tiny_model("Llama", **change)
    PagedCache.for_model(other, format="fp32")
    with pytest.raises(KvlabError, match="made for 2 layers, this model has"):
        last(other, cache)
    cache.check()
    assert cache.seen == 0 and last(model, cache) is not None


def test_layers_left_out_are_noticed(model):
    cache = paged(model)
    layers = model.model.layers
    model.model.layers = layers[:1]
    with pytest.raises(KvlabError, match="in 1 of 2 layers"):
        last(model, cache)
    model.model.layers = layers
    assert cache.seen == 0 and last(model, cache) is not None and cache.seen == 40


@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"head_dim": 16}])
def test_a_model_of_other_heads_is_refused(tiny_model, model, change):
    cache, other = paged(model), tiny_model("Llama", **change)
    PagedCache.for_model(other, format="fp32")
    with pytest.raises(KvlabError, match="was made for 4 query heads, 2 key/value heads"):
        last(other, cache)


def test_layers_out_of_order_are_refused(model):
    cache = paged(model)
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[1], layers[0]])
    with pytest.raises(KvlabError, match="in order"):
        last(model, cache)
    model.model.layers = layers
    assert last(model, cache) is not None and cache.seen == 40


STATE = SimpleNamespace(shift=0.0)


class Scaled(nn.Linear):
    """A layer that keeps its scale where nobody looks."""

    def forward(self, x):
        return super().forward(x) * self.state.scale


@pytest.mark.parametrize("kind", ["object of a module", "global", "closure", "class"])
def test_what_cannot_be_looked_through_is_not_shared(model, kind):
    inner = model.model.layers[0].self_attn.v_proj
    state = SimpleNamespace(scale=1.0)
    if kind == "object of a module":
        inner.__class__, inner.state = Scaled, state
    elif kind == "global":
        inner.register_forward_hook(lambda m, a, out: out + STATE.shift)
    elif kind == "closure":
        inner.register_forward_hook(lambda m, a, out: out * state.scale)
    else:
        class Hook:
            scale = 1.0

            def __call__(self, module, args, out):
                return out * self.scale

        inner.register_forward_hook(Hook())
    cache = paged(model, prefix="hash")
    for _ in range(2):
        assert prefill(model, IDS, cache).cached == 0
        cache.finish()
    cache.check()
