"""kvlab's methods beside kvpress on a task: the same items, prompts, model and scorer.

    experiments/press/env.sh ENV
    python experiments/press/beside.py ENV MODEL [--tasks niah_single_1] [--kept 0.5]

MODEL is a checkpoint folder that both environments read. kvpress runs in a subprocess (`arms.py`)
and answers in token ids, which the task's own scorer judges here. The table has for each arm the
mean score with its interval, that of the paired difference to the full cache, bytes and seconds of
prefill as measured; `masked` where bytes were not freed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kvlab import axes, prefill, stats
from kvlab.budget import AdaKV
from kvlab.cache import CacheSpec
from kvlab.eval.asking import end_ids
from kvlab.eval.bench import TASKS, find
from kvlab.eval.data import Books
from kvlab.eval.runner import Runner
from kvlab.eval.tasks import Protocol
from kvlab.model.load import FolderModel
from kvlab.report.names import interval
from kvlab.window import SinkWindow

# kvlab's policy (and budget) -> the arm of kvpress that it stands beside.
PAIRS = {
    "key_diff": "keydiff", "snapkv": "snapkv", "expected_attention": "expected_attention",
    "tova": "tova", "lagkv": "lagkv", "compactor": "compactor", "random": "random",
    "snapkv adakv": "adakv", "window": "streaming_llm", "attention_mass": "observed_attention",
    "kvzip adakv": "kvzip_layerwise",
}  # fmt: skip
QUANTIZED = ["quanto:4", "quanto:2", "hqq:4", "hqq:2"]  # the library's own caches


def spec_of(name: str, kept: float, block: int, tokens: int) -> CacheSpec:
    """The cache of one of ours, keeping that share of a context of so many tokens."""
    if name == "window":
        recent = max(1, int(tokens * kept) - 4)
        return CacheSpec(format="bf16", block_size=block,
                         window=SinkWindow(4, recent, middle=False))
    policy, _, budget = name.partition(" ")
    floor = 0.0 if policy == "kvzip" else 0.2  # as published
    return CacheSpec(
        format="bf16", policy=policy, budget_percent=100 * kept, block_size=block, evict="token",
        budget=AdaKV(floor) if budget else "equal", groups="per_head", window=SinkWindow(4, 64),
    )


def ours(loaded, task, items, spec, dtype) -> tuple[list[float], int, float]:
    """Scores of all questions, bytes behind the context and seconds of its prefill."""
    if dtype == "float32":
        spec = replace(spec, format="fp32")
    runner = Runner("", {}, spec, loaded=loaded, chunk_tokens=1 << 20)
    scores, size, seconds = [], [], []
    for item in items:
        runner.start()
        start = time.perf_counter()
        prefill(loaded.model, runner.on_device(item.context)[None], runner.cache,
                chunk_tokens=1 << 20)
        seconds.append(time.perf_counter() - start)
        size.append(runner.cache.stats().allocated_bytes)
        scores += list(task.run(runner, item)[task.score])
    runner.release()
    return scores, int(np.mean(size)), float(np.mean(seconds))


def theirs(python, model, loaded, task, items, arms, dtype) -> dict[str, tuple | str]:
    """The same of each arm of kvpress, and whether its bytes were freed; or why it cannot run."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder, "items.jsonl"), Path(folder, "out.jsonl")
        with given.open("w") as file:
            for item in items:
                asked = [{"ids": q.ids.tolist(), "answer": []} for q in item.questions]
                file.write(json.dumps({
                    "name": item.name, "context": item.context.tolist(), "questions": asked,
                    "new_tokens": task.new_tokens, "ends": sorted(end_ids(loaded)),
                }) + "\n")  # fmt: skip
        script = Path(__file__).with_name("arms.py")
        subprocess.run([python, script, model, given, out, "--dtype", dtype, "--arms", *arms],
                       check=True)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    found = {}
    questions = {item.name: item.questions for item in items}
    for arm in arms:
        mine = [row for row in rows if row["arm"] == arm]
        if "refused" in mine[0]:
            found[arm] = mine[0]["refused"]
            continue
        scores = [float(task.judged(loaded, told, q)[task.score])
                  for row in mine for told, q in zip(row["answers"], questions[row["item"]])]
        size, seconds = (np.mean([row[n] for row in mine]) for n in ("bytes", "prefill_seconds"))
        found[arm] = scores, int(size), float(seconds), mine[0]["freed"]
    return found


def line(who, arm, scores, full, size, seconds, freed=True) -> str:
    own, change = (stats.mean_interval([np.array(x)], block=1, seed=0)
                 for x in (scores, np.subtract(scores, full)))
    told = [interval(x.value, x.low, x.high, 0.01) for x in (own, change)]
    size = f"{size / 1e6:.2f}" + ("" if freed else " masked")
    return f"| {who} | {arm} | {' | '.join(told)} | {size} | {seconds:.2f} |"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("env", type=Path)
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1"])
    parser.add_argument("--kept", nargs="+", type=float, default=[0.75, 0.5, 0.25, 0.125])
    parser.add_argument("--methods", nargs="+", default=list(PAIRS))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--block", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--more", nargs="*", default=QUANTIZED, help="arms of theirs only")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = FolderModel(given.model, dtype=given.dtype).load(device)
    for name in given.tasks:
        part = find(axes.load("tasks", TASKS.get(name, name))(
            Protocol(lengths=[given.length], samples=given.items))).parts(loaded)[0]
        items = [x for x, _ in zip(part.items(loaded, Books(), 0), range(given.items))]
        tokens = int(np.mean([len(item.context) for item in items]))
        arms = ["full", *(f"{PAIRS[m]}:{1 - k:g}" for m in given.methods for k in given.kept)]
        press = theirs(given.env / "bin" / "python", given.model, loaded, part, items,
                       [*arms, *given.more], given.dtype)
        base, size, seconds = ours(loaded, part, items, CacheSpec(block_size=16), given.dtype)
        print(f"\n{name}, {len(items)} items of {tokens} tokens\n")
        print("| who | arm | score, % | minus the full cache's | MB | prefill, s |\n"
              "|---|---|---|---|---|---|")
        print(line("kvlab", "full", base, base, size, seconds))
        for arm, told in press.items():
            if isinstance(told, str):
                print(f"| kvpress | {arm} | refused: {told} | | | |")
            else:
                print(line("kvpress", arm, told[0], press["full"][0], *told[1:]))
        for m in given.methods:
            for kept in given.kept:
                spec = spec_of(m, kept, given.block, tokens)
                scores, size, seconds = ours(loaded, part, items, spec, given.dtype)
                print(line("kvlab", f"{m}, {kept:g} kept", scores, base, size, seconds), flush=True)


if __name__ == "__main__":
    main()
