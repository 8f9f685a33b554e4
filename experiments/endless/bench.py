"""100,000 tokens decoded one at a time through a window: memory, speed, and loss on the way.

    python experiments/endless/bench.py --out results.jsonl [--tokens 100000] [--arms kept,moved]

The tokens are a held-out book's: each step is a step of generation, and what the model would have
said can be scored. Every 1,000 tokens a line: bytes, seconds, mean loss since the last one.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from kvlab.cache import CacheSpec
from kvlab.eval.data import Books
from kvlab.model import PagedCache
from kvlab.model.decode import Decoder
from kvlab.model.device import prepare_device
from kvlab.model.load import ReferenceModel
from kvlab.model.prefill import prefill
from kvlab.track.environment import revision
from kvlab.window import SinkWindow

ARMS = {  # name -> how kept tokens are positioned
    "kept": SinkWindow(4, 1020, middle=False),
    "moved": SinkWindow(4, 1020, middle=False, rerotate=True),
}
EVERY = 1000  # tokens


def resident_mib() -> float:
    """The most that this process has held in memory, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Lines:
    """Appends a line of what `cache` holds for every `EVERY` tokens."""

    def __init__(self, file, told: dict, cache: PagedCache):
        self.file, self.told, self.cache = file, told, cache
        self.started, self.losses = time.perf_counter(), []

    def step(self, done: int, loss: torch.Tensor) -> None:
        self.losses.append(loss)
        if done % EVERY:
            return
        stats, now = self.cache.stats(), time.perf_counter()
        line = self.told | {
            "done": done, "tokens_per_second": EVERY / (now - self.started),
            "nll_mean": float(torch.stack(self.losses).mean()), "resident_mib": resident_mib(),
            "cache_allocated_bytes": stats.allocated_bytes, "evictions": stats.evictions,
            "cache_peak_bytes": stats.peak_allocated_bytes,
            "resident_tokens": round(stats.tokens * stats.resident_tokens_percent / 100),
        }  # fmt: skip
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self.started, self.losses = now, []


@torch.inference_mode()
def run(arm: str, loaded, ids: torch.Tensor, file, told: dict) -> None:
    cache = PagedCache.for_model(loaded.model, CacheSpec(window=ARMS[arm], block_size=16))
    prefill(loaded.model, ids[None, :1], cache)
    decoder, lines = Decoder(loaded.model, cache), Lines(file, told | {"arm": arm}, cache)
    for at in range(1, len(ids) - 1):
        logits = decoder.step(ids[at : at + 1])
        lines.step(at, F.cross_entropy(logits.float(), ids[at + 1 : at + 2]))
    cache.check()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = prepare_device(args.device, None)
    loaded = ReferenceModel().load(device)
    [document] = Books().documents(loaded.tokenizer, 1, args.tokens + 2)
    ids = torch.from_numpy(document.ids).long().to(device)
    told = {"model": loaded.name, "device": str(device), "commit": revision()["commit"],
            "book": document.id}  # fmt: skip
    with args.out.open("a") as file:
        for arm in args.arms.split(","):
            run(arm, loaded, ids, file, told)


if __name__ == "__main__":
    main()
