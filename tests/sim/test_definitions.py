"""What counts: each definition by hand, and the same in every way to replay a trace."""

import numpy as np
import pytest

from kvlab.core import BadInput
from kvlab.sim import Definitions, Trace, fast, from_requests, hit_curve, simulate, weighted_curve
from kvlab.sim.definitions import first_of_session, with_outputs
from kvlab.sim.describe import from_other_sessions, ideal
from kvlab.sim.jobs import HitRate


def sessions(rows, session, block=4, **more):
    """Requests of (tokens, output, ids); whole blocks only."""
    made = from_requests([(float(i), *row) for i, row in enumerate(rows)], block)
    columns = {"session": np.array(session)}
    return Trace(**{**vars(made), "columns": columns, "whole_blocks": True, **more})


def test_rates_by_block_by_token_and_by_request(tiny):
    trace = from_requests([(0, 6, 0, [1, 2]), (1, 6, 0, [1, 2]), (2, 9, 0, [1, 3, 4])], 4)
    result = simulate(trace, "lru", 10)
    assert result.block_hit_percent == pytest.approx(100 * 3 / 7)
    assert result.token_hit_percent == pytest.approx(100 * 10 / 21)
    assert result.request_any_hit_percent == pytest.approx(100 * 2 / 3)
    assert result.request_mean_hit_percent == pytest.approx(100 * (0 + 1 + 1 / 3) / 3)
    names = {m.name: m for m in result.measurements()}
    assert names["request_mean_hit_percent"].count == 3


def test_a_partial_last_block_hits_misses_or_is_not_there():
    trace = from_requests([(0, 6, 0, [1, 2]), (1, 6, 0, [1, 2]), (2, 3, 0, [5])], 4)
    found = {}
    for choice in ("hit", "miss", "drop"):
        definitions = Definitions(choice)
        applied = definitions.apply(trace)
        result = simulate(applied, "lru", 10, partial_blocks=definitions.replayed)
        found[choice] = (result.block_hits, result.block_accesses, result.token_hits, result.tokens)
        best = ideal(applied, definitions.replayed)
        assert (best.block_hits, best.token_hits) == (result.block_hits, result.token_hits)
    assert found == {"hit": (2, 5, 6, 15), "miss": (1, 5, 4, 15), "drop": (1, 2, 4, 15)}


def test_a_measured_interval_leaves_the_warm_up_out():
    trace = from_requests([(i, 4, 0, [i % 2]) for i in range(8)], 4)
    parts = [0, 1], [0.5, 1]
    whole, half = (simulate(Definitions(measured=m).apply(trace), "lru", 4) for m in parts)
    assert (whole.block_hits, whole.block_accesses, whole.requests) == (6, 8, 8)
    assert (half.block_hits, half.block_accesses, half.requests, half.tokens) == (4, 4, 4, 16)
    assert half.misses["compulsory"] == 0 and whole.misses["compulsory"] == 2


def test_first_requests_of_sessions_can_be_left_out():
    trace = sessions([(4, 0, [1]), (4, 0, [1]), (8, 0, [1, 2]), (4, 0, [3])], [0, 1, 0, -1])
    assert first_of_session(trace).tolist() == [True, True, False, True]
    result = simulate(Definitions(first_requests="skipped").apply(trace), "lru", 9)
    assert (result.block_hits, result.block_accesses, result.tokens) == (1, 2, 8)
    assert from_other_sessions(trace) == pytest.approx(100 / 5)


def test_kept_outputs_are_found_by_the_session_s_next_request():
    rows = [(9, 4, [1, 2]), (20, 9, [1, 2, 3, 4, 5]), (4, 8, [7])]
    trace = sessions(rows, [0, 0, 1])
    kept = with_outputs(trace)
    assert [len(r) for r in kept.requests()] == [3, 7, 3]
    assert list(kept.requests())[0] == [1, 2, 3]
    assert kept.columns["prompt_blocks"].tolist() == [2, 5, 1]
    dropped, warm = simulate(trace, "lru", 20), simulate(kept, "lru", 20)
    assert (dropped.block_hits, warm.block_hits) == (2, 3)
    assert dropped.block_accesses == warm.block_accesses == 8 and warm.tokens == trace.tokens


def test_outputs_that_do_not_come_back_are_nobody_s():
    shorter = [(9, 8, [1, 2]), (12, 0, [1, 2, 3])]  # thinking was taken out of the next prompt
    kept = with_outputs(sessions(shorter, [0, 0]))
    assert simulate(kept, "lru", 20).block_hits == 2
    assert len(set(kept.ids.tolist())) == 5


@pytest.mark.skipif(fast.loops is None, reason="the extra `fast` is not installed")
def test_every_way_to_replay_counts_the_same(trie):
    for seed in range(12):
        plain = trie(seed, requests=40, depth=5, fan=3)
        columns = {"session": np.arange(len(plain)) % 5}
        trace = Trace(**{**vars_of(plain), "columns": columns})
        for definitions in (
            Definitions("drop"), Definitions("miss", (0.25, 0.75)),
            Definitions("drop", (0, 0.5), "kept", "skipped"), Definitions("hit", (0.5, 1)),
        ):  # fmt: skip
            applied = definitions.apply(trace)
            capacities, hits = hit_curve(applied, definitions.replayed)
            weighted = weighted_curve(applied, applied.block_tokens, definitions.replayed)[1]
            for capacity in (6, 9, 14):
                how = {"partial_blocks": definitions.replayed}
                one = simulate(applied, "lru", capacity, **how)
                two = simulate(applied, "lru", capacity, compiled=True, **how)
                one.orphans = None
                assert vars(one) == vars(two)
                at = min(capacity, capacities[-1]) - capacities[0]
                if at >= 0:
                    assert (hits[at], weighted[at]) == (one.block_hits, one.token_hits)
                assert one.block_hits + sum(one.misses.values()) == one.block_accesses


def vars_of(trace):
    return {name: getattr(trace, name) for name in Trace.__dataclass_fields__}


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda t: Definitions("maybe"), "must be 'hit' or 'miss' or 'drop'"),
        (lambda t: Definitions(measured=[0.5, 0.5]), "two shares"),
        (lambda t: Definitions(measured=[0.1, 0.2]).apply(t), "no request of tiny is left"),
        (lambda t: Definitions(outputs="kept").apply(t), "partial_blocks=drop"),
        (lambda t: Definitions("drop", outputs="kept").apply(t), "does not say which requests"),
        (lambda t: Definitions(first_requests="skipped").apply(t), "does not say which requests"),
        (lambda t: HitRate(t, measured=[0.5, 1]), "bounds the hits of all requests together"),
    ],
)
def test_what_cannot_be_right_is_refused(tiny, make, said):
    with pytest.raises(BadInput, match=said):
        make(tiny([0], [1]))
