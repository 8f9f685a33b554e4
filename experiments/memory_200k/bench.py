"""200,000 tokens of Qwen3-0.6B's shapes under 4.0 GB: what each axis makes of them.

    python experiments/memory_200k/bench.py --out results.jsonl [--arms fp8_host,window] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ARM = HERE.parent / "memory_200k" / "arm.py"
HOST = {"policy": "fifo", "offload": "host"}
ARMS = {  # name -> axes; byte budgets are for 4.0 GB with 1.19 GB of weights
    "fp8_device": {"format": "fp8"},
    "fp8_host": {"format": "fp8", "budget_bytes": 1_500_000_000, **HOST},
    "int2_mass": {"format": "int2", "block_size": 128, "policy": "attention_mass",
                  "budget_bytes": 2_000_000_000},
    "int4_mass": {"format": "int4", "policy": "attention_mass", "budget_percent": 10.0},
    "window": {"format": "bf16", "window": {"name": "sink", "sinks": 64, "recent": 8192,
                                            "middle": False}},
    "retrieval": {"format": "fp8", "policy": "lru", "offload": "host", "retrieval": "quest",
                  "budget_bytes": 582_400_000},
}  # fmt: skip
UNCAPPED = {"fp8_device"}  # what the others are measured against
SLOW_DECODE = {"fp8_host"}  # every token reads the whole past over the bus
TWINS = {"fp8_host": "fp8_device", "retrieval": "fp8_device"}  # the same prefill, arm by arm


def run_arm(name: str, axes: dict, args, run: str, tokens: int) -> bool:
    """In a process of its own; False if it failed."""
    tiny = {"budget_bytes": 128 * 1024} if args.tiny and "budget_bytes" in axes else {}
    arm = {
        "name": name, "axes": {**axes, **tiny}, "tokens": tokens, "run": run, "tiny": args.tiny,
        "out": str(Path(args.out).resolve()), "device": "cpu" if args.tiny else "auto",
        "chunk_tokens": 128 if args.tiny else args.chunk_tokens,
        "cap_gb": None if args.tiny or name in UNCAPPED else args.cap_gb,
        "decode_tokens": 12 if name in SLOW_DECODE else args.decode_tokens,
    }  # fmt: skip
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(ARM), json.dumps(arm)], check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        print(f"{name}, {tokens} tokens: failed, see above", file=sys.stderr, flush=True)
    return not done.returncode


def agreement(out: Path, tokens: int) -> None:
    """Append how far arms that must agree are apart: in time, and in their last logits."""
    lines = out.read_text().splitlines() if out.is_file() else []
    rows = {row["variant"]: row for row in map(json.loads, lines)
            if row["name"] == "prefill_seconds" and row["params"]["tokens"] == tokens}  # fmt: skip
    for name, twin in TWINS.items():
        if not {name, twin} <= rows.keys():
            continue
        a, b = (np.load(out.with_suffix(".logits") / f"{n}-{tokens}.npy")[0].astype(np.float64)
                for n in (name, twin))  # fmt: skip
        p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
        numbers = {"prefill_ratio_to_device": (rows[name]["value"] / rows[twin]["value"], "x"),
                   "largest_logit_difference": (np.abs(a - b).max(), ""),
                   "kl_to_device_nats": ((np.exp(q) * (q - p)).sum(), "nats")}  # fmt: skip
        with out.open("a") as file:
            for key, (value, unit) in numbers.items():
                row = {"name": key, "value": float(value), "unit": unit, "better": "lower",
                       "low": None, "high": None, "count": 1}  # fmt: skip
                file.write(json.dumps(rows[name] | row) + "\n")
                print(f"{name} {key} {value:.4g} {unit}", flush=True)


def parser(text: str, tokens: str, chunk: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--out", required=True)
    made.add_argument("--arms", default="", help="comma-separated; all by default")
    made.add_argument("--tokens", default=tokens, help="lengths, comma-separated")
    made.add_argument("--chunk-tokens", type=int, default=chunk)
    made.add_argument("--decode-tokens", type=int, default=128)
    made.add_argument("--cap-gb", type=float, default=4.0)
    made.add_argument("--tiny", action="store_true", help="a model of two layers on the CPU")
    return made


def main() -> int:
    args = parser(__doc__.splitlines()[0], "200000", 8192).parse_args()
    names, good = args.arms.split(",") if args.arms else list(ARMS), True
    for tokens in map(int, args.tokens.split(",")):
        for name in names:
            good &= run_arm(name, ARMS[name], args, "memory_200k", tokens)
        agreement(Path(args.out), tokens)
    return not good


if __name__ == "__main__":
    sys.exit(main())
