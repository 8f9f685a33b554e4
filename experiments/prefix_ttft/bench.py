"""`experiment=prefix_ttft` without Hydra, for machines that lack it.

    python experiments/prefix_ttft/bench.py --out FOLDER [--prefix 200000] [--new 512] [--tiny]

--tiny: a model of 2 layers and a prefix of 2,000 tokens, to see that it runs (a CPU is enough).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval.prefix_ttft import PrefixTTFT
from kvlab.model.load import RandomModel
from kvlab.track import RunFolder

FORMATS = {"bf16": 64, "fp8": 128, "int8": 128, "int4": 128}  # -> block size
TINY = {"hidden_size": 64, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 32,
        "mlp_size": 128, "vocabulary": 8192}


def variants(names: list[str], offload: str) -> list[Variant]:
    return [
        Variant(name, {"format": name, "offload": offload},
                CacheSpec(format=name, block_size=FORMATS[name], prefix="hash", offload=offload,
                          policy="lru", budget_blocks=4000,
                          workspace_tokens=262_144))
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--prefix", type=int, default=200_000)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--offload", default="host", choices=["host", "none"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    model, prefix = RandomModel(), args.prefix
    if args.tiny:
        model, prefix = RandomModel(**TINY), min(prefix, 2000)
    job = PrefixTTFT(model, prefix, args.new, args.repeats, args.chunk)
    folder = RunFolder(args.out, resume=True)
    job.run(folder, variants(args.formats, args.offload))
    for line in (Path(args.out) / "measurements.jsonl").read_text().splitlines():
        row = json.loads(line)
        print(f"{row['variant']:6} {row['params']['tier']:7} {row['name']:20} "
              f"{row['value']:.4g} {row['unit']}")


if __name__ == "__main__":
    main()
