"""`python -m kvlab.model.centres MODEL TEXT OUT.json`: where a model's queries point.

For `policy=triattention policy.centres=OUT.json`. MODEL is a checkpoint folder or a GGUF file, TEXT
a file of the kind of text that the model will read and write, and not one that it is judged by.

For each layer, query head and pair of dims that rotary positions turn together: the mean of the
queries before rotation, as a complex number, and of their lengths.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvlab.core import BadInput
from kvlab.model.load import FolderModel
from kvlab.model.shape import rotary_frequencies

LISTENING = "kvlab_listening"  # sdpa, and somebody hears of the queries


@torch.inference_mode()
def query_centres(model, ids: Tensor) -> dict[str, list]:
    """Of `ids` [B, T], texts of their own: "real", "imaginary" and "norm", each a number for each
    layer, query head and pair of dims.

    Sets the model's attention and sets it back. Raises `BadInput` without plain rotary positions.
    """
    turn = rotary_frequencies(model)
    if turn is None:
        raise BadInput("model", type(model).__name__, "has no plain rotary positions, by which "
                       "policy=triattention scores")
    at = torch.arange(ids.shape[1], device=ids.device)[:, None] * turn.double()
    back = torch.polar(torch.ones_like(at), -at)
    sums: dict[int, Tensor] = {}

    def listen(module, query, *more, **how):
        if query.shape[-1] != 2 * len(turn):
            raise BadInput("model", type(model).__name__, "turns a part of its heads' dims only, "
                           "which policy=triattention does not know")
        first, second = query.double().chunk(2, -1)  # [B, Hq, T, D / 2]
        plain = torch.complex(first, second) * back
        new = torch.stack([plain.sum((0, 2)), plain.abs().sum((0, 2)).to(plain.dtype)])
        sums[module.layer_idx] = sums.get(module.layer_idx, 0) + new
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *more, **how)

    own = model.config._attn_implementation
    AttentionInterface.register(LISTENING, listen)
    AttentionMaskInterface.register(LISTENING, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(LISTENING)
    try:
        for row in ids:
            model(row[None], use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(own)
    found = torch.stack([sums[layer] for layer in sorted(sums)]) / ids.numel()
    parts = {"real": found[:, 0].real, "imaginary": found[:, 0].imag, "norm": found[:, 1].real}
    return {name: x.float().tolist() for name, x in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m kvlab.model.centres", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of a piece, read by itself")
    parser.add_argument("--pieces", type=int, default=8)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = FolderModel(given.model).load(device)
    ids = loaded.tokenizer(given.text.read_text(), add_special_tokens=False)["input_ids"]
    pieces = min(given.pieces, len(ids) // given.tokens)
    if pieces < 1:
        raise BadInput("text", str(given.text), f"has {len(ids)} tokens, less than a piece of "
                       f"{given.tokens}; give more text, or fewer --tokens")
    ids = torch.tensor(ids[: pieces * given.tokens], device=device).view(pieces, -1)
    given.out.write_text(json.dumps(query_centres(loaded.model, ids)))


if __name__ == "__main__":
    main()
