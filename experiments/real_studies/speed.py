"""What a study costs beside plain forwards of its tokens through the library.

    python experiments/real_studies/speed.py FILE.gguf [--tokens 32768] [--documents 2]

A study of V variants reads every document V + 1 times. The aim: at most 1.5 times what the library
takes to read it as often in chunks of that size, each decoded token counted at 2 ms. Kernels are
compiled before, by the same study of a short document; loading the model is not counted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval import Bench, TextLoss
from kvlab.eval.data import Books
from kvlab.model import LoadedModel
from kvlab.model.library import forward_with
from kvlab.model.load import GgufModel
from kvlab.track import RunFolder
from kvlab.window import SinkWindow

DECODED_MS = 2.0  # that a decoded token is counted at
KEPT = SinkWindow(4, 64, middle=True)
SPECS = {
    "int8": CacheSpec(format="int8", block_size=128),
    "int4": CacheSpec(format="int4", block_size=128),
    "window": CacheSpec(window=SinkWindow(4, 1024, middle=False), block_size=16),
    "fifo 25%": CacheSpec(policy="fifo", budget_percent=25, window=KEPT, block_size=16),
    "snapkv 25%": CacheSpec(policy="snapkv", budget_percent=25, window=KEPT, block_size=16),
    "expected_attention 25%": CacheSpec(
        policy="expected_attention", budget_percent=25, window=KEPT, block_size=16),
}  # fmt: skip


class Loaded:
    """A loader of what is loaded already."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded

    def load(self, device) -> LoadedModel:
        return self.loaded


def seconds(call) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def plain(model, ids: torch.Tensor, chunk: int) -> None:
    """The library's own forward of `ids` [T] in chunks, all logits computed."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    for start in range(0, len(ids), chunk):
        forward_with(model, cache, input_ids=ids[None, start : start + chunk])


def study(loaded, names: list[str], args, tokens: int, documents: int, decoded: int) -> float:
    variants = [Variant(name, {"variant": name}, SPECS[name]) for name in names]
    task = TextLoss(documents, tokens, decoded, noise_floor=False)
    bench = Bench(Loaded(loaded), task, Books(), args.chunk, controls=False, progress=False)
    with tempfile.TemporaryDirectory() as place, RunFolder(Path(place) / "run") as folder:
        took = seconds(lambda: bench.run(folder, variants))
        if folder.failures():
            sys.exit(f"failed: {[row['variant'] for row in folder.failures()]}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--decoded", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=1024)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = GgufModel(args.file).load(torch.device(device))
    short = min(args.tokens, 3 * args.chunk)
    documents = Books().documents(loaded.tokenizer, args.documents, args.tokens)
    texts = [torch.as_tensor(d.ids, dtype=torch.long, device=device) for d in documents]
    read = [ids[: args.tokens - args.decoded] for ids in texts]
    plain(loaded.model, read[0][:short], args.chunk)
    library = seconds(lambda: [plain(loaded.model, ids, args.chunk) for ids in read])
    once = library + len(texts) * args.decoded * DECODED_MS / 1e3
    print(f"{args.documents} x {args.tokens} tokens, chunks of {args.chunk}, {args.decoded} of "
          f"them decoded: plain forwards {library:.2f} s, with decoded tokens at "
          f"{DECODED_MS:g} ms {once:.2f} s", flush=True)
    for names in (*([name] for name in SPECS), list(SPECS)):
        told(loaded, names, args, once, short)


def told(loaded, names: list[str], args, once: float, short: int) -> None:
    study(loaded, names, args, short, 1, min(args.decoded, short // 2))  # compiles
    took = study(loaded, names, args, args.tokens, args.documents, args.decoded)
    allowed = (len(names) + 1) * once
    print(f"V = {len(names)} ({', '.join(names)}): {took:.2f} s, V + 1 plain {allowed:.2f} s, "
          f"ratio {took / allowed:.2f}", flush=True)


if __name__ == "__main__":
    main()
