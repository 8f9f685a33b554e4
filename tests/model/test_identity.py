"""Shared prefixes follow the model: whatever changes its keys ends what was known."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn

from kvlab.blocks import HashSharing
from kvlab.core import BadInput, KvlabError
from kvlab.model import PagedCache, prefill
from kvlab.model import traits as traits_of
from kvlab.model.decode import Decoder
from kvlab.model.fingerprint import fingerprint
from kvlab.model.fuse import fused
from kvlab.model.identity import LiveModel

SIZE = 8
IDS = torch.randint(1, 128, (1, 44), generator=torch.Generator().manual_seed(3))
SWITCH = {"on": False}


def paged(model, **axes) -> PagedCache:
    axes = {"prefix": "hash", "policy": "lru", "budget_blocks": 100} | axes
    axes = {"format": "fp32", "block_size": SIZE} | axes
    return PagedCache.for_model(model, **axes)


def serve(model, cache, ids=IDS, chunk=16):
    result = prefill(model, ids, cache, chunk_tokens=chunk)
    cache.finish()
    return result


def cold(model, ids=IDS, chunk=16):
    return prefill(model, ids, paged(model, prefix="none"), chunk_tokens=chunk).logits


def v_proj(model) -> nn.Linear:
    return model.model.layers[0].self_attn.v_proj


@pytest.fixture
def model(tiny_model):
    return tiny_model()


# ---- one change between two requests, and back


class Change(NamedTuple):
    """do returns what undoes it; seen: whether the quick look must see it."""

    do: Callable
    seen: bool = True


def in_place(model):
    weight = v_proj(model).weight
    before = weight.detach().clone()
    weight.add_(0.5)
    return lambda: weight.copy_(before)


def through_data(model):
    weight = v_proj(model).weight
    before = weight.detach().clone()
    weight.data.add_(0.5)
    return lambda: weight.data.copy_(before)


def new_parameter(model):
    old = v_proj(model).weight
    v_proj(model).weight = nn.Parameter(old + 0.5, requires_grad=False)
    return lambda: setattr(v_proj(model), "weight", old)


def loaded(model):
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict({n: x * 1.5 if "v_proj" in n else x for n, x in before.items()})
    return lambda: model.load_state_dict(before)


def swapped_rows(model):
    weight = v_proj(model).weight
    order = torch.arange(len(weight))
    order[[3, 5]] = order[[5, 3]]
    weight.data.copy_(weight[order])
    return lambda: weight.data.copy_(weight[order])


def forward_hook(model):
    return v_proj(model).register_forward_hook(lambda module, args, out: out + 0.5).remove


def pre_hook(model):
    return v_proj(model).register_forward_pre_hook(lambda module, args: (args[0] + 0.5,)).remove


def hook_with_switch(model):
    SWITCH["on"] = True
    return lambda: SWITCH.update(on=False)


def global_hook(model):
    inner = v_proj(model)

    def shift(module, args, out):
        return out + 0.5 if module is inner else None

    return nn.modules.module.register_module_forward_hook(shift).remove


def replaced_forward(model):
    module, old = v_proj(model), v_proj(model).forward
    module.forward = functools.wraps(old)(lambda x: old(x) + 0.5)
    return lambda: vars(module).pop("forward")


def patched_class(model):
    cls = type(model.model.layers[0].self_attn)
    old = cls.forward

    @functools.wraps(old)
    def forward(self, hidden_states, *args, **kwargs):
        return old(self, hidden_states + 0.5, *args, **kwargs)

    cls.forward = forward
    return lambda: setattr(cls, "forward", old)


def other_module(model):
    mlp, old = model.model.layers[0].mlp, model.model.layers[0].mlp.act_fn
    mlp.act_fn = nn.ReLU()
    return lambda: setattr(mlp, "act_fn", old)


class Lora(nn.Module):
    """A linear with a low-rank adapter, switched as PEFT does it: by plain attributes."""

    def __init__(self, base, disabled: bool):
        super().__init__()
        self.base, self._disable_adapters, self.scaling = base, disabled, {"default": 1.0}
        self.lora = nn.Linear(base.in_features, base.out_features, bias=False)
        self.lora.weight.requires_grad_(False)
        self._active_adapter = ["default"]

    def forward(self, x):
        if self._disable_adapters or not self._active_adapter:
            return self.base(x)
        return self.base(x) + self.scaling["default"] * self.lora(x)


def with_lora(model, disabled=False) -> Lora:
    attention = model.model.layers[0].self_attn
    if not isinstance(attention.v_proj, Lora):
        attention.v_proj = Lora(attention.v_proj, disabled)
    return attention.v_proj


def adapter_added(model):
    base = v_proj(model)
    with_lora(model)
    return lambda: setattr(model.model.layers[0].self_attn, "v_proj", base)


def adapter_disabled(model):
    lora = with_lora(model)
    lora._disable_adapters = True
    return lambda: setattr(lora, "_disable_adapters", False)


def adapter_chosen(model):
    lora = with_lora(model)
    lora._active_adapter.clear()
    return lambda: lora._active_adapter.append("default")


def adapter_scaled(model):
    lora = with_lora(model)
    lora.scaling["default"] = 3.0
    return lambda: lora.scaling.update(default=1.0)


def frequencies(model):
    rotary = model.model.rotary_emb
    rotary.inv_freq.mul_(0.5)
    return lambda: rotary.inv_freq.mul_(2.0)


def attribute(model):
    norm = model.model.layers[0].input_layernorm
    norm.variance_epsilon = 0.5
    return lambda: setattr(norm, "variance_epsilon", 1e-6)


def autocast(model):
    context = torch.autocast("cpu", torch.bfloat16)
    context.__enter__()
    return lambda: context.__exit__(None, None, None)


CHANGES = {
    "in_place": Change(in_place), "data": Change(through_data, seen=False),
    "rows": Change(swapped_rows, seen=False), "parameter": Change(new_parameter),
    "load_state_dict": Change(loaded), "hook": Change(forward_hook), "pre_hook": Change(pre_hook),
    "switch": Change(hook_with_switch), "global": Change(global_hook),
    "forward": Change(replaced_forward), "class": Change(patched_class),
    "module": Change(other_module), "adapter": Change(adapter_added),
    "disabled": Change(adapter_disabled), "active": Change(adapter_chosen),
    "scaling": Change(adapter_scaled), "rotary": Change(frequencies),
    "attribute": Change(attribute), "autocast": Change(autocast),
}  # fmt: skip


def prepared(model, name):
    """The hook and the adapter that some changes switch are there from the start."""
    if name in ("disabled", "active", "scaling"):
        with_lora(model)
    if name == "switch":
        v_proj(model).register_forward_hook(lambda m, a, out: out + 0.5 if SWITCH["on"] else out)
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_requests_ends_what_was_known(model, name):
    cache = paged(prepared(model, name))
    assert serve(model, cache).cached == 0 and serve(model, cache).cached == 40
    undo = CHANGES[name].do(model)
    try:
        assert cache.facts.moved() or not CHANGES[name].seen
        changed = serve(model, cache)
        assert changed.cached == 0 and torch.equal(changed.logits, cold(model))
        assert serve(model, cache).cached == 40
    finally:
        undo()
    back = serve(model, cache)
    assert back.cached == 0 and torch.equal(back.logits, cold(model))
    assert not torch.equal(back.logits, changed.logits) and cache.renewals == 2
    cache.check()


@pytest.mark.parametrize("name", [name for name in CHANGES if name not in ("class", "global")])
def test_a_change_between_chunks_is_published_by_nobody(model, name):
    """Also where the old model is back when the request ends, if the quick look can see it."""
    cache = paged(prepared(model, name))
    serve(model, cache, IDS[:, :20])
    prefill(model, IDS[:, :16], cache)
    assert cache.stats().prefix_tokens == 16
    undo = CHANGES[name].do(model)
    try:
        prefill(model, IDS[:, 16:32], cache)
    finally:
        if CHANGES[name].seen:
            undo()
    prefill(model, IDS[:, 32:], cache)
    cache.check()
    cache.finish()
    cache.check()
    result = serve(model, cache)
    assert result.cached == 0 and torch.equal(result.logits, cold(model))


def test_a_model_in_training_is_another_model(tiny_model):
    """With attention dropout it is refused altogether."""
    model = tiny_model()
    cache = paged(model)
    serve(model, cache)
    model.train()
    assert serve(model, cache).cached == 0
    model.eval()
    assert serve(model, cache).cached == 0


def test_inference_tensors_are_read(model):
    with torch.inference_mode():
        v_proj(model).weight = nn.Parameter(v_proj(model).weight * 1.0, requires_grad=False)
    cache = paged(model)
    serve(model, cache)
    with torch.inference_mode():
        v_proj(model).weight.add_(0.5)
    result = serve(model, cache)
    assert result.cached == 0 and torch.equal(result.logits, cold(model))


def test_equal_contents_at_another_place_are_the_same_model(model):
    cache = paged(model)
    serve(model, cache)
    v_proj(model).weight = nn.Parameter(v_proj(model).weight.clone(), requires_grad=False)
    with fused(model):
        assert serve(model, cache).cached == 40
    model(IDS, output_hidden_states=True)  # the library leaves hooks that only look on
    assert serve(model, cache).cached == 40 and cache.renewals == 0


def test_autocast_ends_before_the_request_does(model):
    cache = paged(model)
    for known in (0, 40):
        with torch.autocast("cpu", torch.bfloat16):
            result = prefill(model, IDS, cache)
        cache.finish()
        assert result.cached == known


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("offload", ["none", "host"])
def test_blocks_of_the_old_model_are_freed_when_nobody_reads_them(model, hold, offload):
    cache = paged(model, prefix=HashSharing(hold=hold), offload=offload)
    serve(model, cache)
    prefill(model, IDS, cache)  # reads 5 known blocks
    child = cache.fork(cache.rows[0])
    handle = cache.attach_prefix(IDS[0].tolist())
    v_proj(model).weight.add_(0.5)
    decoder = Decoder(model, cache, driver="static")
    decoder.step(torch.tensor([5]))
    assert (cache.renewals, cache.stats().prefix_tokens, handle.pinned) == (1, 0, False)
    assert cache.stats().blocks >= 5
    cache.check()
    cache.finish()
    cache.check()
    assert cache.stats().blocks >= 5
    cache.close(child)
    cache.check()
    assert cache.stats().blocks == 0


def test_a_handle_of_the_old_model_is_refused(model, tmp_path):
    cache = paged(model)
    serve(model, cache)
    handle = cache.attach_prefix(IDS[0].tolist())
    v_proj(model).weight.add_(0.5)
    serve(model, cache)
    with pytest.raises(KvlabError, match="changed since this prefix handle"):
        cache.save(tmp_path / "store", [handle])
    cache.release_prefix(handle)  # nothing is left to release
    assert cache.attach_prefix(IDS[0].tolist()).tokens == 40
    cache.check()


def test_save_writes_the_identity_of_now(model, tiny_model, tmp_path):
    cache, old = paged(model), tiny_model()
    serve(model, cache)
    v_proj(model).weight.add_(0.5)
    with pytest.raises(KvlabError, match="model has changed"):
        cache.save(tmp_path / "store")
    serve(model, cache)
    cache.save(tmp_path / "store")
    with pytest.raises(BadInput, match="made with another model"):
        paged(old).load(tmp_path / "store")
    v_proj(old).weight.add_(0.5)
    fresh = paged(old)
    assert fresh.load(tmp_path / "store").tokens == 40
    v_proj(model).weight.mul_(2.0)
    with pytest.raises(BadInput, match="made with another model"):
        cache.load(tmp_path / "store")  # the object that wrote it


def test_save_refuses_rows_that_two_models_computed(model, tmp_path):
    cache = paged(model)
    prefill(model, IDS[:, :20], cache)
    v_proj(model).weight.add_(0.5)
    prefill(model, IDS[:, 20:], cache)
    with pytest.raises(KvlabError, match="running sequence"):
        cache.save(tmp_path / "store")
    with pytest.raises(KvlabError, match="running sequence"):
        cache.cache_prefix(IDS[0].tolist(), seq=cache.rows[0])


def test_reset_takes_the_model_of_now(model):
    cache = paged(model)
    serve(model, cache)
    v_proj(model).weight.data.add_(0.5)
    cache.reset()
    assert cache.facts.identity == LiveModel(model).identity
    assert serve(model, cache).cached == 0 and serve(model, cache).cached == 40


def test_a_store_under_a_foreign_hook_is_of_this_process(model, tmp_path, monkeypatch):
    v_proj(model).register_forward_hook(lambda module, args, out: out + 0.5)
    cache = paged(model)
    serve(model, cache)
    cache.save(tmp_path / "store")
    assert paged(model).load(tmp_path / "store").tokens == 40
    monkeypatch.setattr(traits_of, "PROCESS", "another")
    with pytest.raises(BadInput, match="made with another model"):
        paged(model).load(tmp_path / "store")


def test_two_models(model, tiny_model):
    other = tiny_model()
    cache = paged(model)
    serve(model, cache)
    PagedCache.for_model(other)  # attends through kvlab, has never shared a prefix
    for _ in range(2):
        with pytest.raises(KvlabError, match="another model object"):
            prefill(other, IDS, cache)
        cache.finish()
        paged(other)  # now its forwards are seen, too
    assert serve(model, cache).cached == 40


def test_a_model_that_is_gone_shares_nothing(tiny_model):
    model = tiny_model()
    cache = paged(model)
    serve(model, cache)
    facts, identity = cache.facts, cache.facts.identity
    del model
    assert facts.read() != identity and cache.recheck() and cache.stats().prefix_tokens == 0


def test_without_sharing_nobody_looks(model, monkeypatch):
    monkeypatch.setattr(LiveModel, "__init__", lambda *args: pytest.fail("looked"))
    cache = paged(model, prefix="none")
    serve(model, cache)
    assert not model._forward_pre_hooks and not cache.facts.moved()


ROPES = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 64,
                 "short_factor": [1.0] * 16, "long_factor": [1.5] * 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_frequencies_that_depend_on_the_length_are_not_shared(tiny_model, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4} | ROPES[kind]
    model = tiny_model("Llama", max_position_embeddings=64, rope_parameters=rope)
    paged(model, prefix="none")
    if kind in ("dynamic", "longrope"):
        with pytest.raises(BadInput, match=f"prefix=hash: .* type {kind}"):
            paged(model)
    else:
        cache = paged(model)
        serve(model, cache, IDS.repeat(1, 4))
        assert serve(model, cache).cached == 40


# ---- the fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(6, 8), (5, 3), (7,), (2, 3, 4), (), (0, 4)])
def test_every_element_counts(dtype, shape):
    x = torch.zeros(shape, dtype=dtype)
    first = fingerprint([x])
    assert first == fingerprint([x.clone()]) and len(first) == 16
    for i in range(x.numel()):
        y = x.clone()
        y.view(-1)[i] = 1
        assert fingerprint([y]) != first
    assert fingerprint([x, x]) != first


def test_unaligned_and_strided_tensors():
    base = torch.arange(100, dtype=torch.bfloat16)
    for x in (base[1:97].view(12, 8), base[:96].view(8, 12).t(), base[3::7]):
        assert fingerprint([x]) == fingerprint([x.clone().contiguous()])


def test_weights_in_no_memory_are_refused():
    with pytest.raises(BadInput, match="device meta"):
        fingerprint([torch.zeros(4, device="meta")])
