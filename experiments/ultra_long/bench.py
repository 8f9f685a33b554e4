"""50k to 1M tokens under 4.0 GB: does device memory stay flat, and how long does it take?

    python experiments/ultra_long/bench.py --out results.jsonl [--arms exact] [--tokens 500000]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory_200k"))
from bench import SLOW_DECODE, parser, run_arm  # noqa: E402

ARMS = {  # name -> axes; byte budgets are for 4.0 GB with 1.19 GB of weights
    "exact": {"format": "fp8", "policy": "fifo", "offload": "host",
              "budget_bytes": 1_200_000_000},
    "window": {"format": "fp8", "window": {"name": "sink", "sinks": 64, "recent": 8192,
                                           "middle": False}},
    "retrieval": {"format": "fp8", "block_size": 128, "policy": "fifo", "offload": "host",
                  "retrieval": {"name": "quest", "digests": "fp8"}, "budget_bytes": 1_000_000_000},
}  # fmt: skip
DEFAULT = ("exact", "window")  # the prefill of `retrieval` is that of `exact`


def main() -> int:
    made = parser(__doc__.splitlines()[0], "50000,200000,500000,1000000", 16384)
    args, good = made.parse_args(), True
    SLOW_DECODE.add("exact")
    for name in args.arms.split(",") if args.arms else DEFAULT:
        for tokens in map(int, args.tokens.split(",")):
            good &= run_arm(name, ARMS[name], args, "ultra_long", tokens)
    return not good


if __name__ == "__main__":
    sys.exit(main())
