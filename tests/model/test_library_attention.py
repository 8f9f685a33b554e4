"""What of transformers' masks and attention the adapter relies on: one test a line of the table.

A failure here says what the library changed, and which file of kvlab has to follow.
"""

from __future__ import annotations

import pytest
import torch
from library_probe import PROBE, WINDOWED, Length, Seen, changed, probed
from toys import ARCHITECTURES
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@pytest.fixture
def seen():
    probe = Seen()
    AttentionInterface.register(PROBE, probe.attention)
    AttentionMaskInterface.register(PROBE, probe.mask)
    yield probe
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        type(table)._global_mapping.pop(PROBE)


@pytest.fixture(params=ARCHITECTURES)
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture(params=WINDOWED)
def windowed(request, tiny_model):
    return tiny_model(request.param, **WINDOWED[request.param])


# ---- masks


def test_mask_function_is_told(seen, model):
    probed(model, {"attention_mask": torch.ones(2, 5, dtype=torch.long)})
    wanted = {"batch_size": 2, "q_length": 2, "kv_length": 5, "q_offset": 3, "kv_offset": 0,
              "use_vmap": False}  # fmt: skip
    told = seen.masks[0]
    assert {name: told.get(name) for name in wanted} == wanted, changed(
        f"the registered mask function gets {sorted(told)}", "visibility.py")
    names = {"mask_function", "attention_mask", "device", "dtype", "config"}
    assert names <= told.keys(), changed(f"no {names - told.keys()} for masks", "visibility.py")
    assert told["attention_mask"].dtype == torch.bool and told["attention_mask"].shape == (2, 5)


def test_mask_function_gets_the_very_length(seen, model):
    probed(model)
    assert type(seen.masks[0]["kv_length"]) is Length, changed(
        "kv_length is not what Cache.get_mask_sizes gave, by which a PagedCache is known",
        "visibility.py")  # fmt: skip


def test_mask_rules(seen, windowed):
    probed(windowed)
    rules = [told["mask_function"] for told in seen.masks]
    window = sliding_window_causal_mask_function(4)
    sliding = [rule for rule in rules if rule is not causal_mask_function]
    assert len(sliding) == 1, changed("there is not one rule for windowed layers", "visibility.py")
    assert sliding[0].__code__ is window.__code__, changed(
        "a windowed layer's rule is not sliding_window_causal_mask_function", "visibility.py")
    place = torch.arange(6)
    q, kv = place[:, None], place[None]
    for rule, reach in ((window, 4), (causal_mask_function, 99)):
        want = (kv <= q) & (q - kv < reach)
        assert torch.equal(torch.as_tensor(rule(0, 0, q, kv)), want), changed(
            "which keys a rule shows", "visibility.py")  # fmt: skip


def test_other_rules_are_told(seen, tiny_model):
    """What a model adds to the causal rule arrives as another function, or as use_vmap."""
    model = tiny_model("Llama")
    model.set_attn_implementation(PROBE)
    model(input_ids=torch.ones(1, 4).long(), position_ids=torch.tensor([[0, 1, 0, 1]]),
          use_cache=False)  # fmt: skip
    rule = seen.masks[0]["mask_function"]
    assert rule is not causal_mask_function, changed(
        "packed positions without a cache no longer change the rule", "visibility.py")
    assert not rule(0, 0, torch.tensor(2), torch.tensor(1)), "two documents do not see each other"


def test_masks_arrive_as_they_were_made(seen, model):
    probed(model)
    assert all(call[4] is seen.token for call in seen.calls), changed(
        "attention does not get what the mask function made", "adapter.py")


def test_4d_masks_arrive_untouched(seen, model):
    mask = torch.ones(2, 1, 2, 5, dtype=torch.bool)
    probed(model, {"attention_mask": mask})
    assert not seen.masks and all(call[4] is mask for call in seen.calls), changed(
        "a 4D mask does not reach attention as it is", "visibility.py")  # fmt: skip


def test_mask_of_sdpa():
    make = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    plain = {"batch_size": 1, "q_length": 3, "kv_length": 3, "q_offset": 0, "kv_offset": 0}
    mask = make(**plain, mask_function=causal_mask_function, attention_mask=None,
                allow_is_causal_skip=False, use_vmap=False, device="cpu", dtype=torch.float32,
                config=None)  # fmt: skip
    assert mask.dtype == torch.bool and torch.equal(mask[0, 0], torch.ones(3, 3).bool().tril()), (
        changed("the mask function of sdpa gives no bool mask, True for what is seen", "dense.py"))


# ---- attention


def test_attention_gets_what_update_gave(seen, model):
    cache = probed(model)
    assert len(seen.calls) == len(cache.layers)
    for layer, (_, query, key, value, *_) in zip(cache.layers, seen.calls):
        assert key is layer and value is layer, changed(
            "attention layers do something with what Cache.update gives", "adapter.py")
        assert query.shape == (2, 4, 2, 32) and layer.given[0].shape == (2, 2, 2, 32), changed(
            "the shapes [B, heads, T, D] of queries, keys and values", "adapter.py")


def test_attention_is_told(seen, model):
    places = torch.tensor([[3, 4], [5, 6]])
    probed(model, {"position_ids": places})
    module, *_, told = seen.calls[0]
    assert {"scaling", "dropout"} <= told.keys(), changed("no scaling for attention", "adapter.py")
    assert told["scaling"] == module.scaling == 32**-0.5
    assert told.get("position_ids") is not None, changed(
        "position_ids do not reach the attention function as a keyword", "adapter.py")
    assert torch.equal(told["position_ids"], places)


def test_attention_is_told_the_window(seen, windowed):
    probed(windowed)
    windows = [call[-1].get("sliding_window") for call in seen.calls]
    assert 4 in windows and set(windows) <= {4, None}, changed(
        "sliding_window does not reach the attention function as a keyword", "adapter.py")
    assert windows == [getattr(call[0], "sliding_window", 4) for call in seen.calls]


def test_attention_of_sdpa(tiny_model):
    model = tiny_model("Llama")
    x = torch.randn(1, 4, 3, 32)
    small = torch.randn(1, 2, 3, 32)
    out, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](
        model.model.layers[0].self_attn, x, small, small, None, dropout=0.0, scaling=0.1
    )
    assert out.shape == (1, 3, 4, 32) and weights is None, changed(
        "what the registered sdpa takes and gives", "dense.py")


def test_attention_can_be_set(seen, model):
    model.set_attn_implementation(PROBE)
    assert model.config._attn_implementation == PROBE
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(PROBE, None)
    assert interface == seen.attention, changed(
        "ALL_ATTENTION_FUNCTIONS.get_interface(name, default)", "fuse.py")


def test_repeat_kv():
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(repeat_kv(x, 2), x.repeat_interleave(2, 1)), changed("repeat_kv", "dense.py")
