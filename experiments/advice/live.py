"""What `python -m kvlab advise` says beside live caches: bytes, and tokens a second.

    python experiments/advice/live.py run OUT [--seconds 110] [--tiny]   # GPU; OUT/live.jsonl
    python experiments/advice/live.py table [OUT/live.jsonl]             # anywhere; README.md

`run` drives the jobs decode_speed (caches filled with random keys) and prefill_speed (random
prompts) over Qwen3-0.6B's shapes with random weights. A line is written as soon as a composition is
measured; what does not fit into --seconds is left out and said. `table` asks the tables that ship,
so it can be made again when they are refreshed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import hydra
import torch

from kvlab.advice.account import account
from kvlab.advice.choices import spec_of
from kvlab.advice.speed import decoding, prefilling
from kvlab.advice.table import BLOCK_SIZE, speeds
from kvlab.config import built, conf_dir
from kvlab.core import BadInput, CacheGeometry, Variant
from kvlab.eval import DecodeSpeed, PrefillSpeed
from kvlab.model import outline
from kvlab.track import RunFolder, read_objects

HERE = Path(__file__).resolve().parent
MARKS = ("<!-- live: python experiments/advice/live.py table -->", "<!-- end of live -->")
MODEL = ["model=qwen3_0_6b_random", "experiment=none"]
TINY = ["model.hidden_size=64", "model.layers=2", "model.query_heads=4", "model.kv_heads=2",
        "model.head_dim=32", "model.mlp_size=128", "model.vocabulary=8192"]  # fmt: skip
CHUNK = 4096  # of prefill, as the rows of prefill_speed have it
# options -> tokens of one prompt, prefilled and then decoded from
READ = {
    "format=bf16": 65536,
    "format=int4g": 65536,
    "format=bf16 window=sink window.middle=false window.sinks=4 window.recent=4092": 65536,
    "format=bf16 policy=snapkv cache.budget_percent=25": 65536,
    "format=fp8 policy=fifo offload=host cache.budget_blocks=256": 65536,
    "format=bf16 policy=fifo offload=host cache.budget_blocks=256": 65536,
}
# options, tokens of each sequence, sequences
FILLED = [
    (["format=bf16", "format=int8", "format=int4", "format=int4g", "format=bf16 retrieval=quest"],
     [1024, 131072, 200000], 1),
    (["format=bf16", "format=fp8", "format=int4"], [1024, 16384], 16),
]  # fmt: skip


class Once:
    """A loader that loads once."""

    def __init__(self, loader):
        self.loader, self.loaded = loader, None

    def load(self, device):
        self.loaded = self.loaded or self.loader.load(device)
        return self.loaded


def run(out: Path, seconds: float, tiny: bool) -> None:
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    scale = 64 if tiny else 1
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = Once(built([*MODEL, *(TINY if tiny else [])], "model"))
    todo = [(_read, words, [tokens // scale], 1) for words, tokens in READ.items()]
    todo += [(_filled, words, [max(256, n // scale) for n in tokens], rows)
             for every, tokens, rows in FILLED for words in every]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch, (out / "live.jsonl").open("w") as file:
        folders = {_read: RunFolder(f"{scratch}/read"), _filled: RunFolder(f"{scratch}/filled")}
        told = json.loads((folders[_read].path / "environment.json").read_text())
        about = {"device": told["device"].get("name", "cpu"), "commit": told["commit"]
                 + "-dirty" * told["dirty"], "load": told["host"]["load_average"]}  # fmt: skip
        for measure, words, tokens, rows in todo:
            spent = time.perf_counter() - started
            if spent > seconds:
                print(f"{words}, {rows} sequences: left out, {spent:.0f} s are over", flush=True)
                continue
            try:
                found = measure(loader, folders[measure], words.split(), tokens, rows,
                                CHUNK // scale)  # fmt: skip
            except Exception as error:  # one that fails does not end the others
                print(f"{words}: failed: {type(error).__name__}: {error}", flush=True)
                continue
            file.writelines(json.dumps(line | about) + "\n" for line in found)
            file.flush()
            for line in found:
                print(f"{time.perf_counter() - started:5.0f} s  {line}", flush=True)


def _filled(loader, folder, words, tokens, rows, _chunk) -> list[dict]:
    DecodeSpeed(loader, tokens, [rows]).run(folder, [_variant(words)])
    found = []
    for n in tokens:
        got = _values(folder, words, n, rows)
        if "decode_tokens_per_second" in got:  # else there was no room
            found.append({"options": words, "tokens": n, "requests": rows, "host_bytes": 0,
                          "device_bytes": int(got["cache_allocated_bytes"]),
                          "decode": got["decode_tokens_per_second"],
                          "captured": "decode_replay_ms" in got})  # fmt: skip
    return found


def _read(loader, folder, words, tokens, rows, chunk) -> list[dict]:
    job = PrefillSpeed(loader, tokens, chunk, decode_tokens=64)
    job.run(folder, [_variant(words)])
    got = _values(folder, words, tokens[0])
    curve = map(json.loads, (folder.path / "measurements.curve.jsonl").read_text().splitlines())
    own = [x for x in curve if (x["variant"], x["tokens"]) == (" ".join(words), tokens[0])]
    made = [{"options": words, "requests": rows, "tokens": x["done"],
             "device_bytes": x["cache_allocated_bytes"], "host_bytes": x["cache_host_bytes"]}
            for x in (own[0], own[-1])]  # fmt: skip
    made[1] |= {"decode": got["decode_tokens_per_second"], "captured": bool(got["decode_captured"]),
                "prefill": got["prefill_tokens_per_second"]}  # fmt: skip
    return made


def _variant(words: list[str]) -> Variant:
    return Variant(" ".join(words), {}, spec_of(tuple(words)))


def _values(folder: RunFolder, words: list[str], tokens: int, rows: int | None = None) -> dict:
    wanted = {"tokens": tokens} | ({"batch": rows} if rows else {})
    return {r["name"]: r["value"] for r in folder.rows() if r["variant"] == " ".join(words)
            and all(r["params"].get(key) == value for key, value in wanted.items())}  # fmt: skip


def compared(line: dict) -> dict:
    """What the advice says at the place of a live line, and both as deviations in percent."""
    options, tokens, requests = tuple(line["options"]), line["tokens"], line["requests"]
    spec = spec_of(options)
    told = account(spec, geometry(), tokens, requests)
    made = {"device_bytes": told.device, "host_bytes": told.host}
    if "decode" in line:
        made["decode"] = _value(decoding(options, spec, geometry(), tokens, requests, None))
    if "prefill" in line:
        made["prefill"] = _value(prefilling(options, spec, geometry(), tokens, None))
    return {key: (value, line[key], 100 * (value / line[key] - 1))
            for key, value in made.items() if value and line[key]}  # fmt: skip


def _value(estimate) -> float | None:
    return estimate and estimate.value


def geometry(cached: list = []) -> CacheGeometry:  # noqa: B006 -- made once
    if not cached:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            made = outline(built(MODEL, "model").config()).portrait
        cached.append(CacheGeometry.of(made.shapes, made.query_heads, BLOCK_SIZE))
    return cached[0]


def table(lines: list[dict]) -> str:
    """Markdown: predicted / live (deviation in percent)."""
    heads = ["composition", "sequences x tokens", "device bytes, MB", "host bytes, MB",
             "decode, tokens/s", "prefill, tokens/s"]  # fmt: skip
    keys, scale = ("device_bytes", "host_bytes", "decode", "prefill"), (1e6, 1e6, 1, 1)
    rows, worst = [], {key: [] for key in keys}
    for line in lines:
        found = compared(line)
        rows.append([f"`{' '.join(line['options']).removeprefix('format=')}`",
                     f"{line['requests']} x {line['tokens']:,}",
                     *(_cell(found.get(k), line.get(k), unit) for k, unit in zip(keys, scale))])
        for key, (_, _, off) in found.items():
            worst[key].append(abs(off))
    told = [f"{key.replace('_', ' ')}: {sum(d <= limit for d in worst[key])} of {len(worst[key])} "
            f"within {limit} %, the worst {max(worst[key], default=0):.1f} %"
            for key, limit in zip(keys, (10, 10, 25, 25))]  # fmt: skip
    sources = dict.fromkeys(f"{s.report} ({s.commit[:7]})" for s in speeds())
    head = (f"Told / live (deviation of what is told). {lines[0]['device']}, commit "
            f"{lines[0]['commit'][:7]}; speeds are told from {', '.join(sources)}. "
            f"{'; '.join(told)}.")  # fmt: skip
    body = [heads, ["---", *["---:"] * 5], *rows]
    return head + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in body)


def _cell(found: tuple | None, live: float | None, unit: float) -> str:
    def told(value: float) -> str:
        return f"{value / unit:,.{1 if value / unit < 100 else 0}f}"

    if not live:
        return ""
    if found is None:
        return f"not told / {told(live)}"
    return f"{told(found[0])} / {told(live)} ({found[2]:+.1f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("path", type=Path, nargs="?", default=HERE / "live.jsonl")
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--tiny", action="store_true", help="a toy, to try the script on a CPU")
    args = parser.parse_args()
    if args.verb == "run":
        if not (args.tiny or torch.cuda.is_available()):
            sys.exit("run: needs a CUDA device; --tiny tries the script without")
        run(args.path, args.seconds, args.tiny)
        return
    try:
        made = table(read_objects(args.path))
    except (OSError, BadInput) as problem:
        sys.exit(f"table: {problem}")
    print(made)
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not args.tiny and all(mark in text for mark in MARKS):
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        readme.write_text(f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
