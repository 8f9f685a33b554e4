"""The running result of attention over one piece after another."""

from __future__ import annotations

from types import ModuleType

import torch

from kvlab.kernel import attend_sdpa
from kvlab.kernel.attend_ref import Partial


class Sum:
    """Running attention result over disjoint keys, in fp32."""

    def __init__(self, fused: ModuleType | None):
        self.fused = fused
        self.parts: list[Partial] = []

    def add(self, part: Partial) -> None:
        """out [Hq, T, D] of any float dtype, lse fp32 [Hq, T]."""
        if self.fused is None or not self.parts:
            if self.fused is not None:  # the accumulator must not be a view of the library's
                part = (part[0].to(torch.float32, copy=True).contiguous(), part[1].clone())
            self.parts.append(part)
        else:
            self.fused.merge_into(*self.parts[0], part[0], part[1].contiguous())

    def add_all(self, parts: list[Partial]) -> None:
        """Add each of `parts`."""
        for part in parts:
            self.add(part)

    def result(self) -> Partial:
        return attend_sdpa.merge(self.parts)
