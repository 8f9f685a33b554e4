"""The job of `experiment=kernel_roofline` without Hydra: rows into one file.

    python experiments/kernel_roofline/bench.py --out results.jsonl [--only fp8,int4]

Settings are those of conf/job/kernel_roofline.yaml. Rows are measurement lines of the run contract,
with commit and device among their params. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from kvlab.core import Measurement  # noqa: E402
from kvlab.eval import KernelRoofline  # noqa: E402
from kvlab.track.environment import revision  # noqa: E402
from kvlab.track.rows import encode, to_row  # noqa: E402


class Lines:
    """What the job writes to: a run folder's `add` and `done`, into one file."""

    def __init__(self, path: str, stamp: dict):
        self.file, self.stamp = open(path, "a"), stamp  # noqa: SIM115 -- open for the process

    def add(self, variant: str, params: dict, rows: list[Measurement]) -> None:
        for row in rows:
            self.file.write(encode(to_row(variant, params | self.stamp, row)) + "\n")
        self.file.flush()
        print(variant, json.dumps(params), *(f"{r.name}={r.value:.5g}" for r in rows), flush=True)

    def done(self, variant: str, params: dict) -> bool:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--only", default="", help="formats to measure, with commas; default: all")
    args = parser.parse_args()
    settings = yaml.safe_load((ROOT / "conf/job/kernel_roofline.yaml").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("_target_", "device")}
    if args.only:
        settings["formats"] = {name: settings["formats"][name] for name in args.only.split(",")}
    stamp = {"commit": revision()["commit"], "device": torch.cuda.get_device_name()}
    KernelRoofline(**settings).run(Lines(args.out, stamp), [])


if __name__ == "__main__":
    main()
