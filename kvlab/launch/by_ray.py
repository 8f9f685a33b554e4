"""`hydra/launcher=ray`: tasks of a Ray cluster that is there already."""

from __future__ import annotations

import socket

from kvlab.core import BadInput
from kvlab.launch.base import Launching
from kvlab.launch.worker import perform

_KNOCK_SECONDS = 5.0


class ByRay(Launching):
    """address: of the cluster; `auto` is the one that this host belongs to, `ray://HOST:10001` one
    that it does not. cpus, gpus: of each run, which one node must have.

    All nodes must have kvlab installed and see the sweep's folder.
    """

    name, extra, needs = "ray", "ray", "ray"

    def __init__(
        self, address: str = "auto", cpus: int = 1, gpus: int | None = None, retries: int = 2
    ):
        super().__init__(gpus, retries)
        if cpus < 0:
            raise BadInput("hydra.launcher.cpus", cpus, "must not be negative")
        self.address, self.cpus = address, cpus

    def refuse(self):
        super().refuse()
        import ray

        if self._join(ray):
            try:
                self._gpus(ray)
            finally:
                ray.shutdown()

    def run(self, tasks, entry):
        import ray

        mine = self._join(ray)
        waiting = {}
        try:
            # A process for each task: memory of a device goes back with it, as in a run by itself.
            # Retries are counted by us, for all launchers alike.
            needs = {"num_cpus": self.cpus, "num_gpus": self._gpus(ray)}
            remote = ray.remote(max_calls=1, max_retries=0, **needs)(perform)
            waiting = {remote.remote(task, entry): task for task in tasks}
            while waiting:
                [ended], _ = ray.wait(list(waiting), num_returns=1)
                task = waiting.pop(ended)
                try:
                    outcome = ray.get(ended)
                except ray.exceptions.RayError:  # its worker was killed, or its node is gone
                    outcome = None
                yield task, outcome
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)
            if mine:
                ray.shutdown()

    def _join(self, ray) -> bool:
        """Whether this process had to join the cluster, and so has to leave it."""
        if ray.is_initialized():
            return False
        self._knock()
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError) as error:
            remedy = f"no Ray cluster there ({_line(error)}); `ray start --head` makes one"
            raise BadInput("hydra.launcher.address", self.address, remedy) from None
        return True

    def _knock(self) -> None:
        """Raises `BadInput` where nobody answers: Ray itself would try for minutes."""
        host, _, port = self.address.rpartition("//")[2].rpartition(":")
        if not port.isdigit():
            return
        try:
            socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
        except OSError as error:
            remedy = f"nobody answers there ({error}); `ray start --head` makes a cluster"
            raise BadInput("hydra.launcher.address", self.address, remedy) from None

    def _gpus(self, ray) -> int:
        """GPUs of each run. Raises `BadInput` for what no node has: Ray would wait for it."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        most = max((node.get("GPU", 0) for node in nodes), default=0)
        gpus = min(1, int(most)) if self.gpus is None else self.gpus
        for key, asked, name in (("gpus", gpus, "GPU"), ("cpus", self.cpus, "CPU")):
            there = max((node.get(name, 0) for node in nodes), default=0)
            if asked > there:
                remedy = f"no node of the cluster has so many; the largest has {there:g}"
                raise BadInput(f"hydra.launcher.{key}", asked, remedy)
        return gpus


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:120]
