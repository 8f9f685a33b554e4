"""The host tier: what each mode copies, keeps and loses, by hand and over whole traces."""

from __future__ import annotations

import random

import pytest

from kvlab.blocks import MODES, BlockLedger, NoTier, mode_by_name
from kvlab.core import BadInput
from kvlab.policy import by_name
from kvlab.sim.outcome import HIT, HOST_HIT
from kvlab.sim.prompts import Prompts


def replay(requests, device: int, mode: str, host: int, policy="lru") -> tuple[Prompts, list]:
    """Each request over before the next comes; the codes of each."""
    ledger = BlockLedger(host, by_name(policy)) if host else None
    tier = mode_by_name(mode)(ledger) if host else NoTier()
    prompts, codes = Prompts(BlockLedger(device, by_name("lru")), tier, False, float), []
    for ids in requests:
        flight = prompts.admit(ids, False)
        prompts.compute(flight, publish=False)
        prompts.finish(flight)
        prompts.holding.check()
        prompts.index.check()
        tier.check()
        codes.append(flight.code)
    return prompts, codes


A, B = [0, 1], [2, 3]  # the last block of a prompt is computed again, wherever it is


def test_an_exclusive_content_is_in_one_place():
    prompts, codes = replay([A, B, A, B, A], 2, "exclusive", 2)
    assert codes == [[0, 0], [0, 0]] + 3 * [[HOST_HIT, HOST_HIT]]
    tier = prompts.tier
    assert (tier.spilled, tier.fetched, tier.evictions) == (8, 3, 0)


def test_write_back_copies_a_content_once():
    prompts, codes = replay([A, B, A, B, A], 2, "write_back", 4)
    assert codes == [[0, 0], [0, 0]] + 3 * [[HOST_HIT, HOST_HIT]]
    assert (prompts.tier.spilled, prompts.tier.fetched) == (4, 3)


def test_write_through_copies_what_is_new_at_once():
    prompts, codes = replay([A, B, A], 2, "write_through", 6)
    assert codes[-1] == [HOST_HIT, HOST_HIT]
    assert (prompts.tier.spilled, prompts.tier.fetched) == (4, 1)
    assert all(prompts.tier.has(content, b"") for content in A + B)


def test_an_inclusive_tier_of_the_same_size_holds_less():
    """What is on the device takes its place on the host as well."""
    requests = [[n] for n in (0, 1, 2, 0, 1, 2)]
    hits = {mode: sum(c[0] >= HIT for c in replay(requests, 1, mode, 2)[1]) for mode in MODES}
    assert hits["exclusive"] == 3 > hits["write_through"]


def test_what_is_used_on_the_host_stays_there():
    """LRU on the host: a content that keeps coming back outlives one that came later."""
    requests = [[0], [1], [0], [2], [3], [0]]
    assert replay(requests, 1, "write_back", 2)[1][-1] == [HOST_HIT]
    assert replay(requests, 1, "write_back", 2, "fifo")[1][-1] == [0]


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("policy", ["lru", "fifo", "s3fifo", "arc"])
def test_tiers_only_add_hits_and_copies_add_up(mode, policy):
    draw = random.Random(3)
    requests = []
    for _ in range(300):
        root, length = draw.randrange(25), draw.randrange(1, 9)
        requests.append([root * 100 + i for i in range(length)])
    alone = replay(requests, 12, mode, 0)[1]
    prompts, codes = replay(requests, 12, mode, 30, policy)
    tier = prompts.tier
    assert sum(c >= HIT for r in codes for c in r) > sum(c >= HIT for r in alone for c in r)
    held = tier.ledger.held_count
    moved = tier.fetched if mode == "exclusive" else 0
    assert held <= tier.spilled - tier.evictions - moved, "what came is there, left or moved back"
    # within a request LRU is the same with or without a host: the device hits are, too
    assert [c == HIT for r in codes for c in r].count(True) >= 100


def test_device_hits_do_not_depend_on_the_mode():
    draw, requests = random.Random(5), []
    for _ in range(200):
        requests.append([draw.randrange(20) * 10 + i for i in range(1)])
    found = {mode: replay(requests, 6, mode, 9)[1] for mode in MODES}
    device = {mode: [c == HIT for r in codes for c in r] for mode, codes in found.items()}
    assert device["exclusive"] == device["write_back"] == device["write_through"]


def test_unknown_modes_are_refused():
    with pytest.raises(BadInput, match="known: exclusive, write_back, write_through"):
        mode_by_name("sideways")
