"""Which tokens a forward computes: a shared prefix is known by them, attention never sees them."""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch
from torch import Tensor

from kvlab.core import KvlabError

# Arguments of a forward under which the same token ids have the same keys. Any other tensor
# (soft prompts, types, embeddings) may make other keys.
PLAIN = ("input_ids", "attention_mask", "position_ids", "cache_position", "labels",
         "logits_to_keep")  # fmt: skip
WHOLE = ("labels", "output_hidden_states", "output_attentions")  # these want all given tokens


class Watched:
    """A cache that hears of the model's forwards: what `PagedCache` is for this file."""


def left_pads(ids: Tensor, mask: Tensor | None) -> list[int] | None:
    """Columns of padding before each row of `ids` [B, T]; None where padding is elsewhere too."""
    if mask is None:
        return [0] * len(ids)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return None
    real = mask != 0  # as the library reads masks of any dtype
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        return None
    return (real.shape[1] - real.sum(1)).tolist()


def usual(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> bool:
    """Whether prompts [B, T] stand at positions 0, 1, ... behind padding on the left at most.

    positions: [B, T] or [1, T]; what stands at padding does not matter.
    """
    pads = left_pads(ids, mask)
    if pads is not None and positions is None:
        return not any(pads)  # the model then counts padding, too
    return pads is not None and in_order(positions, [0] * len(ids), pads, ids.shape[1])


def in_order(
    positions: Tensor | None, firsts: list[int], pads: list[int], columns: int
) -> bool:
    """Whether row b of `positions` counts from `firsts[b]` on behind `pads[b]` columns."""
    if positions is None:
        return True
    rows = len(firsts)
    if positions.dim() != 2 or positions.shape[1] != columns or len(positions) not in (1, rows):
        return False
    column = torch.arange(columns)
    pad, first = torch.tensor([pads, firsts])[:, :, None].long()
    apart = positions.cpu() != column - pad + first
    return not bool((apart & (column >= pad)).any())


def watch_tokens(model) -> None:
    """Let caches of `model` see the token ids of each forward: attention sees only their states."""
    if _watching not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_watching, with_kwargs=True)
        model.register_forward_hook(_forgetting, with_kwargs=True, always_call=True)


def watch_ends(model) -> None:
    """Let caches of `model` know when a forward has ended, however it did."""
    decoder = model.get_decoder()
    if _ended not in decoder._forward_hooks.values():
        decoder.register_forward_hook(_ended, with_kwargs=True, always_call=True)


def _ended(decoder, args, kwargs, output):
    """What did not go through all layers is undone; without an error of its own it is one."""
    for cache in (*args, *kwargs.values()):
        if not isinstance(cache, Watched):
            continue
        layers = cache.undo_forward()
        if output is not None and layers is not None:
            raise KvlabError(f"this forward attended over its PagedCache in {layers} of "
                             f"{cache.geometry.layers} layers, and nothing was stored: the cache "
                             "was made for another model, or layers were left out")


def _watching(model, args, kwargs):
    """Note the ids; at the first forward of a request, leave out what the cache knows already.

    Only where the caller wants the last logits alone, as `generate()` does: otherwise he would
    get fewer than he gave tokens.
    """
    cache = _cache_of(args, kwargs)
    if cache is None:
        return None
    cache.facts.check(model)
    if cache.begun_by_hook:
        cache.undo_forward()  # nobody heard of its end: an interrupt is no error to torch
        raise KvlabError("the forward before was interrupted; it is undone now, so run this one "
                         "again")
    cache.coming = None
    call = signature_of(type(model)).bind_partial(model, *args, **kwargs)
    given = named(call)
    if not cache.rows and _may_start(model, given):
        return _started(cache, call, given)  # which looks at the model
    cache.glance() if cache.rows else cache.recheck()
    if given.get("input_ids") is not None and _plain(given):
        cache.coming = given["input_ids"], given.get("position_ids")
    else:
        for row in cache.rows:
            cache.keep_apart(row)
    return None


def _started(cache: Watched, call: inspect.BoundArguments, given: dict):
    """Open the rows, and cut off what they know from the arguments."""
    skip = cache.start(given["input_ids"], given.get("attention_mask"))
    cache.begun_by_hook = bool(cache.rows)
    for name in ("input_ids", "position_ids", "cache_position"):
        if given.get(name) is not None:
            _replace(call, name, given[name][..., skip:])
    given = named(call)
    cache.coming = given["input_ids"], given.get("position_ids")
    return call.args[1:], call.kwargs


def _forgetting(model, args, kwargs, output):
    """What a forward did not use, since it failed or never reached attention, is of no other."""
    cache = _cache_of(args, kwargs)
    if cache is not None:
        cache.coming = None


def _cache_of(args, kwargs) -> Watched | None:
    """The cache that shares prefixes, by its type: its argument's name is the library's affair."""
    caches = (x for x in (*args, *kwargs.values()) if isinstance(x, Watched))
    return next((cache for cache in caches if cache.spec.prefix.shares), None)


@lru_cache
def signature_of(kind: type) -> inspect.Signature:
    """What the forward of a class of models takes, `self` first."""
    return inspect.signature(kind.forward)


def named(call: inspect.BoundArguments) -> dict:
    """All arguments by name, those that go into **kwargs too."""
    return {**call.arguments, **call.arguments.get("kwargs", {})}


def _replace(call: inspect.BoundArguments, name: str, value) -> None:
    place = call.arguments if name in call.arguments else call.arguments["kwargs"]
    place[name] = value


def _plain(given: dict) -> bool:
    return all(name in PLAIN for name, value in given.items() if isinstance(value, Tensor))


def _may_start(model, given: dict) -> bool:
    """Whether a first forward may begin with what is known."""
    ids, mask, positions = map(given.get, ("input_ids", "attention_mask", "position_ids"))
    return (ids is not None and ids.shape[1] > 1 and _plain(given) and _last_only(model, given)
            and usual(ids, mask, positions))


def _last_only(model, given: dict) -> bool:
    """Whether nobody will miss what is not computed."""
    keep, config = given.get("logits_to_keep"), getattr(model, "config", None)
    asked = (given[name] if given.get(name) is not None else getattr(config, name, None)
             for name in WHOLE)
    return type(keep) is int and keep == 1 and all(x is None or x is False for x in asked)
