"""What a PagedCache cannot compute rightly, and so does not compute at all."""

from __future__ import annotations

import torch
from torch import Tensor

from kvlab.core import BadInput, KvlabError
from kvlab.kinds import shown

# Arguments of the library's attention that change nothing here. What is none of them and not None
# might be a bias or something that nobody here has heard of: to attend without it would be wrong.
HARMLESS = {
    "use_cache", "output_hidden_states", "output_router_logits", "num_items_in_batch",
    "cache_position", "return_dict", "logits_to_keep",
}


def refuse_ids(model, ids: Tensor, mask: Tensor | None = None) -> None:
    """Raises `BadInput` for what are no token ids [B, T] of `model`, or a mask of another shape.

    An id beyond the embeddings is an IndexError on a CPU; on a GPU it ends the process.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise BadInput("input_ids", shown(getattr(ids, "dtype", ids)),
                       "must be a tensor of token ids, int64 or int32")
    if ids.dim() != 2 or not ids.numel():
        raise BadInput("input_ids", list(ids.shape), "must be rows and tokens, 1 or more")
    if mask is not None and getattr(mask, "shape", None) != ids.shape:
        raise BadInput("attention_mask", shown(getattr(mask, "shape", mask)),
                       f"must have the shape of the ids, {list(ids.shape)}")
    refuse_unknown_ids("input_ids", model, *torch.stack(torch.aminmax(ids)).tolist())


def refuse_unknown_ids(key: str, model, least: int, most: int) -> None:
    """Raises `BadInput` for token ids from `least` to `most` that `model` does not embed."""
    known = vocabulary(model)
    if least < 0 or most >= known:
        raise BadInput(key, least if least < 0 else most, f"is no token of this model, whose ids "
                       f"are 0 to {known - 1}; another tokenizer?")


def vocabulary(model) -> int:
    """Tokens that a model embeds: rows of the table, which may be more than its tokenizer has."""
    return model.get_input_embeddings().weight.shape[0]


def refuse_gradients(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises `KvlabError` where a gradient would have to flow through stored keys and values."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise KvlabError("a PagedCache keeps no graph for gradients: run under torch.no_grad() or "
                         "torch.inference_mode(), or train without a cache")


def refuse_other_cap(made: float | None, asked: float | None) -> None:
    """Raises `KvlabError` where logits are to be capped in another way than the cache was told."""
    if made != asked:
        raise KvlabError(f"this cache was made for logits softly capped at {made}, and this model "
                         f"asks for {asked}")


def refuse_other_depth(layers: int, module) -> None:
    """Raises `KvlabError` where the model has another number of layers than its cache."""
    told = getattr(module.config, "num_hidden_layers", layers)
    if told != layers:
        raise KvlabError(f"this cache was made for {layers} layers, this model has {told}")


def refuse_unknown(module, dropout: float, told: dict) -> None:
    """Raises `KvlabError` for anything that attention was asked for and does not do."""
    if dropout:
        raise KvlabError(f"attention dropout of {dropout} is on: a PagedCache serves inference; "
                         "call model.eval()")
    weights = told.pop("output_attentions", None) or getattr(
        module.config, "output_attentions", False
    )
    if weights:
        raise KvlabError("output_attentions: attention over a PagedCache makes no matrix of "
                         "weights; take DynamicCache with eager attention for those")
    causal = told.pop("is_causal", None)
    if causal is False or not getattr(module, "is_causal", True):
        raise KvlabError("a PagedCache attends causally, and this model asks for both directions")
    odd = [name for name, x in told.items() if x is not None and name not in HARMLESS]
    if odd:
        raise KvlabError(f"attention over a PagedCache does not know the argument {odd[0]!r} that "
                         f"{type(module).__name__} was given")


def refuse_misfit(made: tuple[int, int, int, int], q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises `KvlabError` where a layer has other heads or widths than its cache was made for.

    made: query heads, key/value heads, widths of a key and of a value. q, k, v: [B, heads, T, D].
    """
    found = q.shape[1], k.shape[1], k.shape[3], v.shape[3]
    if found != made:
        raise KvlabError(f"this cache was made for {made[0]} query heads, {made[1]} key/value "
                         f"heads and a head width of {_width(*made[2:])}; this model has "
                         f"{found[0]}, {found[1]} and {_width(*found[2:])}")


def _width(k: int, v: int) -> str:
    return f"{k}" if k == v else f"{k} for keys and {v} for values"
