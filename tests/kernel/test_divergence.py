"""Negative log likelihood, KL and agreement: the kernel says what the reference says."""

import pytest
import torch

from kvlab.kernel import divergence_ref

divergence_triton = pytest.importorskip("kvlab.kernel.divergence_triton")


def logits(tokens, vocabulary, seed, dtype, device):
    drawn = torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))
    return (8 * drawn).to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 4096, 9001])
def test_as_the_reference(vocabulary, dtype, device):
    full = logits(5, vocabulary, 0, dtype, device)
    own = full + 0.1 * logits(5, vocabulary, 1, dtype, device)
    targets = torch.arange(5, device=device) % vocabulary
    want = divergence_ref.divergence(own, full, targets)
    got = divergence_triton.divergence(own, full, targets)
    for a, b in zip(got[:2], want[:2]):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert torch.equal(got[2], want[2]) and got[2].dtype == torch.bool
    alone = divergence_triton.surprise(own, targets)
    torch.testing.assert_close(alone, divergence_ref.surprise(own, targets), rtol=2e-5, atol=2e-5)


def test_of_equal_logits_the_first_is_the_likeliest(device):
    full, own = torch.zeros(2, 2, 5000, device=device)
    full[:, [10, 4999]] = own[:, 10] = 3.0
    own[1, 4] = 3.0
    targets = torch.tensor([0, 4999], device=device)
    for room in (divergence_ref, divergence_triton):
        assert room.divergence(own, full, targets)[2].tolist() == [True, False]


def test_a_slice_of_longer_rows_and_no_divergence_from_itself(device):
    full = logits(4, 300, 3, torch.bfloat16, device)[:, 20:220]
    targets = torch.zeros(4, dtype=torch.long, device=device)
    nll, kl, same = divergence_triton.divergence(full, full, targets)
    assert kl.max() < 1e-6 and same.all()
    torch.testing.assert_close(nll, divergence_ref.surprise(full, targets))
