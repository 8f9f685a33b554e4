"""Reports of the studies on real models, from what `run.py` packed, or from run folders.

    python experiments/real_studies/report.py FOLDER_OF_TARS [--out reports] [--only real_axes]
    python experiments/real_studies/report.py FOLDER_OF_RUNS    # with FOLDER/STUDY/MODEL/PART

The parts of a study on one model become one run, named after the model; a row that several parts
have, as those of the full cache, is the first part's.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from studies import MODELS, ROOT, STUDIES

from kvlab.report import write_report
from kvlab.track import encode, read_rows

OF_PARTS = re.compile(r"\s(variants=\[.*?\]'?|'variants=.*?\]'|hydra\.run\.dir=\S+|resume=true"
                      r"|track=none|eval\.noise_floor=false)")  # fmt: skip


def joined(parts: list[Path], target: Path) -> Path | None:
    """One run folder of those parts that measured anything."""
    parts = [part for part in parts if (part / "measurements.jsonl").is_file()]
    if not parts:
        return None
    shutil.copytree(parts[0], target)
    known, lines, curves = set(), [], {}
    for part in parts:
        for row in read_rows(part / "measurements.jsonl")[0]:
            params = json.dumps(row["params"], sort_keys=True)
            key = row["variant"], row["name"], params, row.get("step")
            if key not in known:
                known.add(key)
                lines.append(encode(row))
        if (part / "per_position.npz").is_file():
            with np.load(part / "per_position.npz") as found:
                curves = {key: found[key] for key in found.files} | curves
    (target / "measurements.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if curves:
        np.savez_compressed(target / "per_position.npz", **curves)
    environment = json.loads((target / "environment.json").read_text())
    told = [json.loads((part / "environment.json").read_text())["command"] for part in parts]
    told = dict.fromkeys(OF_PARTS.sub("", command) for command in told)
    environment["command"] = "; ".join(told)  # one, where parts differ in their variants alone
    (target / "environment.json").write_text(json.dumps(environment, indent=1))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tars", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "reports")
    parser.add_argument("--only", action="append", choices=[s.report for s in STUDIES])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        packed, runs = Path(place) / "packed", Path(place) / "runs"
        if any(any(args.tars.glob(f"*/{model}/*/measurements.jsonl")) for model in MODELS):
            packed = args.tars.resolve()
        for model in MODELS:
            if packed.parent == Path(place) and (args.tars / f"{model}.tar.xz").is_file():
                try:
                    with tarfile.open(args.tars / f"{model}.tar.xz") as tar:
                        tar.extractall(packed, filter="data")
                except (tarfile.TarError, OSError, EOFError, lzma.LZMAError) as problem:
                    sys.exit(f"report.py: {args.tars / model}.tar.xz is damaged, pack it again: "
                             f"{type(problem).__name__}")
        if not packed.is_dir():
            sys.exit(f"report.py: {args.tars} has none of {', '.join(MODELS)} as .tar.xz, and no "
                     "STUDY/MODEL/PART with measurements")
        for study in STUDIES:
            if args.only and study.report not in args.only:
                continue
            found = [joined(sorted((packed / study.report / model).glob("*")),
                            runs / study.report / model) for model in MODELS]  # fmt: skip
            found = [folder for folder in found if folder]
            text = ROOT / "experiments" / study.report / "README.md"
            if found:
                told = text.read_text(encoding="utf-8") if text.is_file() else ""
                print(write_report(found, args.out / study.report, text=told), flush=True)


if __name__ == "__main__":
    main()
