"""Retrieval without a cache: digests, budgets and refusals."""

import pytest
import torch

from kvlab import axes
from kvlab.core import BadInput
from kvlab.retrieval import MeanKey, NoRetrieval, Quest, RandomChoice, by_name

MEMBERS = [axes.find("retrieval", name) for name in axes.names("retrieval") if name != "none"]


@pytest.mark.parametrize("member", MEMBERS)
def test_a_digest_has_the_declared_shape(member):
    k = torch.randn(5, 16, 3, 8)
    assert member().digest(k).shape == (5, 3, member.sides, 8)


def test_quest_bounds_every_product():
    k, q = torch.randn(5, 16, 3, 8), torch.randn(3, 8)
    digest = Quest().digest(k)
    bound = (q[None, :, None] * digest).amax(2).sum(-1)
    assert (bound[:, None] >= (k * q).sum(-1) - 1e-5).all()


def test_a_mean_key_scores_the_mean_product():
    k, q = torch.randn(5, 16, 3, 8), torch.randn(3, 8)
    score = (q * MeanKey().digest(k)[:, :, 0]).sum(-1)
    torch.testing.assert_close(score, (k * q).sum(-1).mean(1))


def test_random_digests_repeat_and_ignore_the_keys():
    k = torch.randn(5, 16, 3, 8)
    first, second = RandomChoice(seed=1), RandomChoice(seed=1)
    assert torch.equal(first.digest(k), second.digest(2 * k))
    assert not torch.equal(first.digest(k), second.digest(k)[:, :, :, :1])
    assert not torch.equal(RandomChoice(seed=2).digest(k), RandomChoice(seed=1).digest(k))


def test_budgets_come_in_whole_blocks():
    assert Quest(budget_tokens=100, sinks=4, recent=17).blocks(16) == (6, 1, 2)
    assert Quest(budget_tokens=64, sinks=0, recent=0).blocks(16) == (4, 0, 0)
    with pytest.raises(BadInput, match="retrieval.budget_tokens=48: must exceed the 48 tokens"):
        Quest(budget_tokens=48, sinks=4, recent=17).blocks(16)


@pytest.mark.parametrize("wrong", [
    {"budget_tokens": 0}, {"sinks": -1}, {"recent": 1.5}, {"group": "mean"}, {"digests": "int8"},
])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_wrong_parameter_is_refused(member, wrong):
    with pytest.raises(BadInput, match="retrieval." + next(iter(wrong))):
        member(**wrong)


def test_members_by_name():
    assert by_name("quest", budget_tokens=64).budget_tokens == 64
    assert not NoRetrieval.selects
    with pytest.raises(BadInput, match="known: mean_key, none, quest, random"):
        by_name("best")
