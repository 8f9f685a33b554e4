"""Compiled replay is the policy objects' replay: the same outcomes, the same victims in order."""

from dataclasses import replace
from functools import partial
from types import FunctionType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlab.core import BadInput
from kvlab.policy import (
    ARC,
    LRU,
    MQ,
    S3FIFO,
    TTL,
    WALRU,
    Adaptive,
    AdmitCost,
    AdmitReuse,
    AttentionMass,
    Belady,
    Hybrid,
    KeepUntilReturn,
    LeafFirst,
    Priority,
    Random,
    asked,
    by_name,
)  # fmt: skip
from kvlab.sim import (
    CostModel,
    Definitions,
    Host,
    Sessions,
    TraceStream,
    fast,
    from_requests,
    simulate,
)  # fmt: skip
from kvlab.sim import write_trace as write
from kvlab.sim.workloads import scans

needs_numba = pytest.mark.skipif(fast.loops is None, reason="the extra `fast` is not installed")

# One piece of machine code each: the same code with other parameters costs no compilation.
FORESEE = {name: lambda name=name: name for name in fast.PREFIX if asked(name).foresees}
ROWS = {name: partial(by_name, name) for name in fast.PREFIX if name != "adaptive"}  # on its own
ROWS |= FORESEE | {
    "priority 2": lambda: Priority(prefix_blocks=2),
    "random 7": lambda: Random(seed=7),
    "s3fifo 1": lambda: S3FIFO(small=0.3, promote=1),
    "mq 3": lambda: MQ(queues=3, lifetime=5, ghosts=0.5),
    "hybrid 5": lambda: Hybrid(half_life=5, frequency=-1.0, cost=0.5),
    "ttl 2": lambda: TTL(seconds=2),
    "ttl 2, once": lambda: TTL(seconds=2, refresh=False),
    "keep_until_return 3": lambda: KeepUntilReturn(patience=3),
    "wa_lru 9": lambda: WALRU(recency=0.4, reuse=0.5, size=0.3, horizon=9),
    "admit_cost 12": lambda: AdmitCost(tokens=12, door=0.3),
    "admit_reuse 3": lambda: AdmitReuse(uses=3, door=0.4, ghosts=0.5),
}
OVER = {
    "leaves of fifo": lambda: LeafFirst("fifo"),
    "leaves of arc": lambda: LeafFirst("arc"),
    "leaves of wa_lru": lambda: LeafFirst(WALRU(horizon=9)),
    "door of arc": lambda: AdmitReuse("arc", door=0.4),
    "door of gdsf": lambda: AdmitReuse("gdsf", door=0.4),
    "door of lfu": lambda: AdmitReuse("lfu", door=0.4),
    "leaves of a door of s3fifo": lambda: LeafFirst(AdmitCost("s3fifo", tokens=12, door=0.4)),
    "door of leaves of hybrid": lambda: AdmitCost(Hybrid(half_life=5), tokens=12, door=0.4),
}
COMPILED = {"leaves of a door of s3fifo", "door of leaves of hybrid", "door of gdsf"}  # of OVER
WHEN = st.tuples(st.sampled_from([0.0, 300.0, 2500.0]), st.integers(-1, 2), st.booleans())


def told(trace, when):
    """The trace with times, sessions and calls of tools."""
    gaps, sessions, tools = zip(*when[: len(trace)]) if len(trace) else ((), (), ())
    columns = {"session": np.array(sessions, int), "tool": np.array(tools, np.int8)}
    return replace(trace, arrival_ms=np.cumsum(gaps), columns=trace.columns | columns)


@st.composite
def tries(draw):
    """Prefix-chained ids, some of them partial, some requests longer than most capacities."""
    paths = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=60))
    ids, rows = {}, []
    for at, path in enumerate(paths):
        chain = [ids.setdefault(tuple(path[: n + 1]), len(ids)) for n in range(len(path))]
        rows.append((float(at), 4 * len(chain) - (chain[-1] % 3 == 0), 1, chain))
    when = draw(st.lists(WHEN, min_size=len(rows), max_size=len(rows)))
    return told(from_requests(rows, 4, "trie"), when)


@st.composite
def heaps(draw):
    """Any ids in any order: repeated within a request, behind different blocks, far apart."""
    request = st.lists(st.integers(-2, 9).map(lambda n: n * 10**9), min_size=1, max_size=8)
    rows = draw(st.lists(st.tuples(request, st.integers(0, 3)), max_size=50))
    made = [(float(at), 4 * len(ids) - cut, 1, ids) for at, (ids, cut) in enumerate(rows)]
    when = draw(st.lists(WHEN, min_size=len(rows), max_size=len(rows)))
    return told(from_requests(made, 4, "heap"), when)


def replay(trace, policy, capacity, host=(), **how):
    """Every field of the result, and what became of each access and when what left.

    host: (capacity, policy, mode) of each tier behind, the nearest first."""
    pieces, tiers = [], None
    for room, made, mode in reversed(host):
        tiers = Host(room, made(), mode, behind=tiers)
    host = tiers
    how |= {"host": host, "outcomes": lambda _, outcome: pieces.append(outcome[:3])}
    result = vars(simulate(trace, policy(), capacity, **how))
    result["orphans"] = None  # counted where the ledger is
    return result, [np.concatenate(arrays).tolist() for arrays in zip(*pieces)]


def same(trace, policy, capacity, **how):
    plain = replay(trace, policy, capacity, **how)
    assert replay(trace, policy, capacity, compiled=True, **how) == plain


@needs_numba
@pytest.mark.parametrize("name", ROWS)
def test_requests(name):
    traces = tries() if name in FORESEE else tries() | heaps()

    @settings(max_examples=120, deadline=None)
    @given(traces, st.sampled_from([1, 2, 3, 5, 8, 13, 20]), st.sampled_from(["hit", "miss"]))
    def check(trace, capacity, partial_blocks):
        same(trace, ROWS[name], capacity, partial_blocks=partial_blocks)

    check()


def in_turn(cases, compiled):
    """Of combinations of policies some are compiled; the loops of the others, which are bound in
    the same way, run as the Python that they are written in."""
    return [pytest.param(case, "compiled" if case in compiled else "plain") for case in cases]


@needs_numba
@pytest.mark.parametrize("name, how", in_turn(OVER, COMPILED), indirect=["how"])
def test_a_policy_over_another(name, how):
    @settings(max_examples=120, deadline=None)
    @given(tries() | heaps(), st.sampled_from([1, 2, 3, 5, 8, 13, 20]))
    def check(trace, capacity):
        same(trace, OVER[name], capacity)

    check()


TIERS = [
    ("fifo", "arc", "exclusive"), ("lru", "hybrid", "exclusive"), ("lru", "random", "write_back"),
    ("sieve", "lfu", "write_through"), ("ttl 2", "ttl 2", "write_back"),
    ("none", "admit_reuse", "exclusive"), ("lru", "none", "exclusive"),
]  # fmt: skip
MODES_APART = {TIERS[0], TIERS[2], TIERS[3]}


@needs_numba
def test_a_template_has_every_verb():
    """What no plain run sees: numba reads a name that is never called."""
    known = {name for name in vars(fast.catalog.verbs) if not name.startswith("__")}
    for made in (ROWS | OVER).values():
        policy = made()
        found = None if isinstance(policy, str) else fast.catalog.made(policy)
        if found:
            assert known <= vars(found.verbs).keys(), policy


@needs_numba
def test_plain_loops_are_plain(plain):
    loop = fast.Compiled("lru", 3, True)._runner.loop
    assert isinstance(loop, FunctionType)


@needs_numba
@pytest.mark.parametrize("case, how", in_turn(TIERS, MODES_APART), indirect=["how"])
def test_a_tier_behind(case, how):
    device, host, mode = case

    @settings(max_examples=120, deadline=None)
    @given(tries() | heaps(), st.sampled_from([1, 2, 3, 5, 8, 13]), st.sampled_from([1, 2, 5, 9]))
    def check(trace, capacity, room):
        tier = room, ROWS[host], mode
        same(trace, ROWS[device], capacity, host=(tier,), partial_blocks="miss")

    check()


TWO_TIERS = [
    ("exclusive", "exclusive"), ("exclusive", "write_back"), ("write_back", "exclusive"),
    ("write_back", "write_through"), ("write_through", "exclusive"),
    ("write_through", "write_through"),
]  # fmt: skip


@needs_numba
@pytest.mark.parametrize("case, how", in_turn(TWO_TIERS, {TWO_TIERS[3]}), indirect=["how"])
def test_two_tiers_behind(case, how):
    upper, lower = case

    @settings(max_examples=100, deadline=None)
    @given(tries() | heaps(), *[st.sampled_from([1, 2, 3, 5, 8, 13])] * 3)
    def check(trace, capacity, room, depth):
        tiers = (room, ARC, upper), (depth, ROWS["admit_reuse"], lower)
        same(trace, LRU, capacity, host=tiers, partial_blocks="miss")

    check()


@needs_numba
@pytest.mark.parametrize("name", ["lru", "s3fifo", "arc", "gdsf"])
def test_single_accesses(name, trie):
    for seed in range(12):
        for capacity in (1, 2, 7, 11, 33, 60):
            same(trie(seed, 60, 5, 3), ROWS[name], capacity, prefix=False)
    same(scans(100), ROWS[name], 500, prefix=False)


@needs_numba
@pytest.mark.parametrize("name", ["lru", "belady", "pgdsf"])
def test_a_recorded_trace(synthetic, name):
    same(synthetic, ROWS[name], 2000)


@needs_numba
def test_definitions_count_alike(trie):
    for measured, first in (((0.5, 1.0), "counted"), ((0.2, 0.7), "counted")):
        rules = Definitions(measured=measured, first_requests=first)
        for capacity in (3, 11, 40):
            same(rules.apply(trie(5, 60, 5, 3)), LRU, capacity)


@needs_numba
@pytest.mark.parametrize("name", ["lru", "random"])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_stream_is_one_run(tmp_path, trie, name, prefix):
    trace = trie(3, requests=300, depth=6, fan=3)
    stream = TraceStream(write(trace, tmp_path / "t.jsonl"), piece=50)
    whole = simulate(trace, name, 25, prefix, compiled=True)
    assert vars(simulate(stream, name, 25, prefix, compiled=True)) == vars(whole)


@needs_numba
def test_what_is_not_compiled_is_refused(tiny):
    trace, again = tiny([0]), by_name("lru")
    for policy, sentence in (
        (AttentionMass(), "goes by scores of attention, which no trace has"),
        (type("Mine", (LRU,), {})(), "compiled replay knows: adaptive, admit_cost"),
        (AdmitReuse(AdmitCost()), "has a door before another door"),
        (AdmitReuse("fifo"), "has a door before another door, fifo"),
        (LeafFirst(Belady(())), "has a member that knows the future, belady"),
        (LeafFirst("adaptive"), "compiled replay knows"),
        (Adaptive(["lru", "fifo"]), "goes by the future or by birth"),
        ("wa_lru", "asks which requests are a session"),
    ):
        with pytest.raises(BadInput, match=sentence):
            simulate(trace, policy, compiled=True)
    with pytest.raises(BadInput, match="has no events"):
        simulate(trace, "lru", events=print, compiled=True)
    with pytest.raises(BadInput, match="which a closed loop changes"):
        closed = Sessions(loop="closed")
        simulate(trace, "lru", service=CostModel(), sessions=closed, compiled=True)
    with pytest.raises(BadInput, match="is compiled alone"):
        simulate(trace, "lru", host=Host(5, "adaptive"), compiled=True)
    with pytest.raises(BadInput, match="adaptive chooser with prefix=True only"):
        simulate(trace, "adaptive", 5, prefix=False, compiled=True)
    simulate(trace, again, compiled=False)
    with pytest.raises(BadInput, match="has served a cache already"):
        simulate(trace, again, compiled=True)
    with pytest.raises(BadInput, match="at most 16"):
        simulate(trace, MQ(queues=17), compiled=True)
    with pytest.raises(BadInput, match="known ahead"):
        simulate(TraceStream("synthetic"), "belady", compiled=True)


def test_without_numba_the_remedy_is_named(monkeypatch, tiny):
    monkeypatch.setattr(fast, "loops", None)
    with pytest.raises(BadInput, match=r"pip install .kvlab\[fast\]"):
        simulate(tiny([0]), "lru", compiled=True)


@needs_numba
def test_tables_grow_without_losing_state():
    ids = np.concatenate([np.arange(500), np.arange(5000, 5500), np.arange(0, 500)])
    whole = from_requests([(0.0, 1, 0, [i]) for i in ids.tolist()], 1)
    runner = fast.Compiled("lru", 600, prefix=False)
    parts = [runner.run(whole.select(np.arange(1500) // 500 == part)) for part in range(3)]
    code = np.concatenate([part.code for part in parts])
    plain = fast.Compiled("lru", 600, prefix=False).run(whole).code
    assert np.array_equal(code, plain)
