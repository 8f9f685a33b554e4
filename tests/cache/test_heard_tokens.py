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


@pytest.mark.parametrize("name", ["attention_mass", "snapkv"])
def test_a_row_that_only_has_padding_changes_nothing_for_another(name):
    """Single tokens beside it are decoded ones, and may exceed the budget for a while as ever."""
    kept = []
    for counts in ([1], [1, 0]):
        cache = make(layers=1, head_dim=DIM, policy=name, budget_percent=50, block_size=2)
        (group,), seqs = cache.groups, [cache.open() for _ in counts]
        q, k, v, _ = drawn(40)
        for at in range(37):
            new = slice(at, at + 1)
            parts = q[:, new], k[new].transpose(0, 1), v[new].transpose(0, 1)
            cache.begin(seqs, counts)
            cache.attend(0, *(torch.stack([x] * len(counts)) for x in parts), scale=SCALE)
            cache.commit()
        table = group.tables[seqs[0]]
        kept.append(group.pool.read(0, table.ids[: table.length // 2])[0])
    torch.testing.assert_close(*kept)


@pytest.mark.parametrize("groups", ["per_head", "all"])
@pytest.mark.parametrize("counts", [(9, 6, 30, 5), (30, *[1] * 21)])
def test_tokens_of_an_open_block_are_heard(counts, groups):
    """A block may be sealed long after its tokens came; nothing that looked at them is lost."""
    cache = make(layers=1, head_dim=DIM, policy="h2o", block_size=8, budget_percent=100,
                 groups=groups)  # fmt: skip
    (group,), seq, n = cache.groups, cache.open(), sum(counts)
    q, k, v, _ = drawn(n)
    done = 0
    for count in counts:
        new = slice(done, done + count)
        cache.begin([seq], [count])
        cache.attend(0, q[None, :, new], *(x[new].transpose(0, 1)[None] for x in (k, v)),
                     scale=SCALE)  # fmt: skip
        cache.commit()
        done += count
    cache.check()
    want = weights(q, k).softmax(-1).unflatten(0, (KV_HEADS, 2)).mean(1).sum(1)
    standings = group.watch.standings
    torch.testing.assert_close(standings.whole(seq).score[0], want)
    torch.testing.assert_close(standings[seq].score[0], want[:, : n // 8 * 8])
    fork = cache.fork(seq)
    cache.truncate(seq, 45)
    torch.testing.assert_close(standings.whole(seq).score[0], want[:, :45])
    torch.testing.assert_close(standings.whole(fork).score[0], want)
    assert standings[seq].tokens == 40


def test_what_stays_of_a_chunk_keeps_how_its_open_block_stood():
    """Chosen within a step, or behind one; the tokens behind the choice go on as they stood."""
    for groups in ("per_head", "all"):
        cache = make(layers=1, head_dim=DIM, policy="h2o", block_size=8, budget_percent=50,
                     groups=groups)  # fmt: skip
        (group,), seq = cache.groups, cache.open()
        q, k, v, _ = drawn(45)
        cache.begin([seq], [45])
        cache.attend(0, q[None], *(x.transpose(0, 1)[None] for x in (k, v)), scale=SCALE)
        cache.commit()
        cache.check()
        want = weights(q, k).softmax(-1).unflatten(0, (KV_HEADS, 2)).mean(1).sum(1)
        stood = group.watch.standings.whole(seq).score[0]
        assert stood.shape[1] == group.tables[seq].length < 45
        torch.testing.assert_close(stood[:, -5:], want[:, -5:])


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


@pytest.mark.parametrize("told", [5, {"a": 1}, [["x"]], [["1"]], [[None]],
                                  [[float("nan"), 1.0]], [[True]], ["12"]])  # fmt: skip
def test_gates_that_are_no_numbers_are_refused(told):
    with pytest.raises(BadInput, match="must be a number for each key/value head"):
        DuoAttention(told)
