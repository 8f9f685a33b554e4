"""Captured decode over tables by head beside one table for all heads: the same tokens, on a GPU.

    python experiments/head_budgets/decode.py [--tokens 8192] [--percent 25] [--format bf16]

A model of random weights in the shape of Qwen3-0.6B. Prints microseconds of a replayed step.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from kvlab import PagedCache, prefill
from kvlab.budget import AdaKV
from kvlab.model import Decoder
from kvlab.window import SinkWindow


def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, intermediate_size=3072, vocab_size=32000, max_position_embeddings=40960,
    )
    return Qwen3ForCausalLM(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--percent", type=float, default=25)
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    net = model()
    ids = torch.randint(0, 32000, (1, given.tokens), device="cuda")
    for budget in ("equal", AdaKV(floor=1.0), AdaKV()):
        cache = PagedCache.for_model(
            net, format=given.format, policy="snapkv", budget_percent=given.percent,
            block_size=64, budget=budget, window=SinkWindow(4, 64),
        )
        prefill(net, ids, cache, chunk_tokens=given.tokens)
        decoder = Decoder(net, cache, driver="graph")
        for _ in range(3):
            decoder.step(ids[:, 0])

        def clock(replay):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(200):
                replay()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) * 5  # us of one of 200

        found = [decoder.timed(clock) for _ in range(given.rounds)]
        name = budget if isinstance(budget, str) else f"adakv floor={budget.floor:g}"
        print(f"{name:18} {statistics.median(found):8.1f} us  {min(found):.1f}..{max(found):.1f}  "
              f"{cache.stats().allocated_bytes / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
