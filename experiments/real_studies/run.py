"""All studies on real models, several processes a GPU side by side, within some minutes.

    python experiments/real_studies/run.py --models FOLDER --out FOLDER --minutes 8.5

FOLDER of models holds the two GGUF files. Run folders lie in --work and are gone on with when the
command is given again. What is there at the end, or when time is up, is packed into tars of results
(no scores), one for each model. `report.py` makes the reports of them.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from studies import MODELS, ROOT, STUDIES, Study, parts

PACKED = ("measurements.jsonl", "environment.json", "config.yaml", "per_position.npz",
          "failures.log", "study.journal", "seconds.txt")  # fmt: skip


@dataclass
class Job:
    study: Study
    model: str
    part: int
    variants: list[str] | None
    process: subprocess.Popen | None = None
    slot: int = -1
    began: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.study.report}/{self.model}/{self.part}"

    def command(self, args, folder: Path) -> list[str]:
        words, length, file = MODELS[self.model]
        told = [f"experiment={self.study.experiment}", words, f"model.path={args.models / file}",
                length, *self.study.changes, "track=none", "resume=true",
                f"hydra.run.dir={folder}"]  # fmt: skip
        if self.part:
            told.append("eval.noise_floor=false")
        if self.variants is not None:
            told.append("variants=[" + ", ".join(f'"{v}"' for v in self.variants) + "]")
        return [sys.executable, "-m", "kvlab", *told, *args.words]

    def start(self, args, slot: int, gpus: int) -> None:
        folder = args.work / self.name
        folder.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "2", "WANDB_MODE": "disabled"}
        if gpus:
            visible = [*filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))]
            gpu = slot % gpus
            env["CUDA_VISIBLE_DEVICES"] = visible[gpu] if len(visible) > gpu else str(gpu)
        self.slot, self.began = slot, time.perf_counter()
        with (args.work / f"{self.name.replace('/', '_')}.log").open("ab") as log:
            self.process = subprocess.Popen(self.command(args, folder), cwd=ROOT, env=env,
                                            stdout=log, stderr=subprocess.STDOUT)  # fmt: skip


def main() -> None:
    args = arguments()
    gpus = args.gpus if args.gpus is not None else torch.cuda.device_count()
    slots = list(range(max(1, gpus) * args.each))
    jobs = [Job(study, model, number, variants)
            for study in STUDIES if not args.only or study.report in args.only
            for number, variants in enumerate(parts(study)) for model in args.model]  # fmt: skip
    if args.smoke:  # of each part but one variant
        jobs = [Job(j.study, j.model, j.part, j.variants and j.variants[-1:]) for j in jobs]
    began, waiting, running, failed = time.perf_counter(), jobs, [], 0
    print(f"{len(jobs)} runs, {len(slots)} side by side on {gpus} GPUs", flush=True)
    while (waiting or running) and time.perf_counter() - began < 60 * args.minutes:
        while waiting and slots:
            waiting[0].start(args, slots.pop(0), gpus)
            running.append(waiting.pop(0))
        for job in [j for j in running if j.process.poll() is not None]:
            running.remove(job)
            slots.append(job.slot)
            took = time.perf_counter() - job.began
            (args.work / job.name / "seconds.txt").write_text(f"{took:.1f}\n")
            failed += job.process.returncode != 0
            print(f"{time.perf_counter() - began:4.0f} s  {job.name}: {took:.0f} s"
                  + f", exit {job.process.returncode}" * (job.process.returncode != 0), flush=True)
        time.sleep(0.2)
    stop(running)
    for job in running + waiting:
        print(f"not through: {job.name}", flush=True)
    pack(args)
    sys.exit(1 if failed or running or waiting else 0)


def stop(running: list[Job]) -> None:
    """Interrupt what still runs; what does not end in ten seconds is killed."""
    for job in running:
        job.process.send_signal(signal.SIGINT)
    for job in running:
        try:
            job.process.wait(10)
        except subprocess.TimeoutExpired:
            job.process.kill()


def pack(args) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    for model in args.model:
        target = args.out / f"{model}.tar.xz"
        with tarfile.open(target, "w:xz") as tar:
            for folder in sorted(args.work.glob(f"*/{model}/*")):
                for name in PACKED:
                    if (folder / name).is_file():
                        tar.add(folder / name, str((folder / name).relative_to(args.work)))
        print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB", flush=True)
    with tarfile.open(args.out / "logs.tar.xz", "w:xz") as tar:
        for log in sorted(args.work.glob("*.log")):
            tar.add(log, log.name)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the GGUF files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tars")
    parser.add_argument("--work", type=Path, default=Path("/tmp/kvlab_studies"))
    parser.add_argument("--minutes", type=float, default=8.5, help="until it packs")
    parser.add_argument("--gpus", type=int, help="default: all there are")
    parser.add_argument("--each", type=int, default=8, help="processes a GPU")
    parser.add_argument("--only", action="append", choices=[s.report for s in STUDIES],
                        help="a report's name; may come again")  # fmt: skip
    parser.add_argument("--model", action="append", choices=MODELS, help="default: both")
    parser.add_argument("--smoke", action="store_true", help="one variant of each part")
    parser.add_argument("words", nargs="*", help="further words for every run: eval.documents=1")
    args = parser.parse_args()
    args.model = args.model or list(MODELS)
    for _, _, file in map(MODELS.get, args.model):
        if not (args.models / file).is_file() and not any("model" in w for w in args.words):
            parser.error(f"{args.models / file}: no such file")
    return args


if __name__ == "__main__":
    main()
