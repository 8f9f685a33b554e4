"""Merging partial attention results is exact up to fp32 rounding."""

import pytest
import torch

merge_triton = pytest.importorskip("kvlab.kernel.merge_triton")


def attention(q, k, v):
    logits = torch.einsum("htd,hnd->htn", q.double(), k.double())
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


@pytest.mark.parametrize("cuts", [[40], [1, 39], [7, 20, 13]])
def test_parts_give_the_whole(cuts, device):
    q, k, v = (torch.randn(3, n, 24, device=device) for n in (5, 40, 40))
    want, want_lse = attention(q, k, v)
    pieces = zip(k.split(cuts, 1), v.split(cuts, 1))
    parts = [tuple(x.float() for x in attention(q, *piece)) for piece in pieces]
    out, lse = merge_triton.merge(parts)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse.double(), want_lse, atol=2e-6, rtol=1e-5)


def test_empty_parts_leave_the_others_alone(device):
    out, lse = torch.randn(2, 3, 64, device=device), torch.randn(2, 3, device=device)
    nothing = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    got, got_lse = merge_triton.merge([nothing, (out, lse), nothing])
    torch.testing.assert_close(got, out)
    torch.testing.assert_close(got_lse, lse)
    got, got_lse = merge_triton.merge([nothing, nothing])
    assert not got.any() and (got_lse == -torch.inf).all()


def test_takes_strided_half_precision_parts_and_spares_its_inputs(device):
    out, lse = torch.randn(2, 3, 64, device=device), torch.randn(2, 3, device=device)
    part = torch.randn(3, 2, 64, device=device).half().transpose(0, 1)
    part_lse, kept = torch.randn(2, 3, device=device), out.clone()
    got, _ = merge_triton.merge([(out, lse), (part, part_lse)])
    a, b = torch.softmax(torch.stack([lse, part_lse]), 0)[..., None]
    torch.testing.assert_close(got, out * a + part.float() * b)
    assert torch.equal(out, kept)


@pytest.mark.parametrize("fresh", [True, False])
def test_folds_several_parts_at_once(fresh, device):
    parts = torch.randn(3, 5, 4, 24, device=device).half().transpose(1, 2)  # [n, Hq, T, D]
    lses = torch.randn(3, 4, 5, device=device)
    out, lse = torch.randn(4, 5, 24, device=device), torch.randn(4, 5, device=device)
    pieces = list(zip(parts, lses)) + ([] if fresh else [(out.clone(), lse.clone())])
    want, want_lse = merge_triton.merge(pieces)
    merge_triton.merge_into(out, lse, parts, lses, fresh)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
