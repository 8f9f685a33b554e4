"""The best of each row, in order: the kernel gives the places that the reference gives."""

import pytest
import torch

from kvlab.kernel import best_ref

best_triton = pytest.importorskip("kvlab.kernel.best_triton")


@pytest.mark.parametrize("shape, keep", [((2, 3, 50), 7), ((4, 64), 63), ((2, 130), 1),
                                         ((3, 20), 20), ((3, 20), 0), ((1, 1), 1)])
def test_places(shape, keep, device):
    score = torch.randn(shape, generator=torch.Generator().manual_seed(keep)).to(device)
    got = best_triton.best_of(score, keep)
    assert torch.equal(got, best_ref.best_of(score, keep))
    assert got.shape == (*shape[:-1], keep)


@pytest.mark.parametrize("keep", [1, 5, 12, 30, 39])
def test_of_equals_the_first(keep, device):
    inf = torch.inf
    rows = [
        [0.0] * 40, [1.0, 2.0] * 20, [inf] * 4 + [0.5] * 30 + [inf] * 6,
        [-0.0, 0.0] * 20, [-inf] * 20 + [1e-38] * 20, [-1.0, -2.0, 3.0, -inf] * 10,
        [2.0**-i for i in range(40)], [-(2.0**i) for i in range(40)],
    ]
    score = torch.tensor(rows, device=device)
    assert torch.equal(best_triton.best_of(score, keep), best_ref.best_of(score, keep))


def test_long_rows(device):
    score = torch.rand(1, 5000, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(best_triton.best_of(score, 700), best_ref.best_of(score, 700))
