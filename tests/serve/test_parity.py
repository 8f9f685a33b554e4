"""The live cache and the simulator make the same decisions, and the policies do not."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from kvlab.blocks import HashSharing, victims
from kvlab.cache import CacheSpec
from kvlab.core import BadInput
from kvlab.eval.recording import differing, record, record_text, replayed, simulated
from kvlab.model.load import RandomModel
from kvlab.policy import asked, names
from kvlab.serve import Limits, TraceRequests
from kvlab.sim import workloads

OF_TOKENS = {n for n in names() if asked(n).scored and asked(n).observes is None}
EVERY = [n for n in names() if n != "none" and not asked(n).asks and n not in OF_TOKENS]
ATTENTIVE = {n for n in EVERY if asked(n).scored}
SERVED = [n for n in EVERY if n not in ATTENTIVE]
LIKE_LRU = {"leaf_first", "priority"}  # with their defaults, when prefixes are touched tail first
OF_TEXTS = {*ATTENTIVE, "fifo", "lru", "lfu", "random"}  # the others need contents to differ
READ = [n for n in EVERY if not asked(n).foresees]


@pytest.fixture(scope="module")
def loaded():
    tiny = RandomModel(hidden_size=32, layers=2, query_heads=2, kv_heads=1, head_dim=16,
                       mlp_size=32, vocabulary=8192)  # fmt: skip
    return tiny.load("cpu")


@pytest.fixture(scope="module")
def requests():
    """Chats, where recency and frequency say different things."""
    trace = workloads.chats(70, open_chats=6, system_tokens=16, user_tokens=8, output_tokens=6,
                            block_size=4)  # fmt: skip
    return TraceRequests(trace, 70, block_tokens=4, output_tokens=3).make(None, 8192)


def serving(blocks=60, **axes):
    return CacheSpec(**{"format": "fp32", "block_size": 4, "budget_blocks": blocks, "policy": "lru",
                        "prefix": HashSharing(outputs=False)} | axes)  # fmt: skip


@pytest.fixture(scope="module")
def live(loaded, requests):
    return {p: record(loaded, serving(), requests, p) for p in SERVED}


@pytest.fixture(scope="module")
def texts(loaded):
    ids = torch.randint(1, 8192, (600,), generator=torch.Generator().manual_seed(0))
    spec = CacheSpec(format="fp32", block_size=4, budget_blocks=24)
    return {p: record_text(loaded, spec, ids, p, 16) for p in READ}


def test_the_policies_disagree(live, texts):
    """Or the rest of this file would prove nothing."""
    chosen = {p: tuple(victims(r.events)) for p, r in live.items() if p not in LIKE_LRU}
    assert not [pair for pair in combinations(chosen, 2) if chosen[pair[0]] == chosen[pair[1]]]
    chosen = {p: tuple(victims(r.events)) for p, r in texts.items() if p in OF_TEXTS}
    assert not [pair for pair in combinations(chosen, 2) if chosen[pair[0]] == chosen[pair[1]]]


@pytest.mark.parametrize("policy", SERVED)
def test_simulated_is_live_to_the_block(live, policy):
    recording = live[policy]
    other = simulated(recording)
    assert recording.evictions > 250
    assert differing(recording.contents(), other.contents) == []
    assert recording.hits().tolist() == other.hits.tolist()
    assert other.result.evictions == recording.evictions


@pytest.mark.parametrize("policy", SERVED)
def test_recorded_requests_replay(live, policy):
    assert replayed(live[policy], policy) is None


@pytest.mark.parametrize("policy", READ)
def test_recorded_texts_replay(texts, policy):
    assert texts[policy].evictions > 100
    assert replayed(texts[policy], policy) is None


@pytest.mark.parametrize("policy", ["lru", "arc", "random", "pgdsf"])
def test_batches_with_preemption_replay(loaded, requests, policy):
    crowd = [r._replace(arrival_ms=0.0) for r in requests]
    recording = record(loaded, serving(), crowd, policy, Limits(running=6, reserve=False))
    assert sum(s.preemptions for s in recording.served) > 0
    assert replayed(recording, policy) is None
    assert replayed(recording, "fifo") is not None


def test_a_difference_is_found_and_named(live):
    found = replayed(live["lru"], "fifo")
    assert found.live != found.other and found.number < live["lru"].evictions
    assert "eviction" in str(found) and "replayed" in str(found)


@pytest.mark.parametrize("made", [
    lambda loaded: record(loaded, serving(groups="per_layer"), [], "lru"),
    lambda loaded: record_text(loaded, serving(prefix="none", groups="per_layer"),
                               torch.ones(4).long(), "lru", 2),
])  # fmt: skip
def test_a_cache_of_several_ledgers_is_refused(loaded, made):
    with pytest.raises(BadInput, match="makes 2 groups of layers"):
        made(loaded)
