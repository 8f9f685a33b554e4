"""The fused pieces of a decoder layer against plain torch, on odd sizes."""

from functools import partial

import pytest
import torch

from kvlab.core import BadInput
from kvlab.kernel import layer_cuda, layer_ref

layer_triton = pytest.importorskip("kvlab.kernel.layer_triton")
layer_blas = pytest.importorskip("kvlab.kernel.layer_blas_triton")

SHAPES = [(1, 64, (24, 8, 8)), (1, 1000, (40,)), (1, 2100, (7, 5, 3)), (3, 200, (24, 8, 8)),
          (16, 520, (33,))]


def wide(*tensors):
    return [None if x is None else x.float() for x in tensors]


def close(got, want, plain):
    """Within twice the error of plain torch in the same dtype; a rounding where it has none."""
    error, allowed = ((x.float() - want).norm() for x in (got, plain))
    rounding = 1e-6 if got.dtype == torch.float32 else 2**-9
    assert error <= 2 * allowed + rounding * want.norm()


def weights(inner, sizes, dtype, device):
    return [torch.randn(n, inner, device=device).to(dtype) * inner**-0.5 for n in sizes]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows, inner, sizes", SHAPES)
def test_norm_linear(rows, inner, sizes, normed, biased, device):
    dtype = torch.bfloat16 if rows > 1 else torch.float32
    x = (3 * torch.randn(rows, inner, device=device)).to(dtype)
    gain = torch.rand(inner, device=device).to(dtype) if normed else None
    w = weights(inner, sizes, dtype, device)
    b = weights(1, sizes, dtype, device) if biased else None
    b = [x[:, 0].contiguous() for x in b] if biased else None
    got = layer_triton.norm_linear(x, gain, 1e-6, tuple(w), b)
    want = layer_ref.norm_linear(*wide(x, gain), 1e-6, wide(*w), wide(*b) if b else None)
    close(got, want, layer_ref.norm_linear(x, gain, 1e-6, w, b))


@pytest.mark.parametrize("rows, inner, outer", [(1, 96, 40), (1, 1100, 13), (5, 130, 40)])
def test_gated_linear(rows, inner, outer, device):
    x = torch.randn(rows, inner, device=device).bfloat16()
    gain = torch.rand(inner, device=device).bfloat16()
    gate, up = weights(inner, (outer, outer), torch.bfloat16, device)
    got = layer_triton.gated_linear(x, gain, 1e-6, gate, up)
    want = layer_ref.gated_linear(*wide(x, gain), 1e-6, *wide(gate, up))
    close(got, want, layer_ref.gated_linear(x, gain, 1e-6, gate, up))


@pytest.mark.parametrize("rows, inner, outer", [(1, 96, 40), (1, 3000, 13), (9, 300, 40)])
def test_linear_add(rows, inner, outer, device):
    x, residual = (torch.randn(rows, n, device=device).bfloat16() for n in (inner, outer))
    (w,) = weights(inner, (outer,), torch.bfloat16, device)
    got = layer_triton.linear_add(x, w, residual)
    want = layer_ref.linear_add(*wide(x, w, residual))
    close(got, want, layer_ref.linear_add(x, w, residual))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows, heads, kv_heads, dim", [(1, 4, 2, 16), (3, 3, 1, 24)])
def test_rotate(rows, heads, kv_heads, dim, normed, device):
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim, device=device).bfloat16()
    gains = [torch.rand(dim, device=device).bfloat16() if normed else None for _ in range(2)]
    angle = torch.rand(rows, dim, device=device)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    got = layer_triton.rotate(qkv, heads, kv_heads, *gains, 1e-6, cos, sin)
    want = layer_ref.rotate(*wide(qkv), heads, kv_heads, *wide(*gains), 1e-6, *wide(cos, sin))
    plain = layer_ref.rotate(qkv, heads, kv_heads, *gains, 1e-6, cos, sin)
    for a, b, c in zip(got, want, plain):
        assert a.is_contiguous() and a.shape == b.shape
        close(a, b, c)


def layer(inner, heads, kv_heads, dim, outer, dtype, device, biased=False):
    """Random weights of a layer behind and before its attention."""
    sizes = [n * dim for n in (heads, kv_heads, kv_heads)]
    (o,), (down,) = (weights(n, (inner,), dtype, device) for n in (heads * dim, outer))
    gate, up = weights(inner, (outer, outer), dtype, device)
    gains = [(0.5 + torch.rand(n, device=device)).to(dtype) for n in (inner, inner, dim, dim)]
    qkv = tuple(weights(inner, sizes, dtype, device))
    biases = tuple(torch.randn(n, device=device).to(dtype) for n in sizes) if biased else None
    return (layer_ref.Finish(o, gains[0], 1e-6, gate, up, down),
            layer_ref.Start(gains[1], 1e-6, qkv, biases, heads, kv_heads, *gains[2:], 1e-6))


def widened(x):
    if isinstance(x, torch.Tensor):
        return x.float()
    if isinstance(x, tuple):
        return type(x)(*map(widened, x)) if hasattr(x, "_fields") else tuple(map(widened, x))
    return x


def check_chain(chain, x, mixed, finish, start, cos, sin):
    """Every result as close to fp32 as plain torch's, up to twice."""
    def every(given):
        y, heads = layer_ref.chain(*given)
        return [y, *(heads or ())]

    given = (x, mixed, finish, start, cos, sin)
    got, heads = chain(*given)
    assert (heads is None) == (start is None)
    for a, b, c in zip([got, *(heads or ())], every(map(widened, given)), every(given)):
        assert a.shape == b.shape
        close(a, b, c)


CHAINS = [(layer_triton, 1), (layer_triton, 3), (layer_blas, 20)]


@pytest.mark.parametrize("ops, rows", CHAINS)
def test_chain(ops, rows, device):
    finish, start = layer(64, 4, 2, 16, 96, torch.bfloat16, device, biased=rows == 3)
    x, mixed = (torch.randn(rows, 64, device=device).bfloat16() for _ in range(2))
    angle = torch.rand(rows, 16, device=device)
    angles = angle.cos().bfloat16(), angle.sin().bfloat16()
    check_chain(ops.chain, x, mixed, finish, start, *angles)
    check_chain(ops.chain, x, mixed, finish, None, None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, inner, heads, kv_heads, dim, outer", [
    (2, 512, 8, 4, 64, 1536), (5, 1024, 16, 8, 128, 3072), (16, 1024, 16, 8, 128, 3072),
    (9, 2048, 16, 2, 256, 5632),
])
def test_chain_in_one_launch(rows, inner, heads, kv_heads, dim, outer, dtype, device):
    """Three launches of each kind: counters and tags go on from one to the next."""
    finish, start = layer(inner, heads, kv_heads, dim, outer, dtype, device, biased=rows == 5)
    angle = torch.rand(rows, dim, device=device)
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    for _ in range(3):
        x, mixed = (torch.randn(rows, n, device=device).to(dtype) for n in (inner, heads * dim))
        if not layer_cuda.takes(x, finish, start):
            pytest.skip("no Hopper, or no cuda-bindings")
        chain = partial(layer_cuda.chain, of=layer_cuda.sizes(x, finish, start))
        check_chain(chain, x, mixed, finish, start, *angles)
        check_chain(chain, x, mixed, finish, None, *angles)
        check_chain(chain, x, None, None, start, *angles)


def test_refuses_what_the_matrix_unit_would_round(device):
    x, w = torch.randn(2, 32, device=device), torch.randn(8, 32, device=device)
    assert not layer_triton.takes(x)
    with pytest.raises(BadInput, match="16-bit"):
        layer_triton.norm_linear(x, None, 0.0, (w,))
