"""Shares of attention by token: the kernel against its reference, the reference in fp64."""

import pytest
import torch

from kvlab.kernel import shares_ref

shares_triton = pytest.importorskip("kvlab.kernel.shares_triton")


def drawn(heads, kv_heads, tokens, n, dim, dtype, device):
    g = torch.Generator().manual_seed(n)
    q = torch.randn(heads, tokens, dim, generator=g).to(device, dtype)
    k = torch.randn(n, kv_heads, dim, generator=g).to(device, dtype)
    x = torch.einsum("htd,nhd->htn", q.double(),
                     k.double().repeat_interleave(heads // kv_heads, 1)) * 0.2  # fmt: skip
    hidden = torch.ones(tokens, n, device=device).triu(n - tokens + 1).bool()
    x = x.masked_fill(hidden, -torch.inf)
    shares = x.softmax(-1).unflatten(0, (kv_heads, -1)).mean((1, 2))
    return q, k, x.logsumexp(-1).float(), shares.float()


@pytest.mark.parametrize("heads, kv_heads, tokens, n, dim", [
    (4, 2, 5, 70, 32), (6, 2, 64, 200, 64), (3, 3, 1, 17, 16), (4, 1, 33, 33, 24)])
@pytest.mark.parametrize("op", ["ref", "triton"])
def test_shares(heads, kv_heads, tokens, n, dim, op, device):
    q, k, lse, want = drawn(heads, kv_heads, tokens, n, dim, torch.float32, device)
    token_shares = (shares_ref if op == "ref" else shares_triton).token_shares
    torch.testing.assert_close(token_shares(q, k, lse, scale=0.2), want, atol=2e-6, rtol=1e-4)


def test_takes_strided_halves(device):
    q, k, lse, _ = drawn(4, 2, 40, 90, 32, torch.float16, device)
    want = shares_ref.token_shares(q[:, -8:], k, lse[:, -8:], scale=0.2)
    got = shares_triton.token_shares(q[:, -8:], k, lse[:, -8:], scale=0.2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=2e-2)


@pytest.mark.parametrize("op", ["ref", "triton"])
def test_layers_at_once(op, device):
    token_shares = (shares_ref if op == "ref" else shares_triton).token_shares
    layers = [drawn(4, 2, 40, n, 32, torch.float32, device)[:3] for n in (90, 90, 90)]
    q, k, lse = (torch.stack(x) for x in zip(*layers))
    got = token_shares(q[:, :, -8:], k, lse[:, :, -8:], scale=0.2)
    for one, (q, k, lse) in zip(got, layers):
        want = shares_ref.token_shares(q[:, -8:], k, lse[:, -8:], scale=0.2)
        torch.testing.assert_close(one, want, atol=2e-6, rtol=1e-4)
