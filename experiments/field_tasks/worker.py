"""One process of the study: takes jobs from a folder until there are none left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from plan import CANDIDATES, WINDOW, Job, variants

from kvlab.core import BadInput, Variant
from kvlab.eval import Bench
from kvlab.eval.bench import TASKS, find, measure_all
from kvlab.eval.data import Books
from kvlab.eval.scores import FOLDER as SCORES
from kvlab.eval.tasks import Protocol
from kvlab.model.centres import query_centres
from kvlab.model.gates import retrieval_gates
from kvlab.model.load import FolderModel
from kvlab.track import RunFolder

CENTRES = (8, 1024) if torch.cuda.is_available() else (1, 128)  # texts, tokens of each


class Once:
    """A model that is loaded already."""

    def __init__(self, loaded):
        self.loaded = loaded

    def load(self, device):
        return self.loaded


class Worker:
    """root: the folder that all processes share; models: name -> file."""

    def __init__(self, root: Path, models: dict[str, str], number: str):
        self.root, self.models, self.number = root, models, number
        self.loaded: dict[str, Once] = {}

    def serve(self) -> None:
        """Until a file `end` says that no more jobs come."""
        while True:
            job = self.take()
            if job is None:
                if (self.root / "end").exists():
                    return
                time.sleep(0.1)
                continue
            self.do(job)

    def take(self) -> Job | None:
        """The first job that nobody has: who renames its file has it."""
        for file in sorted((self.root / "jobs").glob("*.json")):
            mine = self.root / "taken" / f"{file.stem}.{self.number}"
            try:
                file.rename(mine)
            except OSError:
                continue
            told = json.loads(mine.read_text())
            told |= {key: tuple(told[key]) for key in ("tasks", "methods")}
            return Job(**told)
        return None

    def do(self, job: Job) -> None:
        """A job, and a line of what became of it; an error is its own."""
        began, said = time.perf_counter(), "done"
        try:
            self.prepare(job) if job.kind == "prepare" else self.measure(job)
        except Exception as error:  # whatever it is, others go on
            said = f"failed: {type(error).__name__}: {str(error)[:300]}"
            if torch.cuda.is_available():
                try:
                    torch.cuda.synchronize()
                except RuntimeError:  # this process is of no use any more
                    self.note(job, said, began)
                    sys.exit(3)
        self.note(job, said, began)

    def note(self, job: Job, said: str, began: float) -> None:
        seconds = time.perf_counter() - began
        row = {"job": job.name, "said": said, "seconds": round(seconds, 1), "worker": self.number,
               "prompt_tokens": job.prompt_tokens}  # fmt: skip
        with (self.root / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        (self.root / "ended" / job.name).write_text(said)
        print(f"[{self.number}] {job.name}: {said} in {seconds:.1f} s", flush=True)

    def model(self, name: str):
        if name not in self.loaded:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            loaded = FolderModel(self.models[name]).load(device)
            self.loaded[name] = Once(loaded._replace(name=name))
        return self.loaded[name]

    # -- kinds of jobs

    def prepare(self, job: Job) -> None:
        """Gates of budget=duo and centres of policy=triattention, of drawn tokens and of a book
        that no haystack is made of; not again where they are there."""
        if all(self.file(job.model, what).exists() for what in ("gates", "centres")):
            return
        loaded = self.model(job.model).loaded
        gates = retrieval_gates(loaded.model, sinks=WINDOW.sinks, recent=WINDOW.recent,
                                draws=4 if torch.cuda.is_available() else 1)
        self.file(job.model, "gates").write_text(json.dumps(gates))
        text = [text for _, text in Books().texts()][-1]
        texts, tokens = CENTRES
        ids = loaded.tokenizer(text[: 8 * texts * tokens], add_special_tokens=False)["input_ids"]
        texts = min(texts, len(ids) // tokens)
        ids = torch.tensor(ids[: texts * tokens], device=loaded.model.device).view(texts, tokens)
        self.file(job.model, "centres").write_text(json.dumps(query_centres(loaded.model, ids)))

    def file(self, model: str, what: str) -> Path:
        return self.root / f"{what}-{model}.json"

    def measure(self, job: Job) -> None:
        """Every arm through the task of a job, in a run folder of its name."""
        files = {what: str(self.file(job.model, what)) for what in ("gates", "centres")
                 if self.file(job.model, what).exists()}
        tasks = [self.task(name, job) for name in job.tasks]
        bench = Bench(self.model(job.model), tasks, chunk_tokens=1 << 15, progress=False,
                      controls=job.kind == "evict")  # fmt: skip
        loaded, stages = bench.setting.load(), []
        config = yaml.safe_dump({"experiment": "field_tasks", **job._asdict()} | {
            "tasks": list(job.tasks), "methods": list(job.methods)})  # fmt: skip
        path = self.root / "runs" / job.name
        with RunFolder(path, config=config, resume=True) as folder:
            self.known(job, path / SCORES)
            try:
                stages = bench.stages(folder, usable(bench, loaded, variants(job, files)), loaded)
                measure_all(stages, False)
            finally:
                for stage in stages:
                    keep_items(path / "items.jsonl", job, stage)

    def known(self, job: Job, folder: Path) -> None:
        """What the full cache got in other jobs of this model, length and task is not measured
        again: a file of scores is named by all settings, and tells on which tokens it was."""
        for task in job.tasks:
            for file in self.root.glob(f"runs/*-{job.model}-{job.tokens}-{task}*/{SCORES}/full-*"):
                if not (folder / file.name).exists():
                    folder.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, folder)

    def task(self, name: str, job: Job):
        long = 64  # question and prefix in one small chunk
        protocol = Protocol(
            lengths=[job.tokens], samples=job.items, query_aware=job.inside, question_tokens=long,
            new_tokens=CANDIDATES.get(name), no_context=job.kind == "probe",
        )
        return type(find(TASKS[name]))(protocol)


def usable(bench: Bench, loaded, found: list[Variant]) -> list[Variant]:
    """Without those that this model's shape refuses, each with a line."""
    kept = []
    for variant in found:
        try:
            bench.setting.runners(loaded, [variant], {})
            kept.append(variant)
        except BadInput as error:
            print(f"{variant.name}: {error}", flush=True)
    return kept


def keep_items(file: Path, job: Job, stage) -> None:
    """What each arm got for each item, a line each, for pairs that no row has."""
    with file.open("w") as out:
        for runner in stage.runners:
            names = ("score", "copied", "miscopied", "exact", "ttft", "known")
            told = {name: {str(n): round(float(np.mean(raw[name])), 6)
                           for n, raw in sorted(runner.raws.items()) if name in raw}
                    for name in names}
            row = {"arm": runner.name, "control": runner.is_control, "task": stage.task.name,
                   "model": job.model, "tokens": job.tokens, "inside": job.inside,
                   "budget": job.budget, "kind": job.kind, **{k: v for k, v in told.items() if v}}
            out.write(json.dumps(row) + "\n")


def stop(*_) -> None:
    """The parent's time is over: what is measured is kept, and this process ends."""
    raise SystemExit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    Worker(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]).serve()
