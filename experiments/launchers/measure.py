"""64 runs by one launcher with a worker killed among them, then a resume: `README.md` here.

    python experiments/launchers/measure.py joblib|submitit|ray [--out FOLDER]

Prints one line of JSON. Ray gets a cluster of two nodes with one core each, on this host.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from kvlab.core import BadInput
from kvlab.launch import outcomes
from kvlab.track import read_rows

CAPACITIES = [50 * n for n in range(1, 17)]
POLICIES = ["fifo", "lru", "lfu", "sieve"]
RUNS = len(CAPACITIES) * len(POLICIES)
KILL_AFTER = 20     # runs that are there when a worker is killed
GONE = (3, 17, 40)  # runs whose folders are removed before the resume
TORN = 50           # and one whose rows are cut in the middle of a line


def small_trace(folder: Path) -> Path:
    """The first 400 requests of the bundled conversation, as a file of its own."""
    whole = folder / "whole.jsonl"
    line = ["job=trace", f"job.write={whole}", "track=none", f"hydra.run.dir={folder / 'trace'}"]
    subprocess.run([sys.executable, "-m", "kvlab", *line], check=True, stdout=subprocess.DEVNULL)
    small = folder / "small.jsonl"
    small.write_text("".join(whole.read_text().splitlines(keepends=True)[:400]))
    return small


def sweep(trace: Path, out: Path, launcher: list[str], resume: bool) -> subprocess.Popen:
    capacities = ",".join(f"[{n}]" for n in CAPACITIES)
    policies = ",".join(f"[{name}]" for name in POLICIES)
    line = ["-m", "job=hit_rate", f"trace.path={trace}", "track=none", "job.budgets_gib=[]",
            f"job.capacity_blocks={capacities}", f"job.policies={policies}",
            f"resume={str(resume).lower()}", f"hydra.sweep.dir={out}", *launcher]  # fmt: skip
    return subprocess.Popen([sys.executable, "-m", "kvlab", *line], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def kill_one(out: Path, process: subprocess.Popen) -> int | None:
    """Kill the process of a run that is at work once `KILL_AFTER` are there; its number."""
    while process.poll() is None:
        held = outcomes(out)
        at_work = [(n, o) for n, o in held.items() if o.status is None]
        if sum(o.status == 0 for o in held.values()) >= KILL_AFTER and at_work:
            number, outcome = at_work[0]
            try:
                os.kill(outcome.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            time.sleep(0.2)
            if outcomes(out)[number].status != 0:  # it had not ended in that instant
                return number
        time.sleep(0.02)
    return None


def rows_of(out: Path) -> dict[int, list[tuple]]:
    """What every run measured, without what differs from run to run (seconds)."""
    found = {}
    for number, outcome in outcomes(out).items():
        rows, _ = read_rows(Path(outcome.folder) / "measurements.jsonl")
        found[number] = sorted((r["variant"], r["name"], r["value"]) for r in rows
                               if "second" not in r["name"] and r["unit"] != "s")  # fmt: skip
    return found


@contextmanager
def launcher(name: str):
    """The words that choose it; Ray's with a cluster around."""
    if name == "joblib":
        yield ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    elif name == "submitit":
        yield ["hydra/launcher=submitit", "hydra.launcher.cluster=local",
               "hydra.launcher.n_jobs=2"]  # fmt: skip
    elif name == "ray":
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            cluster.add_node(**node)
            yield ["hydra/launcher=ray", f"hydra.launcher.address={cluster.address}"]
        finally:
            cluster.shutdown()
    else:
        raise BadInput("launcher", name, "known: joblib, submitit, ray")


def measure(name: str, work: Path) -> dict:
    trace, out = small_trace(work), work / "sweep"
    with launcher(name) as words:
        began = time.perf_counter()
        process = sweep(trace, out, words, resume=False)
        killed = kill_one(out, process)
        said, _ = process.communicate()
        told = {"launcher": name, "status": process.returncode, "killed_run": killed,
                "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
        held = outcomes(out)
        told |= {"runs_there": sum(o.status == 0 for o in held.values()),
                 "given_again": {n: o.attempts for n, o in held.items() if o.attempts > 1}}
        if told["status"]:
            print(said, file=sys.stderr)
        whole, before = rows_of(out), {n: o.attempts for n, o in held.items()}
        for number in GONE:
            shutil.rmtree(out / str(number))
        rows = out / str(TORN) / "measurements.jsonl"
        rows.write_bytes(rows.read_bytes()[:-40])
        (out / "tasks" / f"{TORN}.json").unlink()  # as where its node was lost before it ended
        began = time.perf_counter()
        process = sweep(trace, out, words, resume=True)
        process.communicate()
        after = outcomes(out)
        told |= {"resume_status": process.returncode,
                 "resume_seconds": round(time.perf_counter() - began, 1),
                 "resume_ran": [n for n, o in after.items() if o.attempts != before[n]
                                or n == TORN],
                 "same_rows": rows_of(out) == whole,
                 "report": (out / "report" / "README.md").is_file()}  # fmt: skip
    told["digest"] = hash_of(whole)
    return told


def hash_of(rows: dict) -> str:
    """Equal where all numbers of all runs are."""
    import hashlib

    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("launcher")
    parser.add_argument("--out", help="an empty folder (default: one that is removed at the end)")
    told = parser.parse_args()
    if told.out:
        Path(told.out).mkdir(parents=True)
        print(json.dumps(measure(told.launcher, Path(told.out).resolve())))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(told.launcher, Path(folder))))


if __name__ == "__main__":
    main()
