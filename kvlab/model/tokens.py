"""Which tokens a forward computes: a shared prefix is known by them, attention never sees them."""

from __future__ import annotations

from torch import Tensor

from kvlab.cache import PagedCache


def left_pads(ids: Tensor, mask: Tensor | None) -> list[int] | None:
    """Columns of padding before each row of `ids` [B, T]; None where padding is elsewhere too."""
    if mask is None:
        return [0] * len(ids)
    if mask.shape != ids.shape or bool((mask[:, 1:] < mask[:, :-1]).any()):
        return None
    return (mask.shape[1] - mask.sum(1)).tolist()


def usual(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> bool:
    """Whether prompts [B, T] stand at positions 0, 1, ... behind padding on the left at most."""
    if mask is not None and mask.dim() != 2:
        return False
    pads = left_pads(ids, mask)
    if pads is None or positions is None:
        return pads is not None
    ends = positions[:, -1].expand(len(ids)).tolist()
    return ends == [ids.shape[1] - pad - 1 for pad in pads]


def watch_tokens(model) -> None:
    """Let caches of `model` see the token ids of each forward: attention sees only their states."""
    if _watching not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_watching, with_kwargs=True)


def _watching(model, args, kwargs):
    """Note the ids; at the first forward of a request, leave out what the cache knows already.

    Only where the caller wants the last logits alone, as `generate()` does: otherwise he would
    get fewer than he gave tokens.
    """
    cache = kwargs.get("past_key_values")
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(cache, PagedCache) or not cache.spec.prefix.shares or ids is None:
        return None
    cache.coming = ids, kwargs.get("position_ids")
    if cache.rows or args or kwargs.get("logits_to_keep") != 1 or ids.shape[1] < 2:
        return None
    if not usual(ids, kwargs.get("attention_mask"), kwargs.get("position_ids")):
        return None
    skip = cache.start(ids, kwargs.get("attention_mask"))
    cut = {name: kwargs[name][:, skip:] for name in ("input_ids", "position_ids")
           if kwargs.get(name) is not None}
    cache.coming = cut["input_ids"], cut.get("position_ids")
    return args, kwargs | cut
