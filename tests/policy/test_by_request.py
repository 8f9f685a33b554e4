"""Policies that hear of requests: what sets each apart from its neighbours."""

from __future__ import annotations

import pytest

from kvlab import policy
from kvlab.blocks import BlockLedger, replay, victims
from kvlab.core import BadInput
from kvlab.policy import Moment
from kvlab.sim import simulate, workloads


def full(made, blocks=4, capacity=None, **facts) -> BlockLedger:
    """Blocks 0..n-1 sealed in this order by request 0 with contents 100, 101, ..."""
    ledger = BlockLedger(capacity or blocks, made)
    ledger.begin(Moment(0, tokens=64))
    ids = ledger.allocate(blocks)
    ledger.seal(ids, content=[100 + id for id in ids], **facts)
    return ledger


def drain(ledger):
    return ledger.reclaim(ledger.evictable_count)


def test_a_request_counts_once_in_lfu():
    """Request 1 decodes five steps on block 0; two requests use block 1."""
    order = {}
    for made in (policy.LFU(), policy.RequestLFU()):
        ledger = full(made, 2)
        ledger.begin(Moment(1))
        for _ in range(5):
            ledger.touch([0])
        ledger.touch([1])
        ledger.begin(Moment(2))
        ledger.touch([1])
        order[made.name] = drain(ledger)
    assert order == {"lfu": [1, 0], "request_lfu": [0, 1]}


def test_a_pin_keeps_the_count_of_requests():
    ledger = full(policy.RequestLFU(), 2)
    ledger.begin(Moment(1))
    ledger.touch([0])
    ledger.pin([0])
    ledger.begin(Moment(2))
    ledger.touch([0])
    ledger.unpin([0])
    ledger.touch([1])
    assert drain(ledger) == [1, 0]


def test_the_same_request_does_not_move_a_block_up_in_arc():
    order = {}
    for made in (policy.ARC(), policy.RequestARC()):
        ledger = full(made, 3)
        ledger.touch([0])  # the request that wrote it reads it: no reuse
        ledger.begin(Moment(1))
        ledger.touch([1])
        order[made.name] = drain(ledger)
    assert order == {"arc": [2, 0, 1], "request_arc": [0, 2, 1]}


def test_a_request_moves_arcs_target_once():
    """Three blocks come back from the ghosts: the target moves by three, or by one."""
    targets = {}
    for made in (policy.ARC(), policy.RequestARC()):
        ledger = full(made, 6)
        ledger.touch([3, 4, 5])
        ledger.free(ledger.reclaim(3))
        ledger.begin(Moment(1))
        ids = ledger.allocate(3)
        ledger.seal(ids, content=[100, 101, 102])
        targets[made.name] = made._target
    assert targets["arc"] > targets["request_arc"] == 1


def test_what_outlived_its_time_is_gone_without_need():
    events = []
    ledger = BlockLedger(8, policy.TTL(seconds=60), events.append)
    for number, at in enumerate((0, 30_000)):
        ledger.begin(Moment(number, at))
        (id,) = ledger.allocate(1)
        ledger.seal([id], content=[number])
    ledger.begin(Moment(2, 50_000))
    ledger.touch([0])  # renewed
    ledger.pin([1])
    assert ledger.begin(Moment(3, 95_000)) == []  # 1 is over, but pinned
    ledger.unpin([1])
    assert ledger.begin(Moment(4, 96_000)) == [1]
    ledger.free([1])
    assert ledger.begin(Moment(5, 110_000)) == [0] == victims(events)[-1:]
    ledger.check()
    assert replay(events, BlockLedger(8, policy.TTL(seconds=60))) is None


def test_a_time_to_live_from_birth():
    ledger = BlockLedger(8, policy.TTL(seconds=60, refresh=False))
    ledger.begin(Moment(0, 0))
    ledger.seal(ledger.allocate(1), content=[7])
    ledger.begin(Moment(1, 50_000))
    ledger.touch([0])
    assert ledger.begin(Moment(2, 61_000)) == [0]


@pytest.mark.parametrize("at, order", [(10_000, [1, 2, 0]), (400_000, [0, 1, 2])])
def test_what_waits_for_a_tool_stays_while_it_may_return(at, order):
    ledger = BlockLedger(3, policy.KeepUntilReturn(patience=300))
    for number, tool in enumerate((True, False, None)):
        ledger.begin(Moment(number, 1000.0 * number, tool=tool))
        ledger.seal(ledger.allocate(1), content=[number])
    ledger.begin(Moment(9, at))
    assert drain(ledger) == order


def test_wa_lru_learns_which_turns_come_back():
    """Sessions always ask twice: what a first turn used is kept, although it is older."""
    made = policy.WALRU(recency=0.1, reuse=0.9, size=0)
    ledger, number = BlockLedger(50, made), 0
    for session in range(20):
        for turn in (0, 1):
            number += 1
            ledger.begin(Moment(number, 1000.0 * number, session, turn, 64))
            ledger.seal(ledger.allocate(1), content=[number])
    assert drain(ledger)[:20] == list(range(1, 40, 2))


def test_admission_by_reuse_keeps_what_was_asked_for_twice():
    ledger = full(policy.AdmitReuse(door=0), 4)
    ledger.touch([0])
    assert drain(ledger) == [1, 2, 3, 0]
    ledger.free(range(4))
    ledger.admit([101, 200, 201, 202])  # 101 left the door and comes back: its second time
    assert [ledger.meta(id).content for id in drain(ledger)] == [200, 201, 202, 101]


def test_admission_by_cost_keeps_long_prompts():
    ledger = BlockLedger(4, policy.AdmitCost(tokens=100, door=0))
    for number, tokens in enumerate((300, 50)):
        ledger.begin(Moment(number, tokens=tokens))
        ledger.seal(ledger.allocate(2), content=[2 * number, 2 * number + 1])
    ledger.begin(Moment(2, tokens=200))
    ledger.touch([3])  # of the short one, wanted by a long one now
    assert drain(ledger) == [2, 0, 1, 3]


def test_learned_lies_between_lru_and_the_bound():
    trace = workloads.chats(600, open_chats=30, system_tokens=256, block_size=64, seed=3)
    hits = {name: simulate(trace, name, 400).block_hits for name in ("lru", "learned", "belady")}
    assert hits["lru"] < hits["learned"] <= hits["belady"]


TRACES = {
    "chats": workloads.chats(400, open_chats=30, system_tokens=256, block_size=64),
    "agents": workloads.agents(400, system_tokens=512, block_size=64),
}


@pytest.mark.parametrize(
    "name, trace, other",
    [
        ("request_arc", "chats", "arc"), ("ttl", "chats", "lru"), ("wa_lru", "chats", "lru"),
        ("keep_until_return", "agents", "lru"), ("admit_reuse", "chats", "lru"),
        ("learned", "chats", "belady"), ("admit_cost", "chats", "lru"),
    ],
)  # fmt: skip
def test_in_a_replay_others_leave_than_under_its_neighbour(name, trace, other):
    gone = {}
    for each in (name, other):
        made = policy.by_name(each, seconds=20) if each == "ttl" else each
        events = []
        result = simulate(TRACES[trace], made, 500, events=events.append)
        gone[each] = victims(events)
        assert result.block_hits + sum(result.misses.values()) == result.block_accesses
    assert gone[name] != gone[other]


def test_expired_blocks_cannot_hit():
    trace = workloads.chats(300, open_chats=5, system_tokens=256, block_size=64, rate=0.05)
    short, long = (simulate(trace, policy.TTL(s), 5000) for s in (60, 1e9))
    assert short.block_hits < long.block_hits == simulate(trace, "lru", 5000).block_hits


@pytest.mark.parametrize(
    "call",
    [
        lambda: simulate(TRACES["chats"], "keep_until_return", 500),
        lambda: simulate(workloads.scans(20), "wa_lru", 500),
        lambda: simulate(TRACES["chats"], "ttl", 500, prefix=False),
        lambda: policy.LeafFirst("ttl"),
        lambda: policy.Adaptive(["lru", "ttl"]),
        lambda: policy.AdmitReuse("ttl"),
        lambda: policy.TTL(0),
        lambda: policy.AdmitReuse(uses=1),
        lambda: policy.WALRU(0, 0, 0),
    ],
)
def test_what_a_policy_would_not_hear_is_refused(call):
    with pytest.raises(BadInput):
        call()
