"""The device of a run and the hard limit on its memory."""

from __future__ import annotations

import torch

from kvlab.core import BadInput


def prepare_device(name: str = "auto", cap_gb: float | None = None) -> torch.device:
    """`auto` is CUDA where there is one; `cap_gb` limits what this process may allocate on it.

    cap_gb: GB (10**9 bytes) for weights, cache, workspace and activations together, enforced by
    the CUDA allocator: going over it is an out-of-memory error. The driver's own context is
    outside. Raises `BadInput` for a device that is not there and a cap that cannot hold.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput("device", name, "no CUDA device answers; device=cpu or device=auto")
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:  # the allocator's limit wants a number
        device = torch.device("cuda", torch.cuda.current_device())
    if cap_gb is not None:
        _limit(device, cap_gb)
    return device


def _limit(device: torch.device, cap_gb: float) -> None:
    if cap_gb <= 0:
        raise BadInput("memory.cap_gb", cap_gb, "must be positive, or null for no limit")
    if device.type != "cuda":
        remedy = "needs CUDA, whose allocator enforces it; on the CPU use the shell's `ulimit -v`"
        raise BadInput("memory.cap_gb", cap_gb, remedy)
    total = torch.cuda.get_device_properties(device).total_memory
    if cap_gb * 1e9 > total:
        raise BadInput("memory.cap_gb", cap_gb, f"the device has {total / 1e9:.1f} GB only")
    torch.cuda.set_per_process_memory_fraction(cap_gb * 1e9 / total, device)
