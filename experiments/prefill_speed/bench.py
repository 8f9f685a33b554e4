"""`experiment=prefill_speed` without Hydra, for machines that lack it.

    python experiments/prefill_speed/bench.py --out FOLDER [--contexts 32768 200000]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval.prefill_speed import PEERS, PrefillSpeed
from kvlab.model.load import RandomModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "decode_speed"))
from bench import Printed  # noqa: E402

FORMATS = ("bf16", "fp8", "int8", "int4", "k4v2")


def variants(names: list[str]) -> list[Variant]:
    return [Variant(name, {"format": name}, CacheSpec(format=name)) for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32_768, 200_000])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--chunk", type=int, default=4096)
    args = parser.parse_args()
    job = PrefillSpeed(RandomModel(), args.contexts, args.chunk, args.peers)
    job.run(Printed(args.out, resume=True), variants(args.formats))


if __name__ == "__main__":
    main()
