"""`hydra/launcher=joblib`: processes of this host, each with its devices."""

from __future__ import annotations

import tempfile
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from kvlab.launch.base import Launching, divided
from kvlab.launch.worker import perform


class ByJoblib(Launching):
    """n_jobs: runs at a time; None: as many as devices allow, or as cores where there are none."""

    name, needs = "joblib", "joblib"

    def __init__(self, n_jobs: int | None = None, gpus: int | None = None, retries: int = 2):
        super().__init__(gpus, retries)
        self.n_jobs = n_jobs

    def refuse(self):
        super().refuse()
        divided(Path(), self.gpus, self.n_jobs)

    def run(self, tasks, entry):
        from joblib.externals.loky import get_reusable_executor

        with tempfile.TemporaryDirectory(prefix="kvlab-devices-") as folder:
            count, pins = divided(Path(folder), self.gpus, self.n_jobs)
            pool = get_reusable_executor(count, reuse=False, timeout=60)
            waiting = {pool.submit(perform, task, entry, pins): task for task in tasks}
            try:
                for ended in as_completed(waiting):
                    try:
                        yield waiting[ended], ended.result()
                    except BrokenProcessPool:  # a worker was killed: the pool ends all its workers
                        yield waiting[ended], None
            finally:
                pool.shutdown(wait=True, kill_workers=True)
