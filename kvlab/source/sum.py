"""The running result of attention over one part after another."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from kvlab.kernel import attend_sdpa
from kvlab.kernel.attend_ref import Partial, with_sinks


class Sum:
    """Running attention result over disjoint keys, in fp32."""

    def __init__(self, fused: ModuleType | None, sinks: Tensor | None = None):
        """sinks: logits [Hq] that take part in the sum and give nothing, see `with_sinks`."""
        self.fused, self.sinks = fused, sinks
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
        return with_sinks(attend_sdpa.merge(self._parts), self.sinks)


def over_all(ask, k: Tensor, v: Tensor, fused: ModuleType | None) -> Partial:
    """Attention of `ask` over all tokens that its layer has, k, v [n, H, D], its own the last."""
    how = {"scale": ask.scale, "softcap": ask.softcap}
    return folded(attend_sdpa.attend_last(ask.q, k, v, **how), fused, ask.sinks)


def folded(parts: Sequence[Partial], fused: ModuleType | None, sinks: Tensor | None) -> Partial:
    """The result of some parts."""
    if len(parts) == 1:
        return with_sinks(parts[0], sinks)
    total = Sum(fused, sinks)
    for part in parts:
        total.add(part)
    return total.result()


def merged(
    reads: Sequence, wants_lse: bool = False, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Parts of a decode step (`Read`) -> out [B, Hq, D] over all of them, and its lse [B, Hq].

    Masses become shares of all, in place. Without `wants_lse` the last sum is left out, and the
    lse is that of all parts but one. sinks: logits [Hq] of a last part that gives nothing.
    """
    wants_lse |= sinks is not None
    out, lse, mass = reads[0]
    masses = [] if mass is None else [mass]
    for number, (part, part_lse, part_mass) in enumerate(reads[1:], 2):
        share = torch.sigmoid(part_lse - lse)[..., None]  # of the new part
        for old in masses:
            old.mul_(1.0 - share)
        if part_mass is not None:
            masses.append(part_mass.mul_(share))
        out = torch.lerp(out.float(), part.float(), share).to(part.dtype)
        if wants_lse or number < len(reads):
            lse = torch.logaddexp(lse, part_lse)
    if sinks is not None:
        share = torch.sigmoid(lse - sinks.float())[..., None]  # of all parts
        for old in masses:
            old.mul_(share)
        out, lse = (out.float() * share).to(out.dtype), torch.logaddexp(lse, sinks.float())
    return out, lse
