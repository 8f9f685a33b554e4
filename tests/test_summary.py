"""Summaries as pure functions: exact where they can be, better than nothing where they cannot."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls as scipy_nnls

from kvlab import summary as room
from kvlab.core import BadInput
from kvlab.kernel import attend_ref, attend_sdpa
from kvlab.summary import Fitted, Merged, MergeMean, Queries, RandomTokens, Summary
from kvlab.summary.base import SEGMENT_ENTRIES, concat, logits, shares, tokens
from kvlab.summary.fitted import selected
from kvlab.summary.groups import contiguous, kmeans
from kvlab.summary.solve import nnls, ridge

H, G, D, SCALE = 2, 2, 16, 0.25
MEMBERS = [Merged(), Merged(grouping="contiguous"), Fitted(), Fitted(keys="selected"),
           MergeMean(), RandomTokens()]  # fmt: skip
FINE = [m for m in MEMBERS if isinstance(m, Merged)]


def named(member) -> str:
    return "-".join([member.name, *(str(getattr(member, k, "")) for k in ("grouping", "keys"))])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(count=12, each=20, spread=0.05, seed=0):
    """`each` noisy copies of `count` keys and values, in neighbourhoods."""
    k, v = draw(count, H, D, seed=seed), draw(count, H, D, seed=seed + 1)
    k, v = (x.repeat_interleave(each, 0) for x in (2 * k, v))
    return tokens(*(x + spread * draw(*x.shape, seed=seed + 2 + i) for i, x in enumerate((k, v))))


def asked(past, count=32, rest=0.0, seed=7) -> Queries:
    """Queries whose total is the past's alone, times e^rest."""
    q = draw(H, G * count, D, seed=seed) * SCALE * 2
    return Queries(q, logits(q, past).logsumexp(-1) + rest)


def answer(entries, queries):
    """Output and lse of `queries` over `entries`, by the reference kernel."""
    k, v, bias = entries
    return attend_ref.attend(queries.q / SCALE, k, v, scale=SCALE, bias=bias)


def error(entries, past, queries) -> float:
    """Mean squared output error where half of the attention goes elsewhere, to zero values."""
    exact, full = answer(past, queries)
    if entries is None:
        return float(exact.square().mean() / 4)
    out, lse = answer(entries, queries)
    share = torch.sigmoid(lse - full)[..., None]
    return float((out * share - exact / 2).square().mean())


# ---- attention with a bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_bias_of_log_n_stands_for_n_equal_tokens(dtype, queries):
    q, k, v = (draw(*s, seed=i).to(dtype) for i, s in enumerate(((4, queries, D), (6, H, D),
                                                                 (6, H, D))))  # fmt: skip
    times = torch.tensor([1, 2, 3, 4, 5, 60])
    want = attend_ref.attend(q, k.repeat_interleave(times, 0), v.repeat_interleave(times, 0),
                             scale=SCALE)  # fmt: skip
    bias = times.float().log()[:, None].expand(-1, H)
    for kernel in (attend_ref, attend_sdpa):
        out, lse = kernel.attend(q, k, v, scale=SCALE, bias=bias)
        tight = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.float(), want[0], rtol=tight, atol=tight)
        torch.testing.assert_close(lse.float(), want[1], rtol=tight, atol=tight)


@pytest.mark.gpu
@pytest.mark.parametrize("entries", [1, 37, 800])
def test_a_bias_on_cuda_is_that_of_the_reference(entries):
    """Through the flash kernel, whose bf16 holds the bias in three dims."""
    q, k, v = (draw(*s, seed=i).bfloat16().cuda() for i, s in enumerate(
        ((16, 64, 128), (entries, 8, 128), (entries, 8, 128))))  # fmt: skip
    bias = 10 * draw(entries, 8, seed=3).cuda()
    want = attend_ref.attend(q, k, v, scale=128**-0.5, bias=bias)
    got = attend_sdpa.attend(q, k, v, scale=128**-0.5, bias=bias)
    torch.testing.assert_close(got[0].float(), want[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got[1], want[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("member", MEMBERS, ids=named)
def test_members_on_cuda_agree_with_the_cpu(member):
    past = clustered(spread=0.3)
    queries = asked(past, rest=0.5)
    fresh = asked(past, seed=99)
    here = member.summarize(past, 12, queries)
    there = member.summarize(type(past)(*(x.cuda() for x in past)), 12,
                             Queries(*(x.cuda() for x in queries)))  # fmt: skip
    back = type(past)(*(x.cpu() for x in there))
    assert error(back, past, fresh) == pytest.approx(error(here, past, fresh), rel=0.05)


# ---- members


@pytest.mark.parametrize("member", MEMBERS, ids=named)
def test_as_many_entries_as_tokens_are_the_tokens(member):
    past = tokens(draw(9, H, D), draw(9, H, D, seed=1))
    assert member.summarize(past, 9) is past
    queries = asked(past)
    near = member.reduce(past, 9, queries)  # even if it were made to work
    assert error(near, past, queries) < (1e-6 if isinstance(member, Merged) else 1.0)


@pytest.mark.parametrize("member", FINE, ids=named)
def test_equal_tokens_merge_exactly(member):
    past = clustered(count=6, each=10, spread=0.0)
    entries = member.summarize(past, 6, asked(past))
    fresh = asked(past, seed=99)
    if named(member) == "fitted-alike-selected":
        pytest.skip("selects the most attended tokens, which may be copies of each other")
    assert error(entries, past, fresh) < 1e-6


@pytest.mark.parametrize("queries", [None, "asked"])
@pytest.mark.parametrize("member", FINE, ids=named)
def test_clustered_keys_are_better_than_a_hole_and_than_chance(member, queries):
    past = clustered()
    queries = asked(past) if queries else None
    entries = member.summarize(past, 12, queries)
    fresh = asked(past, seed=99)
    lost = error(entries, past, fresh)
    assert lost < error(None, past, fresh)
    if getattr(member, "keys", None) == "selected":
        return  # the most attended tokens may all be copies of one
    assert lost < 0.5 * error(None, past, fresh)
    assert lost < error(RandomTokens().summarize(past, 12), past, fresh)
    assert lost < error(MergeMean().summarize(past, 12), past, fresh)


@pytest.mark.parametrize("keys", ["merged", "selected"])
def test_fitted_answers_its_queries_no_worse_than_its_start(keys):
    past = clustered(count=40, each=5, spread=0.5)
    queries = asked(past, rest=0.7)
    start = Merged().summarize(past, 20, queries)
    if keys == "selected":
        start = selected(past, 20, queries)
    for damping in (1e-3, 0.1, 0.3):
        fitted = Fitted(keys=keys, damping=damping).summarize(past, 20, queries)
        assert error(fitted, past, queries) < 0.95 * error(start, past, queries)


@pytest.mark.parametrize("grouping", ["alike", "contiguous"])
def test_merging_conserves_the_mean_mass(grouping):
    past = clustered(spread=0.5)
    queries = asked(past, rest=1.0)
    entries = Merged(grouping=grouping).summarize(past, 10, queries)
    before, after = (shares(queries, x).sum(-1).mean(-1) for x in (past, entries))
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)


def test_entries_are_summarized_again_with_their_mass():
    """Merging in two rounds still stands for all tokens: bias is mass, not a count of entries."""
    past = clustered(count=8, each=32, spread=0.0)
    queries = asked(past)
    once = Merged(grouping="contiguous").summarize(past, 32, queries)
    twice = Merged(grouping="contiguous").summarize(once, 8, queries)
    torch.testing.assert_close(twice.bias.exp(), torch.full((8, H), 32.0), rtol=1e-3, atol=0)
    assert error(twice, past, queries) < 1e-6


def test_random_keeps_tokens_as_they_are():
    past = clustered()
    entries = RandomTokens(seed=3).summarize(past, 7)
    again = RandomTokens(seed=3).summarize(past, 7)
    assert entries.count == 7 and not entries.bias.any()
    assert torch.equal(entries.k, again.k)
    assert all(any(torch.equal(k, row) for row in past.k) for k in entries.k)


@pytest.mark.parametrize("member", MEMBERS, ids=named)
def test_hostile_inputs_stay_finite(member):
    """Equal tokens, huge keys, queries that find nothing here: no NaN and no infinity."""
    for scale in (0.0, 1e-3, 30.0):
        past = tokens(draw(50, H, D) * scale, draw(50, H, D, seed=1))
        for rest in (0.0, 200.0, -200.0):
            entries = member.summarize(past, 5, asked(past, rest=rest))
            assert entries.count == 5 and all(x.isfinite().all() for x in entries)
            assert entries.bias.dtype == torch.float32


def test_a_long_past_is_cut_into_segments():
    past = tokens(draw(2 * SEGMENT_ENTRIES + 5, H, D), draw(2 * SEGMENT_ENTRIES + 5, H, D, seed=1))
    assert Merged(grouping="contiguous").summarize(past, 100).count == 100
    assert Merged(grouping="contiguous").summarize(past, 1).count == 1


# ---- growing


@pytest.mark.parametrize("batch", [1, 3, 16, 100])
def test_entries_follow_the_ratio(batch):
    member, entries, seen = Merged(ratio=0.1, grouping="contiguous"), None, 0
    while seen < 300:
        seen += batch
        new = tokens(draw(batch, H, D, seed=seen), draw(batch, H, D, seed=-seen))
        before = entries
        entries, stable = member.absorb(entries, new, seen)
        if before is not None:
            assert torch.equal(entries.k[:stable], before.k[:stable])
        assert 0 <= entries.count - int(0.1 * seen) <= 1
    # nothing is lost on the way: the bias counts every token where keys are all alike
    assert entries.k.isfinite().all()


def test_small_batches_are_folded_in_with_their_mass():
    member, entries = Merged(ratio=0.01, grouping="contiguous"), None
    k, v = draw(1, H, D), draw(1, H, D, seed=1)
    for seen in range(1, 51):
        entries, _ = member.absorb(entries, tokens(k, v), seen, asked(tokens(k, v)))
    assert entries.count == 1
    torch.testing.assert_close(entries.bias.exp(), torch.full((1, H), 50.0), rtol=1e-3, atol=0)


def test_the_bound_holds_and_old_entries_halve():
    member, entries = Merged(ratio=0.5, max_entries=20, grouping="contiguous"), None
    for step in range(1, 12):
        new = tokens(draw(10, H, D, seed=step), draw(10, H, D, seed=-step))
        entries, stable = member.absorb(entries, new, 10 * step)
        assert entries.count <= 20
        assert stable in (0, entries.count - 5)


def test_entries_of_another_dtype_join():
    past = tokens(draw(8, H, D), draw(8, H, D, seed=1))
    joined = concat([past.to(torch.bfloat16), past])
    assert joined.k.dtype == torch.float32 and joined.count == 16
    assert past.to(torch.bfloat16).nbytes == 8 * H * (2 * D * 2 + 4)


# ---- groups and solvers


def test_kmeans_finds_what_is_apart():
    truth = (torch.arange(60) // 20).roll(6)
    x = torch.stack([draw(3, 5, seed=s)[truth] * 10 + draw(60, 5, seed=s + 9) for s in (1, 2)])
    groups = kmeans(x, contiguous(tokens(draw(60, 2, 1), draw(60, 2, 1)), 3), 3,
                    torch.ones(2, 60), steps=10)  # fmt: skip
    for row in groups:
        for label in range(3):
            assert row[truth == label].unique().numel() == 1
        assert row.unique().numel() == 3


@pytest.mark.parametrize("shape", [(40, 10), (10, 25)])
def test_nnls_agrees_with_scipy(shape):
    a, b = draw(3, *shape).double().abs(), draw(3, shape[0], seed=1).double()
    got = nnls(a, b, torch.ones(3, shape[1]).double(), damping=1e-9, steps=3000)
    assert (got >= 0).all()
    for x, matrix, target in zip(got, a, b):
        _, least = scipy_nnls(matrix.numpy(), target.numpy())
        assert float((matrix @ x - target).norm()) <= least + 1e-3


def test_damping_holds_the_start():
    a, b, start = draw(40, 10).abs(), draw(40, seed=1), torch.full((10,), 3.0)
    held = nnls(a, b, start, damping=1e6, steps=200)
    torch.testing.assert_close(held, start, rtol=1e-3, atol=1e-3)
    values = ridge(draw(12, 5), draw(12, 4, seed=1), torch.ones(5, 4), damping=1e8)
    torch.testing.assert_close(values, torch.ones(5, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("unknowns", [6, 30])
def test_ridge_without_damping_is_least_squares(unknowns):
    a, b = draw(2, 12, unknowns).double(), draw(2, 12, 3, seed=1).double()
    got = ridge(a, b, torch.zeros(2, unknowns, 3).double(), damping=1e-9)
    want = torch.linalg.lstsq(a, b).solution
    torch.testing.assert_close(a @ got, a @ want, rtol=1e-4, atol=1e-4)


# ---- names and refusals


def test_names():
    assert room.by_name("fitted", ratio=0.1).ratio == 0.1
    with pytest.raises(BadInput, match="known: fitted, merge_mean, merged, none, random(, text)?"):
        room.by_name("gist")
    assert not room.by_name("none").makes and all(m.makes for m in MEMBERS)
    assert all(isinstance(m, Summary) for m in MEMBERS)


@pytest.mark.parametrize(
    ("member", "arguments"),
    [(Merged, {"ratio": 0}), (Merged, {"ratio": 1.5}), (Merged, {"ratio": True}),
     (Merged, {"max_entries": 1}), (Merged, {"grouping": "x"}), (Merged, {"steps": 0}),
     (Fitted, {"keys": "x"}), (Fitted, {"damping": 0}), (Fitted, {"solver_steps": 0}),
     (RandomTokens, {"ratio": -1}), (MergeMean, {"max_entries": 0})],
)  # fmt: skip
def test_senseless_arguments_are_refused(member, arguments):
    with pytest.raises(BadInput, match=f"summary.{next(iter(arguments))}"):
        member(**arguments)
