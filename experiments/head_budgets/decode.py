"""Captured decode over tables by head beside one table for all heads: the same tokens, on a GPU.

    python experiments/head_budgets/decode.py [--tokens 32768] [--rows 1 8] [--out ROWS.jsonl]

A model of random weights in the shape of Qwen3-0.6B. All caches stand side by side and are timed in
turns, so their ratios are paired: microseconds of a replayed step, and what it takes beside `one
table` of as many tokens (token eviction, the same tokens for all heads) and beside equal budgets.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvlab import PagedCache, prefill
from kvlab.budget import AdaKV
from kvlab.model import Decoder
from kvlab.window import SinkWindow

REPLAYS = 200
HEADS = {"evict": "token", "groups": "per_head"}
# The first is what the others are compared with.
VARIANTS = {
    "one table": {"evict": "token", "groups": "all"},
    "by layer": {"evict": "token", "groups": "per_layer"},
    "equal by head": HEADS,
    "adakv floor=1": HEADS | {"budget": AdaKV(floor=1.0)},
    "adakv": HEADS | {"budget": AdaKV()},
}


def model(device: str, small: bool):
    torch.manual_seed(0)
    wide = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2} if small else {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    config = Qwen3Config(
        **wide, num_attention_heads=16, num_key_value_heads=8, head_dim=16 if small else 128,
        vocab_size=32000, max_position_embeddings=40960,
    )
    return Qwen3ForCausalLM(config).to(device, torch.bfloat16).eval().requires_grad_(False)


def decoder_of(net, ids, chosen: dict, given) -> Decoder:
    """Behind a prefilled context, with its step captured."""
    cache = PagedCache.for_model(
        net, format=given.format, policy="snapkv", budget_percent=given.percent, block_size=64,
        window=SinkWindow(4, 64), **chosen,
    )
    prefill(net, ids, cache, chunk_tokens=given.chunk)
    decoder = Decoder(net, cache, driver="graph" if ids.is_cuda else "static")
    for _ in range(3):
        decoder.step(ids[:, 0])
    return decoder


def clock(replay) -> float:
    """Microseconds of one of many replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000 / REPLAYS


@torch.inference_mode()
def timed(net, rows: int, given) -> list[dict]:
    """A result for each variant: the median of paired ratios, its least and its most."""
    device = next(net.parameters()).device
    ids = torch.randint(0, 32000, (rows, given.tokens), device=device)
    decoders = {}
    for name, chosen in VARIANTS.items():
        try:
            decoders[name] = decoder_of(net, ids, chosen, given)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    if device.type != "cuda":
        return []
    found = {name: [] for name in decoders}
    for _ in range(given.rounds):
        for name, decoder in decoders.items():
            found[name].append(decoder.timed(clock))
    told = []
    for name, us in found.items():
        row = {"rows": rows, "tokens": given.tokens, "percent": given.percent, "variant": name,
               "us": us, "allocated": decoders[name].cache.stats().allocated_bytes}
        for base in ("one table", "equal by head"):
            ratios = sorted(a / b for a, b in zip(us, found.get(base, ())))
            if ratios:
                row[f"over {base}"] = statistics.median(ratios), ratios[0], ratios[-1]
        told.append(row)
    return told


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--percent", type=float, default=25)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a model of two narrow layers")
    parser.add_argument("--out", type=Path, help="rows are added to this file")
    given = parser.parse_args()
    net = model("cuda" if torch.cuda.is_available() else "cpu", given.small)
    with given.out.open("a") if given.out else nullcontext() as out:
        for rows in given.rows:
            for row in timed(net, rows, given):
                over = [row.get(f"over {x}") for x in ("one table", "equal by head")]
                ratios = "  ".join(f"x{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]" for x in over if x)
                print(f"rows {rows}  {row['variant']:15} {statistics.median(row['us']):8.1f} us  "
                      f"{ratios}  {row['allocated'] / 1e6:.1f} MB", flush=True)
                if out:
                    print(json.dumps(row), file=out, flush=True)


if __name__ == "__main__":
    main()
