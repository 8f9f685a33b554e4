"""What a decoder layer computes around its attention, for one token per row, in Triton.

Four launches a layer: norm + q, k, v; head norms + RoPE; output + residual; and the MLP in two.
Weights stay where they are: a program picks its matrix, nothing is stacked. One row is a sum of
products (each weight is used once, so the matrix unit has nothing to win). Its RMSNorm is a factor
on the result, so the weights stream without waiting for it. Two to 16 rows share a tile of the
matrix unit and are normed before.

Where the device can (compute capability 9), a kernel starts while the one before it drains, asks
for its first weights, and only then waits (programmatic dependent launch).
"""

from __future__ import annotations

import sys
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvlab.core import BadInput
from kvlab.kernel import layer_ref
from kvlab.kernel.codes_triton import DENSE, narrow
from kvlab.kernel.decode_parts_triton import multiply
from kvlab.kernel.interpret import ACTIVE as INTERPRETED
from kvlab.kernel.sides import next_power

MOST_ROWS = 16  # of the matrix unit's smallest tile
TILE = (16, 256, 2, 4)  # of many rows: outputs, columns, warps, stages


@triton.jit
def arrive(EARLY: tl.constexpr):
    """Let the next kernel start, then wait for the results of the one before."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def pick(pid, a, b, c, n0, n1, n2, R: tl.constexpr):
    """Of three stacked tensors: pointer, first row of program `pid`, its rows, rows before it."""
    p0, p1 = tl.cdiv(n0, R), tl.cdiv(n1, R)
    first, count, before = pid * R, n0, 0
    if pid >= p0 + p1:
        a, first, count, before = c, (pid - p0 - p1) * R, n2, n0 + n1
    elif pid >= p0:
        a, first, count, before = b, (pid - p0) * R, n1, n0
    return a, first, count, before


@triton.jit
def tile(w, rows, count, columns, K):
    """[rows, columns] of a [count, K] matrix, 0 outside."""
    inside = (rows < count)[:, None] & (columns < K)[None, :]
    at = w + rows.to(tl.int64)[:, None] * K + columns[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def finish(y, gate, square, bias, residual, at, inside, eps, K, NORM: tl.constexpr,
           GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr):
    """Norm, bias, gate and residual of finished sums; `square`: sum of squares of the input."""
    if NORM:
        factor = tl.rsqrt(square / K + eps)
        y, gate = y * factor, gate * factor
    if BIAS:
        y += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        y = y / (1 + tl.exp(-y)) * gate
    if ADD:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def one_row_kernel(
    x, gain, w0, w1, w2, b0, b1, b2, residual, out, eps, n0, n1, n2, K, R: tl.constexpr,
    KB: tl.constexpr, STEPS: tl.constexpr, NORM: tl.constexpr, GATE: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):
    """R outputs of one row; with GATE w0 is the gate and w1 what it gates."""
    pid = tl.program_id(0)
    if GATE:
        w, first, count, before = w0, pid * R, n0, 0
    else:
        w, first, count, before = pick(pid, w0, w1, w2, n0, n1, n2, R)
    w = tl.multiple_of(w, 16)
    rows, columns = first + tl.arange(0, R), tl.arange(0, KB)
    a = tile(w, rows, count, columns, K)
    b = tile(w1, rows, count, columns, K) if GATE else a
    arrive(EARLY)
    y, z = tl.zeros([R, KB], tl.float32), tl.zeros([R, KB], tl.float32)
    square = tl.zeros([KB], tl.float32)
    for s in tl.static_range(STEPS):
        at = s * KB + columns
        if s > 0:
            a = tile(w, rows, count, at, K)
            b = tile(w1, rows, count, at, K) if GATE else a
        v = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        if NORM:
            square += v * v
            v *= tl.load(gain + at, mask=at < K, other=0.0).to(tl.float32)
        y += a.to(tl.float32) * v[None, :]
        if GATE:
            z += b.to(tl.float32) * v[None, :]
    bias = b0
    if BIAS:
        bias, _, _, _ = pick(pid, b0, b1, b2, n0, n1, n2, R)
    inside = rows < count
    y = finish(tl.sum(y, 1), tl.sum(z, 1) if GATE else 0.0, tl.sum(square), bias + rows, residual,
               before + rows, inside, eps, K, NORM, GATE, BIAS, ADD)
    tl.store(out + before + rows, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def many_rows_kernel(
    x, w0, w1, w2, b0, b1, b2, residual, out, n0, n1, n2, K, B, width, R: tl.constexpr,
    KB: tl.constexpr, MP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):
    """R outputs of B rows of x [B, K], normed already; `width`: outputs of a row in all."""
    pid = tl.program_id(0)
    if GATE:
        w, first, count, before = w0, pid * R, n0, 0
    else:
        w, first, count, before = pick(pid, w0, w1, w2, n0, n1, n2, R)
    w = tl.multiple_of(w, 16)
    rows, m = first + tl.arange(0, R), tl.arange(0, MP)
    y, z = tl.zeros([MP, R], tl.float32), tl.zeros([MP, R], tl.float32)
    for start in range(0, K, KB):
        at = start + tl.arange(0, KB)
        v = tile(x, m, B, at, K)
        y = multiply(v, tl.trans(tile(w, rows, count, at, K)), y, DENSE)
        if GATE:
            z = multiply(v, tl.trans(tile(w1, rows, count, at, K)), z, DENSE)
    bias = b0
    if BIAS:
        bias, _, _, _ = pick(pid, b0, b1, b2, n0, n1, n2, R)
    inside = (m < B)[:, None] & (rows < count)[None, :]
    at = m[:, None] * width + (before + rows)[None, :]
    y = finish(y, z, 0.0, (bias + rows)[None, :], residual, at, inside, 0.0, K, False, GATE, BIAS,
               ADD)
    tl.store(out + at, narrow(y, out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(
    qkv, q_gain, k_gain, cos, sin, out, eps, B, cos_stride, HQ: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):
    """Program (head, row); `out` is q of all rows, then k of all rows, then v."""
    h, b = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, HALF)
    inside = d < D // 2
    source = qkv + (b * (HQ + 2 * H) + h) * D + d
    arrive(EARLY)
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    target = out + (b * HQ + h) * D + d
    if h >= HQ:
        side = (h - HQ) // H
        target = out + (B * (HQ + side * H) + b * H + (h - HQ) % H) * D + d
    if h < HQ + H:
        if NORM:
            gain = q_gain if h < HQ else k_gain
            factor = tl.rsqrt((tl.sum(x * x) + tl.sum(y * y)) / D + eps)
            x *= factor * tl.load(gain + d, mask=inside, other=0.0).to(tl.float32)
            y *= factor * tl.load(gain + D // 2 + d, mask=inside, other=0.0).to(tl.float32)
        at = b * cos_stride + d
        c0 = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
        c1 = tl.load(cos + at + D // 2, mask=inside, other=0.0).to(tl.float32)
        s0 = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
        s1 = tl.load(sin + at + D // 2, mask=inside, other=0.0).to(tl.float32)
        x, y = x * c0 - y * s0, y * c1 + x * s1
    tl.store(target, narrow(x, out.dtype.element_ty), mask=inside)
    tl.store(target + D // 2, narrow(y, out.dtype.element_ty), mask=inside)


@lru_cache(maxsize=16)
def _early(device: torch.device) -> dict:
    """Launch arguments for starting before the previous kernel has ended, where that exists."""
    can = device.type == "cuda" and not INTERPRETED
    can = can and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


def _share(outputs: int) -> int:
    """Outputs of a program of one row: small, so that all multiprocessors have several."""
    return 4 if outputs < 65536 else 8


def _step(inner: int, gate: bool) -> int:
    """Columns that a program of one row takes at a time; measured, see experiments/decode_speed."""
    return min(512 if gate or inner <= 1024 else 2048, next_power(inner))


def takes(x: Tensor) -> bool:
    """Whether the kernels take rows of this count and dtype."""
    return len(x) == 1 or (len(x) <= MOST_ROWS and x.dtype.itemsize == 2)


def _launch(x, gain, eps, weights, biases=None, residual=None, gate=False) -> Tensor:
    if not takes(x):
        raise BadInput("x", (tuple(x.shape), x.dtype),
                       f"must be one row, or at most {MOST_ROWS} rows of 16-bit floats")
    if len(x) > 1 and gain is not None:  # the tile's loads go straight to the matrix unit
        x, gain = F.rms_norm(x, gain.shape, gain, eps), None
    sizes = [len(w) for w in weights]
    rows, inner = x.shape
    width = sizes[0] if gate else sum(sizes)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    w, b = ([*given, *[given[0]] * (3 - len(given))] for given in (weights, biases or weights))
    n = sizes + [0] * (3 - len(sizes))
    share = _share(width) if rows == 1 else TILE[0]
    programs = sum(-(-size // share) for size in (sizes[:1] if gate else sizes))
    flags = {"GATE": gate, "BIAS": biases is not None, "ADD": residual is not None}
    residual = x if residual is None else residual
    if rows == 1:
        step = _step(inner, gate)
        one_row_kernel[(programs,)](
            x, x if gain is None else gain, *w, *b, residual, out, eps, *n, inner, R=share,
            KB=step, STEPS=-(-inner // step), NORM=gain is not None, num_warps=4, **flags,
            **_early(x.device),
        )
    else:
        many_rows_kernel[(programs,)](
            x, *w, *b, residual, out, *n, inner, rows, width, R=share,
            KB=min(TILE[1], max(16, next_power(inner))), MP=MOST_ROWS, num_warps=TILE[2],
            num_stages=TILE[3], **flags,
        )
    return out


def norm_linear(
    x: Tensor, gain: Tensor | None, eps: float, weights: tuple[Tensor, ...],
    biases: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """As `layer_ref.norm_linear`; at most three weights."""
    return _launch(x, gain, eps, weights, biases)


def gated_linear(x: Tensor, gain: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """As `layer_ref.gated_linear`."""
    return _launch(x, gain, eps, (gate, up), gate=True)


def linear_add(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """As `layer_ref.linear_add`."""
    return _launch(x, None, 0.0, (weight,), residual=residual)


def chain(x: Tensor, mixed, finish, start, cos, sin) -> tuple[Tensor, layer_ref.Heads | None]:
    """As `layer_ref.chain`."""
    return layer_ref.chained(sys.modules[__name__], x, mixed, finish, start, cos, sin)


def rotate(
    qkv: Tensor, heads: int, kv_heads: int, q_gain: Tensor | None, k_gain: Tensor | None,
    eps: float, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `layer_ref.rotate`."""
    rows, total = len(qkv), heads + 2 * kv_heads
    dim = qkv.shape[1] // total
    out = torch.empty(rows * total, dim, dtype=qkv.dtype, device=qkv.device)
    norm = q_gain is not None
    rotate_kernel[(total, rows)](
        qkv, q_gain if norm else qkv, k_gain if norm else qkv, cos, sin, out, eps, rows,
        cos.stride(0) if len(cos) > 1 else 0, HQ=heads, H=kv_heads, D=dim,
        HALF=next_power(dim // 2), NORM=norm, num_warps=1, **_early(qkv.device),
    )
    q, k, v = out.split([rows * heads, rows * kv_heads, rows * kv_heads])
    return q.view(rows, heads, dim), k.view(rows, kv_heads, dim), v.view(rows, kv_heads, dim)
