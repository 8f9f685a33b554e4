"""Which queries a token's score has heard of, and centres that are no centres."""

from __future__ import annotations

import copy

import pytest
import torch

from kvlab import policy
from kvlab.budget import DuoAttention
from kvlab.core import BadInput
from tests.cache.driver import SCALE, make
from tests.cache.test_token_scores import DIM, KV_HEADS, centres, drawn, weights


@pytest.mark.parametrize("name", ["attention_mass", "h2o"])
@pytest.mark.parametrize("counts", [((15, 1), (9, 9)), ((9, 9), (9, 1), (5, 5))])
def test_a_single_token_beside_a_chunk_is_heard(name, counts):
    """A padded row may have one token in a chunk of others."""
    cache = make(layers=1, head_dim=DIM, policy=name, block_size=1, budget_percent=100)
    (group,), seqs = cache.groups, [cache.open(), cache.open()]
    total = [sum(n) for n in zip(*counts)]
    rows, done = [drawn(n, seed) for seed, n in enumerate(total)], [0, 0]
    for step in counts:
        padded = []
        for (q, k, v, _), at, n in zip(rows, done, step):
            new, pad = slice(at, at + n), (0, 0, max(step) - n, 0)
            parts = q[:, new], k[new].transpose(0, 1), v[new].transpose(0, 1)
            padded.append([torch.nn.functional.pad(x, pad) for x in parts])
        cache.begin(seqs, list(step))
        cache.attend(0, *map(torch.stack, zip(*padded)), scale=SCALE)
        cache.commit()
        done = [at + n for at, n in zip(done, step)]
    for seq, n, (q, k, _, _) in zip(seqs, total, rows):
        want = weights(q, k).softmax(-1).unflatten(0, (KV_HEADS, 2)).mean(1).sum(1)
        want = want if name == "h2o" else want / torch.arange(n, 0, -1)
        torch.testing.assert_close(group.watch.standings[seq].score[0], want)


@pytest.mark.parametrize("spoil", [
    lambda x: x[0].pop(), lambda x: x[0][0].pop(), lambda x: x[0][0].append("0.1"),
    lambda x: x[0][0].append(float("nan")), lambda x: x.__setitem__(0, None), lambda x: x.clear(),
])  # fmt: skip
@pytest.mark.parametrize("part", ["real", "imaginary", "norm"])
def test_centres_that_are_no_numbers_of_one_shape_are_refused(part, spoil):
    told = copy.deepcopy(centres())
    spoil(told[part])
    with pytest.raises(BadInput, match="must be what queries of this model point at"):
        policy.TriAttention(told)


@pytest.mark.parametrize("told", [5, {"a": 1}, [["x"]], [[None]], [[float("nan"), 1.0]]])
def test_gates_that_are_no_numbers_are_refused(told):
    with pytest.raises(BadInput, match="must be a number for each key/value head"):
        DuoAttention(told)
