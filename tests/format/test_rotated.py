"""Rotated channels: the turn itself, what is stored of it, and widths that cannot be turned."""

from __future__ import annotations

import pytest
import torch

from kvlab.core import BadInput, CacheGeometry
from kvlab.format import Dense, Fp8, Int, KVFormat, Rotated, by_name
from kvlab.kernel.quantize_ref import rotate


def with_an_outlier(dim=64):
    x = torch.randn(3, 16, 2, dim, generator=torch.Generator().manual_seed(dim))
    x[..., 5] *= 30
    return x


@pytest.mark.parametrize("dim", [1, 2, 32, 128])
def test_a_turn_is_the_hadamard_matrix_and_its_own_inverse(dim):
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    x = torch.randn(5, dim)
    torch.testing.assert_close(rotate(x), x @ matrix * dim**-0.5)
    torch.testing.assert_close(rotate(rotate(x)), x)


def test_planes_are_the_codec_s_and_hold_what_it_stores_of_the_turned_channels():
    inner, x = Int(4, "token", slots_last=True), with_an_outlier()
    mine, planes = Rotated(inner), Rotated(inner).quantize(x)
    assert mine.planes(16, 2, 64) == inner.planes(16, 2, 64) and mine.bits == inner.bits
    want = inner.quantize(rotate(x))
    assert all(torch.equal(planes[name], want[name]) for name in want)
    assert mine.has_kernel and repr(mine) != repr(inner)


def test_few_steps_fit_turned_values_with_an_outlier_better():
    x, inner = with_an_outlier(), Int(2, "token")
    plain, turned = (c.dequantize(c.quantize(x), torch.float32) - x for c in
                     (inner, Rotated(inner)))  # fmt: skip
    assert turned.norm() < 0.8 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sealing_what_a_block_reads_does_not_drift(dtype):
    """A scale may move by a step, since a turn is a rounding; a hundred times move no further."""
    for codec in (Rotated(Int(4, "token")), Rotated(Fp8())):
        x = with_an_outlier().to(dtype)
        first = read = codec.dequantize(codec.quantize(x), dtype)
        for _ in range(100):
            read = codec.dequantize(codec.quantize(read), dtype)
        step = (first.float() - x.float()).abs().mean()
        assert (read.float() - first.float()).abs().mean() < 0.2 * step


def test_widths_that_cannot_be_turned_are_refused():
    format = KVFormat(Dense(), Rotated(Int(2, "token")))
    with pytest.raises(BadInput, match="power of two, and this model's is 96"):
        format.planes(CacheGeometry(1, 2, 2, 96, 16))
    format.planes(CacheGeometry(1, 2, 2, 64, 16))
    with pytest.raises(BadInput, match="two turns are none"):
        Rotated(Rotated(Int(2)))


def test_rotated_keys_go_without_kernels():
    from kvlab.pool import no_kernels

    shape = CacheGeometry(1, 2, 2, 64, 16).shape
    turned = Rotated(Int(4))
    assert "turns them" in no_kernels(KVFormat(turned, Int(4, "token"), "mine"), shape)
    assert no_kernels(KVFormat(Int(4), turned), shape) is None
    assert by_name("int4").identity != KVFormat(Int(4), Rotated(by_name("int4").value)).identity
