"""The whole study in so many seconds, over several GPUs and several processes on each.

    python experiments/field_tasks/run.py --seconds 560 --out $OUT \\
        --model qwen=/tmp/m/qwen2.5-coder-0.5b-instruct.gguf:4096,8192,16384 \\
        --model smollm2=/tmp/m/smollm2-135m-instruct.gguf:4096 --gpus 2 --processes 8

First what the full cache can do, then what it can do through every method, the most important
first. Whatever is through when the time is over is packed into OUT/field_tasks.tar.gz, without
files of single items; the same command on the same --work goes on behind it. --only PART leaves
out jobs whose name does not begin with it (requests, outside, ...).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import plan

HERE = Path(__file__).resolve().parent
PACK = 12.0  # seconds kept for packing
RAW_BYTES = 90 << 20  # of the files in an archive, which become a tenth


class Study:
    """root: the folder that all processes share; given: the command line."""

    def __init__(self, given):
        self.given, self.root = given, Path(given.work).resolve()
        self.end = time.monotonic() + given.seconds - PACK
        self.models = {name: file for name, file, _ in given.model}
        self.lengths = {name: lengths for name, _, lengths in given.model}
        for name in ("jobs", "taken", "ended"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir(parents=True)
        (self.root / "end").unlink(missing_ok=True)
        self.workers: dict[str, subprocess.Popen] = {}
        self.number, self.jobs = 0, {}

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> None:
        self.start_all()
        try:
            parts = plan.Chosen(*map(tuple, (self.given.methods, self.given.formats,
                                             self.given.requests, self.given.shared)))
            self.submit(plan.probes(self.lengths, self.given.items, self.given.tasks, parts))
            self.wait()
            tasks = self.chosen()
            more = plan.jobs(self.lengths, tasks, self.given.items, self.given.budgets, parts)
            more = [job for job in more if job.name.startswith(tuple(self.given.only))]
            self.submit(more)
            self.estimate(more)
            (self.root / "end").touch()  # nothing comes behind these
            self.wait()
        finally:
            self.stop_all()
            pack(self.root, Path(self.given.out))

    # -- processes

    def start_all(self) -> None:
        """Models are unpacked once, then each GPU gets its processes."""
        code = ("import sys; from kvlab.model.load import FolderModel; "
                "print(FolderModel(sys.argv[1]).load('cpu').name, flush=True)")
        making = [subprocess.Popen([sys.executable, "-c", code, file])
                  for file in self.models.values()]  # fmt: skip
        for process in making:
            process.wait(timeout=max(1.0, self.left))
        for number in range(max(1, self.given.gpus) * self.given.processes):
            self.start(str(number))

    def start(self, number: str) -> None:
        own = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if self.given.gpus:
            visible = [*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))]
            gpu = int(number) % self.given.gpus
            own["CUDA_VISIBLE_DEVICES"] = visible[gpu] if len(visible) > gpu else str(gpu)
        own["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, str(HERE / "worker.py"), str(self.root),
                   json.dumps(self.models), number]  # fmt: skip
        self.workers[number] = subprocess.Popen(command, env=os.environ | own)

    def wait(self) -> None:
        """Until every job has ended, the time is over, or nobody is left; who died is replaced."""
        told, deaths = time.monotonic(), 0
        while self.left > 0:
            ended = {file.name for file in (self.root / "ended").iterdir()}
            if self.jobs.keys() <= ended:
                return
            for number, process in list(self.workers.items()):
                if process.poll() not in (None, 0):
                    deaths += 1
                    self.drop(number)
                    if deaths > 8:
                        print("too many processes died", flush=True)
                        return
                    self.start(number)
            if all(process.poll() is not None for process in self.workers.values()):
                return
            if time.monotonic() - told > 20:
                told = time.monotonic()
                print(f"{len(ended)} of {len(self.jobs)} jobs, {self.left:.0f} s left", flush=True)
            time.sleep(0.2)

    def drop(self, number: str) -> None:
        """A process has died with its job: that is not tried again."""
        print(f"process {number} died", flush=True)
        for file in (self.root / "taken").glob(f"*.{number}"):
            name = json.loads(file.read_text())["name"]
            ended = self.root / "ended" / name
            if not ended.exists():
                ended.write_text("died")

    def stop_all(self) -> None:
        (self.root / "end").touch()
        for process in self.workers.values():
            process.terminate()
        until = time.monotonic() + 5
        for process in self.workers.values():
            try:
                process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    # -- jobs

    def submit(self, jobs: list[plan.Job]) -> None:
        for job in jobs:
            self.number += 1
            self.jobs[job.name] = job
            file = self.root / "jobs" / f"{self.number:04d}.json"
            part = file.with_suffix(".part")
            part.write_text(json.dumps(job._asdict()))
            part.rename(file)

    def chosen(self) -> dict[tuple[str, int], list[str]]:
        """What each model can do at each length, and the scores of the full cache."""
        scores: dict[tuple[str, int], dict] = {}
        for job in self.jobs.values():
            file = self.root / "runs" / job.name / "items.jsonl"
            if job.kind != "probe" or not file.exists():
                continue
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            if told := both(rows):
                scores.setdefault((job.model, job.tokens), {})[job.tasks[0]] = told
            else:
                print(f"{job.name}: not through when the time was over, not chosen", flush=True)
        found = {}
        for (model, tokens), told in sorted(scores.items()):
            found[model, tokens] = tasks = plan.possible(told, self.given.most)
            for task, (full, blank) in told.items():
                said = f"full {full:5.1f} %, without context {blank:5.1f} %"
                print(f"{model} {tokens:6} {task:18} {said} {'chosen' * (task in tasks)}",
                      flush=True)  # fmt: skip
        if not any(found.values()) and self.given.gpus == 0:  # a rehearsal
            found = {key: list(told)[: self.given.most] for key, told in scores.items()}
        (self.root / "chosen.json").write_text(json.dumps(
            {f"{model} {tokens}": tasks for (model, tokens), tasks in found.items()}))
        return found

    def estimate(self, jobs: list[plan.Job]) -> None:
        """What is planned, counted, and how long it takes at the rate of the first stage."""
        log = [json.loads(line) for line in (self.root / "log.jsonl").read_text().splitlines()]
        rates = [row["prompt_tokens"] / row["seconds"] for row in log
                 if row["said"] == "done" and row["prompt_tokens"] and row["seconds"] > 0.05]
        prompt, decoded = (sum(getattr(job, f"{what}_tokens") for job in jobs)
                           for what in ("prompt", "decoded"))
        rate = sorted(rates)[len(rates) // 2] * len(self.workers) if rates else float("nan")
        seconds = prompt / rate + decoded * 0.002 / max(1, len(self.workers))
        print(f"{len(jobs)} jobs, {prompt:,} prompt tokens and about {decoded:,} decoded ones: "
              f"{seconds:.0f} s at {rate:,.0f} prompt tokens a second of all processes, "
              f"{self.left:.0f} s left", flush=True)  # fmt: skip


def both(rows: list[dict]) -> tuple[float, float] | None:
    """Scores of the full cache and of no context in percent; None where one was not measured:
    nothing measured is no guess of 0 %."""
    found = [list(row.get("score", {}).values()) for row in rows[:2]]
    if len(found) < 2 or not all(found):
        return None
    return tuple(100 * sum(values) / len(values) for values in found)


def pack(root: Path, out: Path) -> None:
    """Rows, items and logs of all runs in files that stay under 16 MiB."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("config.yaml", "environment.json", "measurements.jsonl", "items.jsonl", "failures.log")
    files = [f for f in sorted((root / "runs").glob("*/*")) if f.name in names]
    parts, size = [[*root.glob("*.json*")]], 0
    for file in files:
        size += file.stat().st_size
        if size > RAW_BYTES:
            parts, size = [*parts, []], file.stat().st_size
        parts[-1].append(file)
    for number, part in enumerate(parts):
        path = out / f"field_tasks{number or ''}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=6) as archive:
            for file in part:
                archive.add(file, arcname=str(file.relative_to(root)))
        print(f"packed {len(part)} files: {path}, {path.stat().st_size:,} bytes", flush=True)


def model_of(text: str) -> tuple[str, str, list[int]]:
    """NAME=FILE:LENGTH,LENGTH"""
    name, _, rest = text.partition("=")
    file, _, lengths = rest.rpartition(":")
    if not (name and file and lengths):
        raise argparse.ArgumentTypeError(f"{text}: give NAME=FILE:LENGTH,LENGTH")
    return name, file, [int(n) for n in lengths.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", type=model_of, required=True)
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--out", default="outputs/field_tasks")
    parser.add_argument("--work", default="/tmp/field_tasks")
    parser.add_argument("--gpus", type=int, default=2, help="0: on the CPU")
    parser.add_argument("--processes", type=int, default=8, help="on each GPU")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--most", type=int, default=plan.MOST, help="tasks for a model and length")
    parser.add_argument("--tasks", nargs="+", default=list(plan.CANDIDATES))
    parser.add_argument("--budgets", nargs="+", type=float, default=list(plan.BUDGETS))
    parser.add_argument("--methods", nargs="+", default=plan.ALL.methods, choices=plan.ALL.methods)
    parser.add_argument("--formats", nargs="+", default=plan.ALL.formats, help="any that kvlab has")
    parser.add_argument("--requests", nargs="+", default=plan.REQUESTS, choices=plan.REQUESTS)
    parser.add_argument("--shared", nargs="+", default=plan.ALL.shared, help="formats of requests")
    parser.add_argument("--only", nargs="+", default=[""])
    Study(parser.parse_args()).run()


if __name__ == "__main__":
    main()
