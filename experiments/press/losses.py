"""KL of the next tokens for methods of kvlab, question-agnostic, each token of each head chosen.

    python experiments/press/losses.py MODEL snapkv random 'kvzip + adakv {"floor": 0.0}'

A context is prefilled in one chunk and compressed; the next tokens, in one step, are compared with
those over the full cache: mean KL in nats over tokens and books. MODEL is a checkpoint folder or a
GGUF file; an arm is a policy, its settings as JSON where it has some, and a budget behind a plus.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator

import torch
from torch import Tensor

from kvlab import PagedCache, axes, prefill
from kvlab.cache import CacheSpec
from kvlab.eval.data import BOOKS
from kvlab.model.load import FolderModel
from kvlab.window import SinkWindow

BEGIN = 20_000  # characters of a book that are left out


def books(tokenizer, count: int, tokens: int) -> Iterator[Tensor]:
    """Tokens [1, T] of the first `count` bundled books."""
    with lzma.open(BOOKS, "rt") as lines:
        for line, _ in zip(lines, range(count)):
            text = json.loads(line)["text"][BEGIN : BEGIN + 10 * tokens]
            yield tokenizer(text, return_tensors="pt").input_ids[:, :tokens]


def member(axis: str, told: str) -> object:
    """`kvzip` or `adakv {"floor": 0.0}`."""
    name, _, settings = told.strip().partition(" ")
    return axes.by_name(axis, name, **json.loads(settings or "{}"))


def logs(loaded, spec: CacheSpec, ids: Tensor, context: int) -> tuple[Tensor, float]:
    """Log probabilities [T, V] of what follows the context, and the share of tokens held, %."""
    cache = PagedCache.for_model(loaded.model, spec, tokenizer=loaded.tokenizer)
    prefill(loaded.model, ids[:, :context], cache, chunk_tokens=context)
    held = cache.stats().resident_tokens_percent
    at = torch.arange(context, ids.shape[1])[None]
    out = loaded.model(ids[:, context:], past_key_values=cache, position_ids=at)
    return out.logits[0].log_softmax(-1), held


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("arms", nargs="+")
    parser.add_argument("--kept", nargs="+", type=float, default=[50, 25, 10], help="percent")
    parser.add_argument("--books", type=int, default=3)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--next", type=int, default=128)
    parser.add_argument("--recent", type=int, default=64)
    given = parser.parse_args()
    loaded = FolderModel(given.model, dtype="float32").load(torch.device("cpu"))
    texts = list(books(loaded.tokenizer, given.books, given.context + given.next))
    full = [logs(loaded, CacheSpec(format="fp32"), ids, given.context)[0] for ids in texts]
    print("| arm | " + " | ".join(f"{kept:g} %" for kept in given.kept) + " |")
    print("|---|" + "---|" * len(given.kept))
    for arm in given.arms:
        policy, _, budget = arm.partition("+")
        found = []
        for kept in given.kept:
            spec = CacheSpec(
                format="fp32", policy=member("policy", policy), block_size=1, evict="token",
                budget=member("budget", budget or "equal"), groups="per_head",
                budget_percent=kept, window=SinkWindow(4, given.recent),
            )
            each = [logs(loaded, spec, ids, given.context) for ids in texts]
            loss = [(a.exp() * (a - b)).sum(-1).mean().item() for a, (b, _) in zip(full, each)]
            held = sum(share for _, share in each) / len(each)
            found.append(f"{sum(loss) / len(loss):.4f} ({held:.1f} held)")
        print(f"| {arm.strip()} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
