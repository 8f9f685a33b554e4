"""`python -m kvlab.model.gates MODEL OUT.json`: how much each key/value head of a model retrieves.

For `budget=duo budget.gates=OUT.json`. MODEL is a checkpoint folder or a GGUF file.

Drawn tokens are read twice, and a head's gate is the attention that the second reading gives to
tokens beyond the window, the mean over queries, the most of a group's query heads: a head that
copies looks back at the first reading (induction heads, https://arxiv.org/abs/2209.11895).
Differs from DuoAttention (https://arxiv.org/abs/2410.10819), which trains its gates on passkeys.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from kvlab.core import BadInput
from kvlab.model.load import FolderModel


@torch.inference_mode()
def retrieval_gates(
    model, *, tokens: int = 256, sinks: int = 4, recent: int = 64, draws: int = 4, seed: int = 0
) -> list[list[float]]:
    """For each layer a number from 0 to 1 for each key/value head.

    tokens: of one reading; sinks, recent: the window beyond which attention counts; draws: texts.
    Sets the model's attention to "eager" and back. Raises `BadInput` where nothing is beyond.
    """
    if tokens <= sinks + recent:
        raise BadInput("tokens", tokens, f"must be more than {sinks + recent}, the window")
    own = model.config._attn_implementation
    draw, config = torch.Generator().manual_seed(seed), model.config.get_text_config()
    model.set_attn_implementation("eager")
    try:
        found = []
        for _ in range(draws):
            once = torch.randint(0, config.vocab_size, (1, tokens), generator=draw)
            ids = torch.cat((once, once), 1).to(model.device)
            layers = model(ids, output_attentions=True, use_cache=False).attentions
            found.append([_beyond(x[0], tokens, sinks, recent) for x in layers])
    finally:
        model.set_attn_implementation(own)
    heads = config.num_key_value_heads
    by_layer = [torch.stack(layer).mean(0) for layer in zip(*found)]
    return [x.unflatten(0, (heads, -1)).amax(-1).tolist() for x in by_layer]


def _beyond(weights: Tensor, tokens: int, sinks: int, recent: int) -> Tensor:
    """Of attention [Hq, 2n, 2n] what the second half gives to what lies beyond the window: [Hq]."""
    at = torch.arange(2 * tokens, device=weights.device)
    far = (at >= sinks) & (at <= at[tokens:, None] - recent)
    return (weights[:, tokens:].float() * far).sum(-1).mean(-1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m kvlab.model.gates", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    for name, default in (("tokens", 256), ("sinks", 4), ("recent", 64), ("draws", 4), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = vars(parser.parse_args(arguments))
    path, out = given.pop("model"), given.pop("out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gates = retrieval_gates(FolderModel(path).load(torch.device(device)).model, **given)
    out.write_text(json.dumps(gates))


if __name__ == "__main__":
    main()
