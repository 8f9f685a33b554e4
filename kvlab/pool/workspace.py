"""What the pools of one cache share while they read."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import prod

import torch
from torch import Tensor

from kvlab.core import LayerShape
from kvlab.kernel.scratch import Scratch


class Workspace:
    """What the pools of one cache share while they read: nothing in it outlives a read.

    Two buffers in the compute dtype that dequantized pieces of the past pass through, the scratch
    memory of kernels, and what others keep here so that its bytes count once (`shared`).
    """

    def __init__(self):
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.scratch = Scratch()
        self._shared: dict[str, object] = {}

    def take(self, tokens: int, shape: LayerShape, dtype, device) -> tuple[Tensor, Tensor]:
        """[tokens, H, Dk] and [tokens, H, Dv], overwritten by the next call; grown where too small.
        """
        shapes = [(tokens, shape.kv_heads, width) for width in (shape.k_width, shape.v_width)]
        sizes = [prod(wanted) for wanted in shapes]
        held = [b.numel() for b in self._buffers or ()] or [0, 0]
        if any(size > there for size, there in zip(sizes, held)):
            self._buffers = None  # the old ones first: both would not fit under a tight cap
            self._buffers = tuple(torch.empty(max(pair), dtype=dtype, device=device)
                                  for pair in zip(sizes, held))  # fmt: skip
        return tuple(b[:size].view(wanted)
                     for b, size, wanted in zip(self._buffers, sizes, shapes))  # fmt: skip

    def shared(self, name: str, make: Callable[[], object]):
        """The object of this name, which has `nbytes`; `make` gives it where there is none."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def __deepcopy__(self, memo: dict) -> Workspace:
        """Without the buffers; what others keep here copies itself."""
        other = memo[id(self)] = Workspace()
        other._shared = deepcopy(self._shared, memo)
        return other

    @property
    def nbytes(self) -> int:
        held = (*(self._buffers or ()), self.scratch, *self._shared.values())
        return sum(x.nbytes for x in held)
