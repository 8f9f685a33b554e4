"""Host memory that the device can reach, taken slab by slab under a limit."""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from kvlab.core import OutOfHost

HUGE_PAGE = 2 << 20  # bytes
AHEAD = 4  # slabs made ready in the background
SPARE_SHARE = 0.9  # of what the machine has free, where the user gives no limit

_registered: set[int] = set()  # addresses of slabs that have to be unregistered


class HostMemory:
    """Slabs of pinned memory; one that comes back is kept for the next who asks for its size.

    Pinning costs the operating system a page table walk, far more than the copy that follows. So
    slabs are made ahead on a thread, large pages are asked for, and none is given up while the
    owner lives unless another size needs its place.

    cap_bytes: for everything held, spare slabs included; None: what the machine has free.
    """

    def __init__(self, cap_bytes: int | None = None):
        self.cap_bytes = cap_bytes
        self.held_bytes = 0
        self._spare: dict[tuple, list[Tensor]] = defaultdict(list)
        self._coming: dict[tuple, list[Future]] = defaultdict(list)
        self._thread: ThreadPoolExecutor | None = None
        self._reading: list[Callable[[], None]] = []  # copies that may still read what was given
        # not at exit: the driver is about to take everything back anyway
        weakref.finalize(self, _close, self._spare, self._coming).atexit = False

    def __deepcopy__(self, memo: dict) -> HostMemory:
        """One limit for all caches of an offload, copies included."""
        return self

    def require(self, count: int, nbytes: int, device: torch.device) -> None:
        """Raise `OutOfHost` unless `count` more slabs of `nbytes` fit; changes nothing in use."""
        new = count - self._ready(nbytes, device)
        if new <= 0:
            return
        if not self._fits(new * nbytes):
            self.trim(keep=(nbytes, device))
        if not self._fits(new * nbytes):
            raise OutOfHost(new * nbytes, self.held_bytes, self._limit())

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """One slab, uint8 [nbytes], with whatever it held before."""
        self.require(1, nbytes, device)
        for finish in self._reading:
            finish()
        self._reading.clear()
        kind = nbytes, device
        coming = self._coming[kind]
        if self._spare[kind]:
            slab = self._spare[kind].pop()
        elif coming:
            slab = coming.pop(0).result()
        else:
            self.held_bytes += nbytes
            slab = self._make(nbytes, device)
        if device.type == "cuda":
            self._prepare(nbytes, device)
        return slab

    def read_until(self, finish: Callable[[], None]) -> None:
        """Slabs that are given from now on are read until `finish` returns."""
        self._reading.append(finish)

    def give(self, slab: Tensor, device: torch.device) -> None:
        """Take `slab` back, for the next `take` of its size."""
        self._spare[slab.nbytes, device].append(slab)

    def reserve(self, count: int, nbytes: int, device: torch.device) -> None:
        """Have `count` slabs ready now, so that nobody waits for them later."""
        self.require(count, nbytes, device)
        spare, coming = self._spare[nbytes, device], self._coming[nbytes, device]
        while len(spare) < count:
            if coming:  # a slab that could not be made is heard of here, not when it is needed
                spare.append(coming.pop(0).result())
            else:
                self.held_bytes += nbytes
                spare.append(self._make(nbytes, device))

    def trim(self, keep: tuple | None = None) -> None:
        """Give spare slabs back to the operating system, but those of the kind `keep`."""
        for kind in [kind for kind in self._spare if kind != keep]:
            slabs = self._spare.pop(kind)
            self.held_bytes -= sum(slab.nbytes for slab in slabs)
            _unpin(slabs, kind[1])

    def _ready(self, nbytes: int, device: torch.device) -> int:
        return len(self._spare[nbytes, device]) + len(self._coming[nbytes, device])

    def _fits(self, nbytes: int) -> bool:
        return self.held_bytes + nbytes <= self._limit()

    def _limit(self) -> int:
        if self.cap_bytes is not None:
            return self.cap_bytes
        return self.held_bytes + int(SPARE_SHARE * free_bytes())

    def _make(self, nbytes: int, device: torch.device) -> Tensor:
        try:
            with torch.inference_mode(False):  # whoever comes later may write to it
                return pinned(nbytes, device)
        except (MemoryError, OSError, RuntimeError) as error:
            self.held_bytes -= nbytes
            raise OutOfHost(nbytes, self.held_bytes, self.held_bytes) from error

    def _prepare(self, nbytes: int, device: torch.device) -> None:
        """Keep `AHEAD` slabs coming, as far as the limit allows."""
        self._thread = self._thread or ThreadPoolExecutor(1, "kvlab-pin")
        while self._ready(nbytes, device) < AHEAD and self._fits(nbytes):
            self.held_bytes += nbytes
            job = self._thread.submit(self._make, nbytes, device)
            self._coming[nbytes, device].append(job)


def pinned(nbytes: int, device: torch.device) -> Tensor:
    """uint8 [nbytes] that copies to and from `device` by itself; plain memory for the CPU.

    Pages are touched before they are registered: the driver's lock is then held for the
    registration only, and kernels can be launched meanwhile. torch's own pinned allocator rounds
    up to a power of two and knows no large pages; it serves where registration is refused.
    """
    if device.type != "cuda":
        return torch.empty(nbytes, dtype=torch.uint8)
    area = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    slab = whole[start : start + nbytes].zero_()
    with torch.cuda.device(device):
        if int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), nbytes, 0)) == 0:
            _registered.add(slab.data_ptr())
            return slab
        with suppress(RuntimeError):  # the driver keeps the refusal for the next kernel launch
            torch.zeros(1, device=device)
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _unpin(slabs: list[Tensor], device: torch.device) -> None:
    """Unregister before the memory goes back, and not while a copy still runs."""
    mine = [slab.data_ptr() for slab in slabs if slab.data_ptr() in _registered]
    if device.type == "cuda" and mine:
        torch.cuda.synchronize(device)
        for address in mine:
            torch.cuda.cudart().cudaHostUnregister(address)
    _registered.difference_update(mine)


def _close(spare: dict[tuple, list[Tensor]], coming: dict[tuple, list[Future]]) -> None:
    for (_, device), jobs in coming.items():
        _unpin([job.result() for job in jobs if not job.exception()], device)
    for (_, device), slabs in spare.items():
        _unpin(slabs, device)


def free_bytes() -> int:
    """What this process could still take: the machine's free memory, or its control group's."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return max(0, min(free, limit - int((group / "memory.current").read_text())))
    except (OSError, ValueError):  # no control group, or "max"
        return free
