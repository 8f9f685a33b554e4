"""Memory that kernels write and read within one call, owned by whoever calls them."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Buffers by name and device, used again by the next call on the same stream.

    One that is too small is replaced by a new tensor. A captured graph goes on with the one it was
    made with: whoever captures keeps `tensors` as long as the graph.
    """

    def __init__(self):
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, size: int, device: torch.device) -> Tensor:
        """fp32 [size or more], with whatever it held before."""
        return self._taken(name, size, device, torch.empty, torch.float32)

    def counters(self, name: str, size: int, device: torch.device) -> Tensor:
        """int32 [size or more], zeros, as which every call leaves them."""
        return self._taken(name, size, device, torch.zeros, torch.int32)

    def _taken(self, name: str, size: int, device: torch.device, make, dtype) -> Tensor:
        key = name, device
        if key not in self._buffers or self._buffers[key].numel() < size:
            with torch.inference_mode(False):  # whoever comes later may write to it
                self._buffers[key] = make(size, dtype=dtype, device=device)
        return self._buffers[key]

    @property
    def tensors(self) -> list[Tensor]:
        return list(self._buffers.values())

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._buffers.values())

    def __deepcopy__(self, memo: dict) -> Scratch:
        """Nothing in it outlives a call."""
        return Scratch()
