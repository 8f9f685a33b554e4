"""Makes what `python -m kvlab advise` goes by from the reports of this repository.

    python experiments/advice/table.py [--reports reports] [--out kvlab/assets/advice]

Losses of formats and of eviction with their intervals, and speeds; no number is given by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from kvlab.advice.table import long_enough

# report -> run -> what the model is called in the table
FORMATS = {"real_formats": {"smollm2-135m": "SmolLM2-135M-Instruct",
                            "qwen2.5-coder-0.5b": "Qwen2.5-Coder-0.5B-Instruct"}}  # fmt: skip
EVICTION = {"real_eviction": {"evict": "SmolLM2-135M-Instruct",
                              **FORMATS["real_formats"]}}  # those that are there
# report -> settings of the whole run, which its rows do not repeat; a command may say another value
SETTINGS = {
    "real_eviction": {"window": "sink", "window.sinks": 4, "window.recent": 64},
    "real_summaries": {"window": "sink", "window.sinks": 4, "window.recent": 128},
    "real_windows": {"window": "sink", "window.middle": "false", "window.sinks": 4},
}  # fmt: skip
SUMMARIES = {"real_summaries": FORMATS["real_formats"]}
PARTIAL = dict.fromkeys(("real_windows", "real_retrieval"), FORMATS["real_formats"])
OFFERED = {"window.recent": 4092, "window.sinks": 4, "retrieval.budget_tokens": 2048}
SPEEDS = ("decode_speed", "prefill_speed", "memory_200k")
RANDOM = "Qwen3-0.6B's shapes, random weights"  # what the models of SPEEDS are
FIGURES = {"perplexity": "perplexity_delta_percent", "kl": "kl_mean_nats",
           "top1": "top1_agreement_percent"}  # fmt: skip
KINDS = {"decode_tokens_per_second": "decode", "prefill_tokens_per_second": "prefill"}
DECODED = {"perplexity": "perplexity_decoded_delta_percent", "kl": "kl_decoded_mean_nats"}
OPTIONS = ("format", "policy", "window", "window.middle", "summary", "summary.ratio", "retrieval",
           "offload", "cache.budget_percent", "budget_percent", "window.sinks",
           "window.recent")  # fmt: skip


def read(report: Path) -> list[dict]:
    return [json.loads(line) for line in (report / "results.jsonl").read_text().splitlines()]


def losses(reports: Path, sources: dict[str, dict[str, str]]) -> list[dict]:
    """A row for each composition that was measured in these runs."""
    return [row for run in runs(reports, sources) for row in losses_of(*run)]


def runs(reports: Path, sources: dict[str, dict[str, str]]):
    """(model, rows, environment) of each run that is there, rows with what the run was set to."""
    for report, named in sources.items():
        file = reports / report / "environments.json"
        told = json.loads(file.read_text()) if file.is_file() else {}
        own = {run: _settings(report, one["command"]) for run, one in told.items()}
        rows = [_whole(row, report, own) for row in read(reports / report)] if told else []
        for run in [run for run in named if run in told]:
            yield named[run], [r for r in rows if r["params"]["run"] == run], told[run]


def _settings(report: str, command: str) -> dict:
    """Of all rows of a run: as the experiment says, and instead what its command says. Words of a
    variant are none of the run's."""
    words = re.sub(r"variants=\[.*?\]", "", command)
    return {key: dict(re.findall(r"([\w.]+)=(\S+)", words)).get(key, value)
            for key, value in SETTINGS.get(report, {}).items()}  # fmt: skip


def _whole(row: dict, report: str, settings: dict[str, dict]) -> dict:
    """With the settings of its whole run; a row without a policy has none of an eviction's."""
    own = settings.get(row["params"]["run"], {})
    if report != "real_windows" and ("policy" not in row["params"] or "window" in row["params"]):
        own = {}
    return row | {"params": own | row["params"]}


def summaries(reports: Path) -> list[dict]:
    """What summaries of evicted tokens lose; what stands for nothing is a control."""
    return [row for row in losses(reports, SUMMARIES)
            if any(o.startswith("summary=") for o in row["options"])
            and "summary=random" not in row["options"]]  # fmt: skip


def partial(reports: Path) -> list[dict]:
    """What the window and the choice of blocks that are offered lose, a row for each model: in the
    blocks that are offered where they were measured so. A choice is read by decoded tokens only."""
    found = []
    for model, rows, told in runs(reports, PARTIAL):
        rows = [row for row in rows if _offered(row["params"])]
        largest = max((row["params"]["block_size"] for row in rows), default=0)
        rows = [row for row in rows if row["params"]["block_size"] == largest]
        found += losses_of(model, rows, told)
    return found


def _offered(params: dict) -> bool:
    own = {key: params[key] for key in OFFERED if key in params}
    whole = {"window.recent", "retrieval.budget_tokens"} & own.keys()
    return bool(whole) and not params.get("window.rerotate") and "retrieval.digests" not in params \
        and params.get("retrieval", "quest") == "quest" and long_enough(params) and all(
            value == OFFERED[key] for key, value in own.items())  # fmt: skip


def losses_of(model: str, rows: list[dict], environment: dict) -> list[dict]:
    """A row for each composition of one run; its controls are left out, and what evicts blocks."""
    measured: dict[str, dict] = {}
    params: dict[str, dict] = {}
    for row in rows:
        if row.get("step") is None and not left_out(row["params"]):
            measured.setdefault(row["variant"], {})[row["name"]] = row
            params[row["variant"]] = row["params"]
    return [_loss(model, params[variant], found, environment)
            for variant, found in measured.items()]  # fmt: skip


def left_out(params: dict) -> bool:
    return ("control" in params or params.get("policy") == "random"
            or params.get("cache.evict") == "block")


def _loss(model: str, params: dict, measured: dict, environment: dict) -> dict:
    host, speed = environment["host"], measured.get("prefill_tokens_per_second")
    figures = FIGURES | DECODED | {"top1": None} if "retrieval" in params else FIGURES
    return {
        "model": model, "setting": _setting(params, environment["command"], measured),
        "options": options_of(params), "bits": measured["bits_per_element"]["value"],
        **{short: _figure(measured.get(name)) for short, name in figures.items()},
        "allocated_bytes": int(measured["cache_allocated_bytes"]["value"]),
        "prefill_tokens_per_second": speed and speed["value"],
        "loaded": host["load_average"] > host["cores"] / 2,
        # a row says why plain torch did the work; without a GPU it always does
        "kernels": "kernels" not in params and environment["device"].get("kind") != "cpu",
        "device": environment["device"]["name"],
        "commit": environment["commit"] + "-dirty" * environment["dirty"],
    }


def options_of(params: dict) -> list[str]:
    """Words that choose the composition again."""
    named = [(key, value) for key, value in params.items()
             if key in OPTIONS or key.startswith("format.")]  # fmt: skip
    words = [f"{key.replace('budget_percent', 'cache.budget_percent', 1)}={value:g}"
             if key == "budget_percent" else f"{key}={value}" for key, value in named]
    if not any(word.startswith("format=") for word in words):
        words.append("format=bf16")  # what a run has where nothing is said
    return sorted(words, key=lambda word: not word.startswith("format"))


def _figure(row: dict | None) -> list[float] | None:
    """Value and interval; where there is none, as of two documents that differ much, the value."""
    return row and [row["value"] if row[end] is None else row[end]
                    for end in ("value", "low", "high")]  # fmt: skip


def _setting(params: dict, command: str, measured: dict) -> str:
    documents = measured["perplexity"]["count"] // (params["tokens"] - 1)
    data = re.search(r"\bdata=(\w+)", command)
    last = f", the last {params['decode_tokens']} of each" * ("retrieval" in params)
    return (f"{documents} held-out documents ({data[1].title() if data else 'Books'}) x "
            f"{params['tokens']:,} tokens{last}, chunks of {params['chunk_tokens']}, blocks of "
            f"{params['block_size']}, against bf16; weights {params['weights'].partition(' (')[0]}")


def speeds(reports: Path, sources: tuple[str, ...] = SPEEDS) -> list[dict]:
    """A row for each cache of ours, length and batch."""
    return [_speed(report, row, rows) for report in sources for rows in [read(reports / report)]
            for row in rows if row["name"] in KINDS and "peer" not in row["params"]]  # fmt: skip


def _speed(report: str, row: dict, rows: list[dict]) -> dict:
    params = row["params"]
    place = [params.get(key) for key in ("tokens", "batch")]
    beside = {r["name"]: r["value"] for r in rows if r["variant"] == row["variant"]
              and [r["params"].get(key) for key in ("tokens", "batch")] == place}  # fmt: skip
    host = int(beside.get("cache_host_bytes", 0))
    return {
        "report": report, "model": RANDOM, "options": options_of(params),
        "kind": KINDS[row["name"]], "tokens": params["tokens"], "batch": params.get("batch", 1),
        "value": row["value"], "device": params["device"], "commit": params["commit"],
        **({"chunk_tokens": params["chunk_tokens"]} if KINDS[row["name"]] == "prefill" else {}),
        **({"host_bytes": host, "resident_percent": beside["resident_tokens_percent"]} if host
           else {}),
    }  # fmt: skip


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reports", type=Path, default=root / "reports")
    parser.add_argument("--out", type=Path, default=root / "kvlab" / "assets" / "advice")
    args = parser.parse_args()
    made = {"losses": losses(args.reports, FORMATS),
            "evictions": losses(args.reports, EVICTION) + summaries(args.reports),
            "partial": partial(args.reports), "speeds": speeds(args.reports)}  # fmt: skip
    for name, rows in made.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
