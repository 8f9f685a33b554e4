"""Generators: the same seed gives the same trace, and each stresses what it says."""

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import hit_curve, load_trace, simulate, workloads, write_trace

MAKERS = [workloads.system_prompts, workloads.chats, workloads.agents, workloads.scans]


@pytest.mark.parametrize("make", MAKERS)
def test_traces_are_seeded_chained_and_writable(make, tmp_path):
    one, two, other = make(60), make(60), make(60, seed=1)
    assert np.array_equal(one.ids, two.ids) and np.array_equal(one.arrival_ms, two.arrival_ms)
    assert not np.array_equal(one.input_tokens, other.input_tokens)
    one.check_prefix_chained()
    assert np.all(np.diff(one.arrival_ms) >= 0)
    back = load_trace(write_trace(one, tmp_path / "w.jsonl.gz"))
    assert np.array_equal(back.ids, one.ids)


def test_popular_system_prompts_hit_more_when_popularity_is_skewed():
    flat = workloads.system_prompts(300, skew=0.0)
    skewed = workloads.system_prompts(300, skew=2.0)
    assert hit_curve(skewed)[1][-1] / skewed.accesses > hit_curve(flat)[1][-1] / flat.accesses


def test_chat_turns_hold_all_before():
    trace = workloads.chats(200, open_chats=1, turns=10**9)
    lengths = np.diff(trace.first)
    assert np.all(np.diff(lengths) >= 0)
    # all full blocks of a turn's prompt come again in the next turn
    chats = list(trace.requests())
    assert all(b[: len(a) - 1] == a[:-1] for a, b in zip(chats, chats[1:]))


def test_agents_return_to_their_prompts():
    trace = workloads.agents(480, agents=4, steps=12)
    starts = [ids[:96] for ids in trace.requests()]  # 6,144 tokens of 64
    assert len({tuple(ids) for ids in starts}) == 4


def test_scans_thrash_lru_and_not_the_others():
    trace = workloads.scans(400, hot_share=0.3, documents=20)
    capacity = 19 * 130  # the loop and the hot documents do not fit
    lru = simulate(trace, "lru", capacity, window_seconds=None)
    arc = simulate(trace, "arc", capacity, window_seconds=None)
    assert arc.block_hits > 1.1 * lru.block_hits
    with pytest.raises(BadInput, match="between 0 and 1"):
        workloads.scans(10, hot_share=2)
