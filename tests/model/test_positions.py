"""Where a batch goes on: positions of tokens are noted as a plain reading of each row says."""

import numpy as np
import pytest
import torch

from kvlab.model.columns import Columns, Plan, _order


def plan_of(real):
    counts = [int(n) for n in real.sum(1)]
    return Plan(real.shape[1], counts, None if real.all() else real, _order(real))


@pytest.mark.parametrize("seed", range(40))
def test_positions_are_noted_row_by_row(seed):
    rng = np.random.default_rng(seed)
    rows, columns = int(rng.integers(1, 4)), None
    columns = Columns(rows)
    ends, odd = [0] * rows, False
    for _ in range(4):
        width = int(rng.integers(1, 4))
        real = rng.random((rows, width)) < rng.choice([0.5, 1.0])
        at = np.zeros((rows, width), np.int64)
        for row in range(rows):
            held = int(columns.lengths()[row])
            mine = ends[row] + np.arange(real[row].sum()) + (rng.random() < 0.2) * (held > 0)
            if len(mine) > 1 and rng.random() < 0.1:
                mine[-1] += 3
            at[row, real[row]] = mine
            if len(mine):
                odd |= held > 0 and mine[0] != ends[row]
                odd |= bool((np.diff(mine) != 1).any())
                ends[row] = int(mine[-1]) + 1
        columns.advance(plan_of(real), torch.from_numpy(at))
        assert columns.next_positions() == ends and bool(columns._odd) == odd
