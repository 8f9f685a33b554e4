"""Finite keys, values and queries make no summary fail, and every entry is finite."""

from __future__ import annotations

import pytest
import torch

from kvlab.summary import Fitted, Merged, Queries
from kvlab.summary.base import logits, tokens
from kvlab.summary.fitted import asked
from kvlab.summary.solve import nnls, ridge

H, D, N, QUERIES = 2, 32, 150, 48
CHANNELS = torch.tensor([3, 17, 18])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(size, same_sign=True):
    """Some channels far from zero, as biases of key projections make them."""
    k = draw(N, H, D)
    k[..., CHANNELS] = size * (1.0 if same_sign else draw(N, H, 3, seed=1)) + k[..., CHANNELS]
    return k


KEYS = {
    "ordinary": draw(N, H, D), "far channels": outliers(150.0), "channels at 1e4": outliers(1e4),
    "wide channels": outliers(1e4, same_sign=False), "constant": torch.ones(N, H, D),
    "zeros": torch.zeros(N, H, D), "a few again and again": draw(5, H, D).repeat(N // 5, 1, 1),
    "two that overflow": outliers(1e30), "the largest": 3e38 * draw(N, H, D).sign(),
}  # fmt: skip
VALUES = {"ordinary": draw(N, H, D, seed=2), "zeros": torch.zeros(N, H, D),
          "one far": outliers(1e4), "the largest": 3.38e38 * draw(N, H, D).sign()}  # fmt: skip
MEMBERS = {"merged": Merged(), "fitted": Fitted(solver_steps=20),
           "selected": Fitted(keys="selected", damping=1e-9, solver_steps=20)}  # fmt: skip


def questions(past, size, rest) -> Queries:
    """Queries `size` times the usual length, each of which found e^rest (or 1) elsewhere."""
    q = draw(H, QUERIES, D, seed=5) * D**-0.5 * size
    return Queries(q, logits(q, past).logsumexp(-1) + rest * draw(H, QUERIES, seed=6).abs())


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("member", MEMBERS)
def test_entries_are_finite_where_they_are_kept(member, keys, values):
    past = tokens(KEYS[keys], VALUES[values])
    for queries in (None, questions(past, 0.1, 0.0), questions(past, 30.0, 90.0)):
        entries = MEMBERS[member].summarize(past, 9, queries).to(torch.bfloat16)
        assert all(x.isfinite().all() for x in entries)
        again = MEMBERS[member].summarize(entries, 2, queries).to(torch.bfloat16)
        assert all(x.isfinite().all() for x in again)


@pytest.mark.parametrize("keys", ["merged", "selected"])
def test_no_fit_is_kept_that_answers_worse_than_its_start(keys):
    """And none falls back where keys are ordinary."""
    for name in ("ordinary", "far channels", "wide channels", "a few again and again"):
        past, member = tokens(KEYS[name], VALUES["ordinary"]), Fitted(keys=keys)
        queries = questions(past, 1.0, 2.0)
        want = asked(past, queries)
        start, fitted = (x.reduce(past, 9, queries) for x in (Merged(), member))
        if keys == "merged":
            assert (want.miss(fitted, queries) <= want.miss(start, queries) + 1e-3).all()
        if name == "ordinary":
            assert member.fallbacks == 0


@pytest.mark.parametrize("broken", ["nan", "worse"])
@pytest.mark.parametrize("keys", ["merged", "selected"])
def test_a_head_whose_fit_fails_is_merged_and_counted(monkeypatch, keys, broken):
    past, member = tokens(KEYS["ordinary"], VALUES["ordinary"]), Fitted(keys=keys)
    queries = questions(past, 1.0, 0.0)
    whole = member.reduce(past, 9, queries)
    fit = member.fit

    def failing(*args):
        entries = fit(*args)
        entries.v[4, 1] = torch.nan if broken == "nan" else 1e3
        return entries

    monkeypatch.setattr(member, "fit", failing)
    got, plain = member.reduce(past, 9, queries), Merged().reduce(past, 9, queries)
    assert member.fallbacks == 1
    for mine, fitted, merged in zip(got, whole, plain):
        assert torch.equal(mine[:, 0], fitted[:, 0]) and torch.equal(mine[:, 1], merged[:, 1])


def test_a_system_that_cannot_be_solved_is_not_a_number():
    a = torch.full((2, 6, 3), 1.0)
    a[1, 2, 1] = torch.inf
    found = ridge(a, draw(2, 6, 4), torch.zeros(2, 3, 4), damping=1e-30)
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_solutions_have_no_unit(size):
    """Both sides times anything: the same solution, where squares would vanish or overflow."""
    a, b, c = draw(12, 5).abs(), draw(12, seed=1), draw(12, 4, seed=2)
    starts = torch.ones(5), torch.ones(5, 4)
    for solve, right, start, more in (
        (nnls, b, starts[0], {"steps": 50}), (ridge, c, starts[1], {}),
    ):
        want = solve(a, right, start, damping=0.1, **more)
        got = solve(a * size, right * size, start, damping=0.1, **more)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
