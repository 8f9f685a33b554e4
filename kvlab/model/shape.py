"""What a cache and its drivers must know of a model: its windows and its rotary frequencies."""

from __future__ import annotations

from torch import Tensor

from kvlab.core import BadInput

FIXED = ("default", "linear", "yarn", "llama3", "proportional")  # one set of frequencies, ever


def sliding_window(attention) -> int | None:
    """The sliding window in tokens that an attention layer of the library goes by, None without.

    Layers that differ in it know their own; in other models the config has the one of all layers.
    """
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(getattr(attention, "config", None), "sliding_window", None)


def rotary_frequencies(model) -> Tensor | None:
    """The frequencies [D / 2] by which keys are rotated; None where they depend on the length, or
    on the kind of layer."""
    if not rope_types(model) <= set(FIXED):
        return None
    return getattr(_rotary(model), "inv_freq", None)


def rope_types(model) -> set[str]:
    """Names of the rotary types of all kinds of layers, "default" where the model does not say."""
    told = getattr(_rotary(model), "rope_type", "default")
    return set(map(str, told.values() if isinstance(told, dict) else [told]))


def check_shared_rotary(model) -> None:
    """Raises `BadInput` for prefix=hash where keys depend on the length of the whole input."""
    odd = rope_types(model) - set(FIXED)
    if odd:
        raise BadInput("prefix", "hash", f"cannot share keys of rotary type {odd.pop()}, whose "
                                         "frequencies depend on the length; choose prefix=none")


def _rotary(model):
    return getattr(model.get_decoder(), "rotary_emb", None)
