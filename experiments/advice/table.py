"""Makes the table that `python -m kvlab advise` goes by from run folders.

    python experiments/advice/table.py --out kvlab/assets/advice/losses.jsonl \
        SmolLM2-135M-Instruct=RUN Qwen2.5-Coder-0.5B-Instruct=RUN

Each RUN is the folder of a run of job=evaluate whose variants are formats; the name is what the
model is called in the table. No number is given by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml

from kvlab.track import read_rows

FIGURES = {"perplexity": "perplexity_delta_percent", "kl": "kl_mean_nats",
           "top1": "top1_agreement_percent"}  # fmt: skip


def rows_of(model: str, folder: Path) -> list[dict]:
    """A row for each format that was measured in `folder`."""
    environment = json.loads((folder / "environment.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    found: dict[str, dict] = {}
    params: dict[str, dict] = {}
    for row in read_rows(folder / "measurements.jsonl")[0]:
        if row.get("step") is None and "control" not in row["params"]:
            found.setdefault(row["variant"], {})[row["name"]] = row
            params[row["variant"]] = row["params"]
    return [_row(model, params[variant], measured, environment, config)
            for variant, measured in found.items()]  # fmt: skip


def _row(model: str, params: dict, measured: dict, environment: dict, config: dict) -> dict:
    host = environment["host"]
    options = [f"{key}={value}" for key, value in params.items()
               if key.partition(".")[0] == "format"]  # fmt: skip
    speed = measured.get("prefill_tokens_per_second")
    return {
        "model": model, "setting": _setting(params, config), "options": options,
        "bits": measured["bits_per_element"]["value"],
        **{short: _figure(measured.get(name)) for short, name in FIGURES.items()},
        "allocated_bytes": int(measured["cache_allocated_bytes"]["value"]),
        "prefill_tokens_per_second": speed and speed["value"],
        "loaded": host["load_average"] > host["cores"] / 2,
        "kernels": "kernels" not in params,  # a row says why plain torch did the work
        "device": environment["device"]["name"],
        "commit": environment["commit"] + "-dirty" * environment["dirty"],
    }


def _figure(row: dict | None) -> list[float] | None:
    return row and [row["value"], row["low"], row["high"]]


def _setting(params: dict, config: dict) -> str:
    data = config["data"]["_target_"].rpartition(".")[2]
    return (f"{config['eval']['documents']} held-out documents ({data}) x {params['tokens']:,} "
            f"tokens, chunks of {params['chunk_tokens']}, blocks of {params['block_size']}, "
            f"against bf16; weights {params['weights'].partition(' (')[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="MODEL=RUN")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for run in args.runs
            for row in rows_of(run.partition("=")[0], Path(run.partition("=")[2]))]  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
