"""Which tokens score best, in the order of their places; the ground truth of `best_triton`."""

from __future__ import annotations

from torch import Tensor


def best_of(score: Tensor, keep: int) -> Tensor:
    """Places of the `keep` largest of the last dim, ascending, int64; of equals the first."""
    best = score.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    return best.sort(-1).values
