"""`experiment=decode_speed` without Hydra, for machines that lack it.

    python experiments/decode_speed/bench.py --out FOLDER [--contexts 1024 8192] [--batches 1]
"""

from __future__ import annotations

import argparse

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval.speed import DecodeSpeed
from kvlab.model.load import RandomModel
from kvlab.model.peers import PEERS
from kvlab.track import RunFolder

USUAL = [p for p in PEERS if "quanto" not in p]  # its CUDA extension builds for minutes
FORMATS = {"bf16": 64, "fp8": 128, "int8": 128, "int4": 128, "k4v2": 128}  # -> block size


def variants(names: list[str]) -> list[Variant]:
    return [
        Variant(name, {"format": name}, CacheSpec(format=name, block_size=FORMATS[name]))
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32_768, 200_000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--peers", nargs="*", default=USUAL, choices=PEERS)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--driver", default="auto")
    args = parser.parse_args()
    job = DecodeSpeed(
        RandomModel(), args.contexts, args.batches, args.steps, args.peers, args.driver
    )
    folder = Printed(args.out, resume=True)
    job.run(folder, variants(args.formats))


class Printed(RunFolder):
    """A run folder that shows each measurement as it comes."""

    def add(self, variant, params, measurements, **options) -> None:
        rows = list(measurements)
        super().add(variant, params, rows, **options)
        values = "  ".join(f"{m.name.removeprefix('decode_')} {m.value:.4g}" for m in rows)
        print(f"{variant:22} {params.get('batch')} x {params.get('tokens')}: {values}", flush=True)


if __name__ == "__main__":
    main()
