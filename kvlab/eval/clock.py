"""Time: the wall's with the device synchronized, a device's between events, and its ceiling."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(device: torch.device, call: Callable[[], object]) -> tuple[float, object]:
    """Wall time of `call` with the device synchronized before and after, and what it gave."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result


def fresh_peak(device: torch.device) -> None:
    """Let `max_memory_allocated` count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def event_ms(call: Callable[[], object], count: int, warm: int = 0) -> float:
    """Median milliseconds between device events around `call`; `warm` calls before are not timed.
    """
    times = []
    for _ in range(count + warm):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times[warm:])


def timed(call: Callable[[], object], count: int = 21) -> float:
    """Median microseconds between events around `call`."""
    return 1e3 * event_ms(call, count, warm=3)


def replayed(call: Callable[[], object], count: int = 21) -> float:
    """Microseconds of `call`, replayed as a CUDA graph; what cannot be captured is timed as is."""
    try:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return timed(graph.replay, count)
    except RuntimeError:
        torch.cuda.synchronize()
        return timed(call, count)


def copy_ceiling(device: torch.device) -> float:
    """Bytes a second, read plus written, of a large copy on `device`."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    times = [seconds(device, lambda: target.copy_(source))[0] for _ in range(8)]
    return 2 * size / median(times[3:])
