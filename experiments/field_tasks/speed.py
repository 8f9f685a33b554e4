"""How fast a study of tasks is: each cache beside plain chunked forwards of the same tokens.

    python experiments/field_tasks/speed.py MODEL [--tokens 4096 16384] [--items 6]

MODEL: a checkpoint folder or GGUF file. For each length: seconds of the library's own forward over
its DynamicCache, in the same chunks; then for each cache seconds of an item (the median; the first
one compiles and captures), tokens that it decoded, prompt tokens a second, and its time over what
one forward and 2 ms for each decoded token are (1.5 at most was asked for). --profile NAME prints
where the host spends its time in that cache.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import torch
from transformers import DynamicCache

from kvlab.cache import CacheSpec
from kvlab.eval.runner import Runner
from kvlab.eval.tasks import NiahSingle2, Protocol
from kvlab.model.library import cache_parameter
from kvlab.model.load import FolderModel
from kvlab.window import SinkWindow

TOKEN = 0.002  # seconds of a decoded token that a study may take
CACHES = {
    "bf16": {}, "int8": {"format": "int8"}, "snapkv": {"policy": "snapkv"},
    "tova": {"policy": "tova"}, "attention_mass": {"policy": "attention_mass"},
    "expected_attention": {"policy": "expected_attention"}, "key_diff": {"policy": "key_diff"},
    "compactor": {"policy": "compactor"}, "kvzip": {"policy": "kvzip"},
    "snapkv adakv": {"policy": "snapkv", "budget": "adakv"},
    "snapkv pyramid": {"policy": "snapkv", "budget": "pyramid"}, "h2o": {"policy": "h2o"},
}  # fmt: skip


def synchronized() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def plain(loaded, ids, chunk: int) -> float:
    """Seconds of the library's forward of ids [T] in chunks, the best of three."""
    model, found = loaded.model, []
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    for _ in range(3):
        cache, began = DynamicCache(config=model.config), synchronized()
        for start in range(0, len(ids), chunk):
            model(input_ids=ids[None, start : start + chunk], use_cache=True, logits_to_keep=1,
                  **{cache_parameter(model): cache})  # fmt: skip
        found.append(synchronized() - began)
    model.set_attn_implementation(own)
    return min(found)


def measured(loaded, task, items, axes: dict, chunk: int) -> tuple[list[float], list[int]]:
    """Seconds and decoded tokens of each item."""
    evicts = {"budget_percent": 25, "window": SinkWindow(4, 64)} if "policy" in axes else {}
    runner = Runner("", {}, CacheSpec(**{"format": "bf16", "block_size": 16} | axes | evicts),
                    loaded=loaded, chunk_tokens=chunk)  # fmt: skip
    seconds, tokens = [], []
    for item in items:
        began = synchronized()
        raw = task.run(runner, item)
        runner.release()
        seconds.append(synchronized() - began)
        tokens.append(int((raw["answers"] >= 0).sum()))
    return seconds, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--items", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=1 << 15)
    parser.add_argument("--caches", nargs="+", default=list(CACHES))
    parser.add_argument("--profile", default="")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = FolderModel(given.model).load(device)
    for length in given.tokens:
        [task] = NiahSingle2(Protocol(lengths=[length], samples=given.items, question_tokens=64,
                                      new_tokens=48)).parts(loaded)  # fmt: skip
        items = list(task.items(loaded, None, 0))
        ids = torch.as_tensor(items[0].context, device=device)
        base = plain(loaded, ids, given.chunk)
        print(f"{length:,} tokens: plain forward {base:.3f} s, {len(ids) / base:,.0f} tokens/s",
              flush=True)  # fmt: skip
        for name in given.caches:
            look = cProfile.Profile() if name == given.profile else None
            try:
                measured(loaded, task, items[:1], CACHES[name], given.chunk)  # compiles
                if look:
                    look.enable()
                seconds, tokens = measured(loaded, task, items, CACHES[name], given.chunk)
            except Exception as error:  # the next cache is another matter
                print(f"{name:20} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
                continue
            finally:
                if look:
                    look.disable()
            each, said = statistics.median(seconds[1:]), statistics.mean(tokens[1:])
            print(f"{name:20} {each:.3f} s (first {seconds[0]:.3f}), {said:.0f} decoded, "
                  f"{len(ids) / each:,.0f} prompt tokens/s, {each / (base + TOKEN * said):.2f} "
                  "of forward and tokens", flush=True)  # fmt: skip
            if look:
                pstats.Stats(look).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
