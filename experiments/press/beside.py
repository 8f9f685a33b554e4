"""kvlab's methods beside kvpress on a task: the same items, prompts, model and scorer.

    experiments/press/env.sh ENV
    python experiments/press/beside.py MODEL --env ENV --out ROWS.jsonl [--tasks niah_single_1]

MODEL is a checkpoint folder that both environments read. kvpress runs in a subprocess (`arms.py`)
and answers in token ids, which the task's own scorer judges here. A row is one item through one
arm: score, bytes and seconds of prefill as measured; `table.py` makes tables of them. Rows come
item by item, so what is stopped early has fewer items of everything. `--time`: prefill alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from methods import GRAINS, METHODS, pressed, spec_of

from kvlab import axes
from kvlab.cache import CacheSpec
from kvlab.eval.asking import end_ids
from kvlab.eval.bench import TASKS, find
from kvlab.eval.data import Books
from kvlab.eval.runner import Runner
from kvlab.eval.tasks import Protocol
from kvlab.model.load import FolderModel

QUANTIZED = ["quanto:4", "quanto:2", "hqq:4", "hqq:2"]  # the library's own caches
QUESTION = 1 << 12  # a question is one chunk, as with kvpress


def runners(loaded, given, tokens: int) -> dict[tuple, Runner]:
    """One for each (method, kept, granularity) of ours; the full cache first."""
    more = {"format": "fp32" if given.dtype == "float32" else "bf16"}
    specs = {("full", 1.0, "head"): CacheSpec(block_size=16, **more)}
    for method in given.methods:
        for kept in given.kept:
            for grain in given.grains:
                spec = spec_of(method, grain, kept, tokens, given.block, **more)
                if spec is not None:
                    specs[method, kept, grain] = spec
    return {key: Runner("", {}, spec, loaded=loaded, chunk_tokens=1 << 20)
            for key, spec in specs.items()}  # fmt: skip


def asked(task, runner: Runner, item) -> dict:
    """The mean score of an item's questions, bytes behind the context, seconds of its prefill."""
    wait()
    start = time.perf_counter()
    task.read(runner, item, item.questions[0])
    wait()
    seconds, scores = time.perf_counter() - start, []
    size = runner.cache.stats().allocated_bytes
    for number, question in enumerate(item.questions):
        if number and not runner.back_to(len(item.context)):
            task.read(runner, item, question)
        scores.append(task.answer(runner, question.ids, question)[task.score])
    runner.release()
    return {"score": float(np.mean(scores)), "bytes": size, "seconds": seconds}


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(loaded, task, items, given) -> Iterator[dict]:
    everyone = runners(loaded, given, int(np.mean([len(item.context) for item in items])))
    for item in items:
        for (method, kept, grain), runner in everyone.items():
            row = {"who": "kvlab", "method": method, "kept": kept, "grain": grain,
                   "item": item.name}
            try:
                if runner.failure is None:
                    yield row | asked(task, runner, item)
            except Exception as error:
                runner.failure = error
                runner.abandon()
                yield row | {"refused": f"{type(error).__name__}: {error}"}


def theirs(loaded, task, items, given) -> Iterator[dict]:
    """The same of each arm of kvpress, and whether its bytes were freed; or why it cannot run."""
    told = [{
        "name": item.name, "context": item.context.tolist(), "new_tokens": task.new_tokens,
        "questions": [{"ids": q.ids.tolist(), "answer": []} for q in item.questions],
        "ends": sorted(end_ids(loaded)),
    } for item in items]  # fmt: skip
    arms = {"full": ("full", 1.0)}
    arms |= {f"{METHODS[m].arm}:{1 - k:g}": (m, k) for m in given.methods for k in given.kept}
    arms |= {arm: (arm, 1.0) for arm in given.more}
    questions = {item.name: item.questions for item in items}
    for line in pressed(given.env, given.model, told, list(arms), given.dtype):
        method, kept = arms[line["arm"]]
        row = {"who": "kvpress", "method": method, "kept": kept, "grain": "head"}
        if "refused" in line:
            yield row | {"refused": line["refused"]}
            continue
        name = line["item"]
        scores = [task.judged(loaded, said, question)[task.score]
                  for said, question in zip(line["answers"], questions[name])]
        yield row | {"item": name, "score": float(np.mean(scores)), "bytes": line["bytes"],
                     "freed": line["freed"], "seconds": line["prefill_seconds"]}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--env", type=Path, help="of env.sh; without it, kvlab alone")
    parser.add_argument("--only", choices=["kvlab", "kvpress"], help="one of the two")
    parser.add_argument("--out", type=Path, help="rows are added to this file")
    parser.add_argument("--tasks", nargs="+", default=["niah_single_1"])
    parser.add_argument("--kept", nargs="+", type=float, default=[0.75, 0.5, 0.25, 0.125])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--grains", nargs="+", default=["head"], choices=list(GRAINS))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--block", type=int, default=16, help="tokens of a block, chosen singly")
    parser.add_argument("--new-tokens", type=int, help="of an answer; default: the task's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--more", nargs="*", default=QUANTIZED, help="arms of theirs only")
    parser.add_argument("--time", action="store_true", help="rows of prefill time alone")
    return parser.parse_args()


def part_of(name: str, loaded, given):
    """A task at one length, and its items."""
    protocol = Protocol(
        lengths=[given.length], samples=given.items, question_tokens=QUESTION,
        new_tokens=1 if given.time else given.new_tokens, decode_driver="eager",
    )
    part = find(axes.load("tasks", TASKS.get(name, name))(protocol)).parts(loaded)[0]
    return part, [x for x, _ in zip(part.items(loaded, Books(), 0), range(given.items))]


@torch.inference_mode()
def main() -> None:
    given, began = arguments(), time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = FolderModel(given.model, dtype=given.dtype).load(device)
    out = given.out.open("a") if given.out else nullcontext()
    with out:
        for name in given.tasks:
            part, items = part_of(name, loaded, given)
            about = {"kind": "prefill" if given.time else "task", "model": loaded.name,
                     "task": part.name, "length": given.length, "dtype": given.dtype,
                     "new_tokens": part.new_tokens, "device": device.type}
            rows = [] if given.only == "kvpress" else [ours(loaded, part, items, given)]
            if given.env and given.only != "kvlab":
                rows.append(theirs(loaded, part, items, given))
            for row in (row for some in rows for row in some):
                if given.out:
                    print(json.dumps(about | row), file=out, flush=True)
                told = row.get("refused") or (f"{row['score']:g}  {row['bytes'] / 1e6:.2f} MB  "
                                              f"{row['seconds']:.3f} s")
                print(f"{time.monotonic() - began:5.0f} s  {name} {row.get('item', '')} "
                      f"{row['who']} {row['method']}, {row['kept']:g}, {row['grain']}: {told}",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
