"""Budgets divided among layer groups: the members, the arithmetic, and a live cache that obeys."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlab.budget import Equal, Pyramid, Shares, blocks_in, blocks_of, by_name, parts_of
from kvlab.cache import CacheSpec, PagedCache
from kvlab.core import BadInput, CacheGeometry
from kvlab.sim.sizes import ModelShape, group_blocks

LAYERS = [(layer,) for layer in range(8)]
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def groups_of(counts):
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [tuple(range(end - n, end)) for n, end in zip(counts, ends)]


def members(groups, draw):
    return [Equal(), Pyramid(draw(st.floats(1, 50))),
            Shares(draw(st.lists(st.floats(0.1, 9), min_size=len(groups), max_size=len(groups))))]


def test_a_pyramid_has_the_numbers_of_its_paper():
    """max_num = 2 * mean - min_num, min_num = mean / beta, and equal steps between."""
    weights = Pyramid(beta=20).weights(LAYERS)
    assert weights[0] == pytest.approx(2 - 1 / 20) and weights[-1] == pytest.approx(1 / 20)
    steps = {round(a - b, 9) for a, b in zip(weights, weights[1:])}
    assert len(steps) == 1 and sum(weights) == pytest.approx(8)
    assert Pyramid(1).weights(LAYERS) == pytest.approx([1.0] * 8)
    assert Pyramid().weights([(0,)]) == [1.0]
    assert Pyramid(20).weights([(0, 7), (1, 2, 3, 4, 5, 6)]) == pytest.approx([1, 1])


@given(st.data(), sizes)
def test_weights_have_the_mean_one_over_layers(data, counts):
    groups = groups_of(counts)
    for member in members(groups, data.draw):
        weights = member.weights(groups)
        assert sum(n * w for n, w in zip(counts, weights)) == pytest.approx(sum(counts))
        assert min(weights) > 0


@given(st.data(), sizes, st.integers(1, 10**6), st.integers(1, 10**12))
def test_blocks_never_exceed_the_budget(data, counts, blocks, nbytes):
    groups = groups_of(counts)
    each = data.draw(st.lists(st.integers(1, 10**6), min_size=len(counts), max_size=len(counts)))
    for member in members(groups, data.draw):
        try:
            found = blocks_of(member, blocks, groups)
            assert sum(n * got for n, got in zip(counts, found)) <= blocks * sum(counts) + 1e-6
        except BadInput as error:
            assert "leaves no block" in str(error)
        try:
            found = blocks_in(member, nbytes, groups, each)
            assert sum(got * size for got, size in zip(found, each)) <= nbytes
        except BadInput as error:
            assert "leaves no block" in str(error)
    if blocks:
        assert blocks_of(Equal(), blocks, groups) == [blocks] * len(groups)


@given(st.data(), sizes, st.floats(0.01, 1.0))
def test_what_a_group_has_no_use_for_goes_to_others(data, counts, percent):
    groups = groups_of(counts)
    most = data.draw(st.lists(st.integers(1, 500), min_size=len(counts), max_size=len(counts)))
    parts = [n * percent for n in most]
    total = sum(n * part for n, part in zip(counts, parts))
    for member in members(groups, data.draw):
        kept = parts_of(member, parts, most, groups)
        assert all(0 <= a <= b + 1e-6 for a, b in zip(kept, most))
        got = sum(n * part for n, part in zip(counts, kept))
        if len(set(most)) == 1:  # shares of unlike pasts need not add up to the whole
            assert got == pytest.approx(total)
    assert parts_of(Equal(), parts, most, groups) == parts


@pytest.mark.parametrize(
    ("make", "sentence"),
    [(lambda: Pyramid(0.5), "budget.beta=0.5: must be at least 1"),
     (lambda: Shares(), "one for each layer group"),
     (lambda: Shares([1, 0]), "positive numbers"),
     (lambda: Shares([1, 2]).weights([(0,)]), "must be 1 numbers"),
     (lambda: blocks_of(Pyramid(20), 10, LAYERS), "leaves no block for layer group 7"),
     (lambda: CacheSpec(budget="pyramid", groups="per_layer").checked_for(SMALL),
      "there is none: give cache.budget_percent"),
     (lambda: CacheSpec(budget="pyramid", budget_blocks=9, policy="lru").checked_for(SMALL),
      "only one; cache.groups=per_layer")],
)  # fmt: skip
def test_refusals(make, sentence):
    with pytest.raises(BadInput, match=sentence):
        make()


SMALL = CacheGeometry(4, 4, 2, 16, 4)


def run(tokens=120, **axes):
    cache = PagedCache(SMALL, CacheSpec(format="fp32", block_size=4, policy="fifo", **axes))
    seq, random = cache.open(), torch.Generator().manual_seed(0)
    for _ in range(tokens // 8):
        cache.begin([seq], [8])
        for layer in range(4):
            q, k, v = (torch.randn(1, h, 8, 16, generator=random) for h in (4, 2, 2))
            cache.attend(layer, q, k, v, scale=0.25)
        cache.commit()
    cache.check()
    return cache, [group.ledger.held_count for group in cache.groups]


def test_a_live_cache_divides_blocks_as_the_formula_says():
    pyramid = {"budget": Pyramid(4), "groups": "per_layer"}
    cache, held = run(budget_blocks=16, **pyramid)
    assert [g.ledger.capacity for g in cache.groups] == blocks_of(Pyramid(4), 16, LAYERS[:4])
    assert held == [28, 20, 12, 4] and cache.stats().evictions == 4 * 30 - sum(held)
    block = cache.spec.format.block_bytes(SMALL)
    cache, held = run(budget_bytes=16 * block, **pyramid)
    assert held == [28, 20, 12, 4]
    shape = ModelShape.of(SMALL, 1.0)
    assert group_blocks(16 * block, "fp32", shape, 4, Pyramid(4), LAYERS[:4]) == held


def test_a_relative_budget_is_divided_too():
    _, held = run(budget_percent=50, budget=Pyramid(4), groups="per_layer")
    assert held == [26, 18, 11, 3]
    _, held = run(budget_percent=80, budget=Pyramid(4), groups="per_layer")
    assert held[0] == 30 and sum(held) == pytest.approx(0.8 * 120, abs=3)
    _, equal = run(budget_percent=50, groups="per_layer")
    assert equal == [15] * 4


def test_tokens_are_chosen_within_divided_budgets():
    axes = {"policy": "snapkv", "evict": "token", "budget_percent": 50,
            "budget": Shares([3, 1, 1, 1])}  # fmt: skip
    cache = PagedCache(SMALL, CacheSpec(format="fp32", block_size=4, groups="per_head", **axes))
    seq = cache.open()
    cache.begin([seq], [96])
    for layer in range(4):
        cache.attend(layer, *(torch.randn(1, h, 96, 16) for h in (4, 2, 2)), scale=0.25)
    cache.commit()
    cache.check()
    assert [g.ledger.held_count for g in cache.groups] == [24, 8, 8, 8]


def test_members_by_name_and_no_torch():
    assert by_name("pyramid", beta=3).beta == 3
    script = "import sys, kvlab.budget; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
