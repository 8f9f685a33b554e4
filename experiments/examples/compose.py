"""Compose a cache from axes and hand it to generate().

    python experiments/examples/compose.py
"""

from __future__ import annotations

import torch

import kvlab
from kvlab.model.load import ReferenceModel

TEXT = "It was a dark evening, and the ship lay at anchor below the cliffs. " * 12


def answers(model, ids: torch.Tensor, new_tokens: int = 24) -> dict[str, tuple[list[int], int]]:
    """Name of a cache -> the tokens it makes behind `ids` [1, T], and the bytes it then uses."""
    caches = {
        "full": kvlab.PagedCache.for_model(model, block_size=16),
        "4-bit keys, 2-bit values": kvlab.PagedCache.for_model(
            model, format="k4v2", block_size=16),
        "8 bits, half of the tokens": kvlab.PagedCache.for_model(
            model, format="int8", policy="snapkv", budget_percent=50, block_size=16),
        "4 sinks and 64 recent tokens": kvlab.PagedCache.for_model(
            model, window=kvlab.axes.by_name("window", "sink", sinks=4, recent=64, middle=False),
            block_size=16),
    }  # fmt: skip
    found = {}
    for name, cache in caches.items():
        kvlab.prefill(model, ids[:, :-1], cache, chunk_tokens=64)  # the last token: generate()'s
        out = model.generate(ids, past_key_values=cache, max_new_tokens=new_tokens,
                             do_sample=False)  # fmt: skip
        found[name] = out[0, ids.shape[1] :].tolist(), cache.stats().logical_bytes
    return found


def main() -> None:
    loaded = ReferenceModel().load("cpu")
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    for name, (tokens, in_use) in answers(loaded.model, ids).items():
        print(f"{name:30} {in_use / 1e3:7.0f} kB  {loaded.tokenizer.decode(tokens)!r}")


if __name__ == "__main__":
    main()
