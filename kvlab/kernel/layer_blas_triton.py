"""As `layer_ref`, for rows that fill the matrix unit: the library's products, little around them.

Products go side by side into one tensor; the gate, and a residual where it may be overwritten, take
no kernel of torch's own.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvlab.kernel import layer_ref
from kvlab.kernel.codes_triton import narrow
from kvlab.kernel.layer_triton import rotate

__all__ = ["chain", "gated_linear", "linear_add", "norm_linear", "rotate", "takes"]


@triton.jit
def gate_kernel(x, out, N, WIDTH: tl.constexpr):
    """silu(x[:, :N]) * x[:, N:] of a row."""
    b, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    y = tl.load(x + b * 2 * N + i, mask=i < N, other=0.0).to(tl.float32)
    z = tl.load(x + b * 2 * N + N + i, mask=i < N, other=0.0).to(tl.float32)
    y = y / (1 + tl.exp(-y)) * z
    tl.store(out + b * N + i, narrow(y, out.dtype.element_ty), mask=i < N)


def takes(x: Tensor) -> bool:
    """Whether rows of this dtype go through the matrix unit."""
    return x.dtype.itemsize == 2


def _side_by_side(x: Tensor, weights: tuple[Tensor, ...], biases=None) -> Tensor:
    out = x.new_empty(len(x), sum(len(w) for w in weights))
    for part, w, b in zip(out.split([len(w) for w in weights], 1), weights, biases or weights):
        if biases is None:
            torch.mm(x, w.t(), out=part)
        else:
            torch.addmm(b, x, w.t(), out=part)
    return out


def norm_linear(
    x: Tensor, gain: Tensor | None, eps: float, weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """As `layer_ref.norm_linear`."""
    x = x if gain is None else F.rms_norm(x, gain.shape, gain, eps)
    return _side_by_side(x, weights, biases)


def gated_linear(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """As `layer_ref.gated_linear`."""
    both = _side_by_side(F.rms_norm(x, gain.shape, gain, eps), (gate, up))
    out = x.new_empty(len(x), len(gate))
    gate_kernel[(len(x), triton.cdiv(len(gate), 1024))](both, out, len(gate), WIDTH=1024)
    return out


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """As `layer_ref.linear_add`."""
    return torch.addmm(residual, x, weight.t())


def chain(x: Tensor, mixed, finish, start, cos, sin) -> tuple[Tensor, layer_ref.Heads | None]:
    """As `layer_ref.chain`."""
    return layer_ref.chained(sys.modules[__name__], x, mixed, finish, start, cos, sin)
