"""A model without weights: what its configuration alone says of its size."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvlab.core import BadInput
from kvlab.model.portrait import Portrait, portrait
from kvlab.model.room import activation_bytes


class Outline(NamedTuple):
    """portrait: shapes of the layers. parameters: all of them, shared ones once.

    chunk_token_bytes: what a token of a prefill chunk needs, see `room.activation_bytes`.
    positions: tokens that the model was made for; None where it does not say.
    """

    portrait: Portrait
    parameters: int
    chunk_token_bytes: int
    positions: int | None


def outline(config: dict) -> Outline:
    """Of the model that a `config.json` describes; made on the meta device, so nothing is
    allocated. Raises `BadInput` for a model that a `PagedCache` cannot serve."""
    given = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **given)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made).to("meta")  # what does not listen, too
        model.tie_weights()  # which a move may undo, and what is shared counts once
    except (ValueError, TypeError, RuntimeError) as error:
        raise BadInput("model", config["model_type"],
                       f"cannot be made from its configuration: {error}") from error
    text = made.get_text_config(decoder=True)
    return Outline(portrait(model.eval()), sum(p.numel() for p in model.parameters()),
                   activation_bytes(text), getattr(text, "max_position_embeddings", None))
