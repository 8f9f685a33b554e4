"""The running result of attention over one piece after another."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from kvlab.kernel import attend_sdpa
from kvlab.kernel.attend_ref import Partial


class Sum:
    """Running attention result over disjoint keys, in fp32."""

    def __init__(self, fused: ModuleType | None):
        self.fused = fused
        self._parts: list[Partial] = []  # with kernels one, which the others are folded into

    def add(self, part: Partial) -> None:
        """out [Hq, T, D] of any float dtype, lse fp32 [Hq, T]; or several at once, [n, ...]."""
        out, lse = part
        if self.fused is not None:
            self._fold(out, lse)
        elif out.dim() == 4:
            self._parts += zip(out, lse)
        else:
            self._parts.append(part)

    def _fold(self, out: Tensor, lse: Tensor) -> None:
        fresh = not self._parts
        if fresh:
            running = out.new_empty(out.shape[-3:], dtype=torch.float32)
            self._parts = [(running, lse.new_empty(lse.shape[-2:]))]
        self.fused.merge_into(*self._parts[0], out, lse.contiguous(), fresh)

    def result(self) -> Partial:
        return attend_sdpa.merge(self._parts)
