"""What a lossy cache made for request A costs request B, with the sharing rule and without.

    python experiments/prefix_damage/bench.py --out results.jsonl [--tokens 1536] [--documents 3]

Request A reads a document while somebody else holds most blocks, so half of it is evicted.
Then there is room, and request B reads two thirds of the same document and 64 tokens of its own:
alone, it would lose nothing. A CPU is enough.
"""

from __future__ import annotations

import argparse
import json
from unittest import mock

import torch

from kvlab.blocks import HashSharing, Shared
from kvlab.eval.data import Books
from kvlab.model import PagedCache, prefill
from kvlab.model.load import ReferenceModel
from kvlab.model.prefill import forward_chunk
from kvlab.window import SinkWindow

SIZE, NEW, CHUNK = 16, 64, 256


def careless(self, claim, e) -> None:
    """No rule: whatever was computed may be shared."""
    claim.clean = e.past + e.count


def answer(model, cache, ids) -> torch.Tensor:
    """Log-probabilities [NEW, V] of B's own tokens."""
    prefill(model, ids[None, :-NEW], cache, chunk_tokens=CHUNK)
    logits = forward_chunk(model, ids[None, -NEW:], cache)[0]
    cache.finish()
    return logits.float().log_softmax(-1)


def requests(documents, index: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A: a whole document; B: two thirds of it, then the beginning of another."""
    texts = [torch.as_tensor(d.ids).long() for d in documents]
    head = texts[index][: 2 * tokens // 3 // SIZE * SIZE]
    return texts[index], torch.cat([head, texts[(index + 1) % len(texts)][:NEW]])


def measure(model, a, b, policy: str) -> dict:
    axes = {"format": "fp32", "block_size": SIZE}
    full = answer(model, PagedCache.for_model(model, **axes), b)
    blocks = len(a) // SIZE
    cache = PagedCache.for_model(
        model, **axes, policy=policy, budget_blocks=2 * blocks, window=SinkWindow(SIZE, 4 * SIZE),
        prefix=HashSharing(hold=False),
    )
    other = torch.randint(model.config.vocab_size, (1, 3 * blocks // 2 * SIZE))
    prefill(model, other, cache, chunk_tokens=CHUNK)
    handle = cache.cache_prefix(other[0].tolist())  # somebody else: half of a document is left
    cache.finish()
    prefill(model, a[None], cache, chunk_tokens=CHUNK)
    cache.finish()
    cache.release_prefix(handle)
    got = answer(model, cache, b)
    kl = (full.exp() * (full - got)).sum(-1)
    found, stats = cache.audit()[-1], cache.stats()
    return {"kl_mean_nats": float(kl.mean()), "kl_max_nats": float(kl.max()),
            "blocks": len(found["codes"]), "hit": found["hit"], "gap": found["behind_gap"],
            "evictions": stats.evictions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=["fifo", "lru"])
    args = parser.parse_args()
    loaded = ReferenceModel().load("cpu")
    documents = Books().documents(loaded.tokenizer, args.documents, args.tokens)
    with open(args.out, "a") as file:
        for policy in args.policies:
            for index in range(len(documents)):
                a, b = requests(documents, index, args.tokens)
                row = {"policy": policy, "document": documents[index].id, "tokens": args.tokens}
                row["rule"] = measure(loaded.model, a, b, policy)
                with mock.patch.object(Shared, "_note_clean", careless):
                    row["no_rule"] = measure(loaded.model, a, b, policy)
                print(json.dumps(row), file=file, flush=True)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
