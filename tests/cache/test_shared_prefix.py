"""Shared prefixes of a live cache: what is found, kept, evicted and refused, and equal answers."""

from __future__ import annotations

import random

import pytest
import torch
from driver import Driver, held_bytes, make

from kvlab import policy as policies
from kvlab.blocks import HashSharing, Serving, Shared, victims
from kvlab.budget import Shares
from kvlab.core import BadInput, OutOfBlocks
from kvlab.model import PagedCache, prefill
from kvlab.model.decode import generate
from kvlab.offload import HostStore
from kvlab.sim import Host, from_requests, simulate
from kvlab.window import SinkWindow

SIZE = 8
POLICIES = [
    n for n in policies.names()
    if n != "none" and not policies.asked(n).foresees and not policies.asked(n).asks
    and not (policies.asked(n).scored and policies.asked(n).observes is None)  # rank tokens only
]  # fmt: skip
# New blocks are pinned until a request ends, in the simulator not at all where requests come one
# by one; these notice: by the order in which pins go, and by what its shadows may drop.
PINS_MATTER = {"random", "shuffled", "adaptive"}


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def words(count: int, seed: int = 0) -> list[int]:
    chosen = random.Random(seed)
    return [chosen.randrange(1, 128) for _ in range(count)]


def paged(model, **axes) -> PagedCache:
    axes = {"format": "fp32", "block_size": SIZE, "prefix": "hash"} | axes
    return PagedCache.for_model(model, **axes)


def serve(model, cache, ids, chunk=16):
    """Logits [V] of the last token; the request is over afterwards."""
    logits = prefill(model, torch.tensor([ids]), cache, chunk_tokens=chunk).logits[0]
    cache.finish()
    return logits


def cold(model, ids, **axes):
    return serve(model, paged(model, **{"prefix": "none"} | axes), ids)


def kl(p, q) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


# ---- two sessions with one system prompt


@pytest.mark.parametrize("groups", ["all", "per_layer"])
def test_a_second_session_computes_its_own_tokens_only(model, groups, monkeypatch):
    system, a, b = words(40), words(9, 1), words(11, 2)
    cache = paged(model, groups=groups)
    first = prefill(model, torch.tensor([system + a]), cache, chunk_tokens=16)
    assert (first.tokens, first.cached) == (49, 0)
    cache.rows, sessions = [], list(cache.rows)  # it stays open
    blocks, counts = cache.stats().blocks, []
    begin = cache.core.begin
    monkeypatch.setattr(cache.core, "begin", lambda s, n: (counts.extend(n), begin(s, n))[1])
    second = prefill(model, torch.tensor([system + b]), cache, chunk_tokens=16)
    assert (second.tokens, second.cached, sum(counts)) == (51, 40, 11)
    torch.testing.assert_close(second.logits[0], cold(model, system + b), rtol=1e-4, atol=1e-4)
    stats = cache.stats()
    layers = len(cache.groups)
    assert stats.blocks == blocks + 2 * layers, "bytes of the prefix are there once"
    assert stats.tokens == 100 and stats.resident_tokens == 60
    cache.check()
    cache.close(sessions[0])
    cache.reset()
    cache.check()
    assert held_bytes(cache) == 0 and cache.stats().blocks == 0


@pytest.mark.parametrize("architecture", ["Qwen3", "Llama", "Qwen2", "Mistral"])
def test_generate_begins_with_what_is_known(tiny_model, architecture):
    model, ids = tiny_model(architecture), torch.tensor([words(50)])
    model.generation_config.pad_token_id = None  # or generate() takes such tokens for padding
    options = {"do_sample": False, "max_new_tokens": 20}
    expected = model.generate(ids, past_key_values=paged(model, prefix="none"), **options)
    cache = paged(model)
    for hit in (0, 48):
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
        assert cache.audit()[-1]["hit_tokens"] == hit
        cache.check()
        cache.finish()
    turn = torch.cat([expected, torch.tensor([words(5, 3)])], 1)  # a chat goes on
    plain = model.generate(turn, past_key_values=paged(model, prefix="none"), **options)
    assert torch.equal(model.generate(turn, past_key_values=cache, **options), plain)
    assert cache.audit()[-1]["hit_tokens"] == 64, "decoded tokens are known as well"


def test_our_decoder_leaves_its_tokens_known(model):
    """The captured step runs below transformers: its tokens are told when the request ends."""
    ids, cache = torch.tensor([words(20), words(20, 1)]), paged(model)
    out = generate(model, ids, cache, 30, driver="static")
    assert torch.equal(out, generate(model, ids, paged(model, prefix="none"), 30, driver="static"))
    cache.finish()
    cache.check()
    for row in torch.cat([ids, out], 1).tolist():
        assert cache.length(cache.open(row)) == 48


def test_generate_on_a_padded_batch(model):
    system, lengths = words(32), (9, 17, 25)
    rows = [system + words(n, n) for n in lengths]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    options = {"do_sample": False, "max_new_tokens": 10, "attention_mask": mask}
    expected = model.generate(ids, past_key_values=paged(model, prefix="none"), **options)
    cache = paged(model)
    serve(model, cache, rows[0])
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert [row["hit_tokens"] for row in cache.audit()[1:]] == [16, 24, 32], "one column for all"
    cache.check()


def test_whoever_wants_all_logits_gets_them(model):
    ids, cache = torch.tensor([words(30)]), paged(model)
    expected = model(ids, past_key_values=cache).logits
    cache.finish()
    again = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    assert again.shape[1] == 30


def test_tokens_at_other_positions_are_not_shared(model):
    ids, cache = torch.tensor([words(30)]), paged(model)
    options = {"position_ids": torch.arange(5, 35)[None], "logits_to_keep": 1}
    expected = model(ids, past_key_values=cache, **options).logits
    cache.finish()
    assert cache.stats().prefix_tokens == 0
    serve(model, cache, words(30))
    again = model(ids, past_key_values=cache, **options).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)
    cache.finish()
    assert cache.stats().prefix_tokens == 24
    cache.check()


def test_the_last_token_is_always_computed(model):
    ids, cache = words(4 * SIZE), paged(model)
    expected = serve(model, cache, ids)
    torch.testing.assert_close(serve(model, cache, ids), expected, rtol=1e-4, atol=1e-4)
    (first, second) = cache.audit()
    assert (first["codes"], second["codes"]) == ("nnnn", "hhhr")
    assert cache.stats().blocks == 4, "what was computed again is not kept twice"


# ---- any policy, under pressure


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_are_right_under_pressure(model, policy):
    """Requests over few prefixes in few blocks, gaps included: each answer is the cold one."""
    cache, chosen, plain = paged(model, policy=policy, budget_blocks=14), random.Random(1), {}
    for _ in range(20):
        ids = words(24, chosen.randrange(3)) + words(chosen.randrange(1, 60), chosen.randrange(3))
        key = tuple(ids)
        if key not in plain:
            plain[key] = cold(model, ids)
        logits = serve(model, cache, ids, chunk=chosen.choice((5, 16, 64)))
        torch.testing.assert_close(logits, plain[key], rtol=1e-4, atol=1e-4)
        cache.check()
        cache.groups[0].held.known.index.check()
    found = "".join(row["codes"] for row in cache.audit())
    assert cache.stats().evictions > 25 and "h" in found and "e" in found
    cache.reset()
    assert held_bytes(cache) == 0


def store(cache, ids) -> str:
    """A request without attention: its blocks come, are known, and are let go."""
    seq = cache.open(ids, reserve=len(ids))
    count = len(ids) - cache.length(seq)
    cache.begin([seq], [count])
    x = torch.zeros(1, 1, count, 8)
    for layer in range(cache.geometry.layers):
        cache.store(layer, x, x)
    cache.commit()
    cache.close(seq)
    return cache.audits[seq].codes


def as_ids(names: list[int]) -> list[int]:
    return [name >> 1 for name in names]


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - PINS_MATTER))
def test_hits_and_victims_are_the_simulators(policy):
    chosen, trace, codes, recorded, simulated = random.Random(0), [], "", [], []
    cache = make(layers=1, head_dim=8, query_heads=2, kv_heads=1, policy=policy, budget_blocks=40,
                 prefix="hash")
    cache.groups[0].ledger.events = recorded.append
    for at in range(400):
        root = chosen.randrange(12) if chosen.random() < 0.7 else chosen.randrange(100, 99_999)
        turn, length = chosen.randrange(4), chosen.randrange(1, 12)
        ids = [t for d in range(length) for t in [root, turn if d > 3 else 0, d, 7]]
        codes += store(cache, ids)
        trace.append((float(at), len(ids), 1, as_ids(cache.sequences.chain(ids).names())))
    cache.check()
    result = simulate(from_requests(trace, 4), policy, 40, shape=cache.shape,
                      events=simulated.append)
    assert codes.count("h") + codes.count("r") == result.block_hits > 150
    assert cache.stats().evictions == result.evictions > 1000
    assert victims(recorded) == victims(simulated)


# ---- the host tier


@pytest.mark.parametrize("groups", ["all", "per_layer"])
@pytest.mark.parametrize("policy", ["lru", "fifo", "s3fifo"])
def test_evicted_prefixes_come_back_from_the_host(model, policy, groups):
    axes = {"policy": policy, "budget_blocks": 14, "offload": "host", "groups": groups}
    cache, chosen = paged(model, format="int8", **axes), random.Random(1)
    exact = paged(model, format="int8")
    for _ in range(20):
        ids = words(24, chosen.randrange(3)) + words(chosen.randrange(1, 60), chosen.randrange(3))
        logits = serve(model, cache, ids, chunk=SIZE)
        torch.testing.assert_close(logits, serve(model, exact, ids, SIZE), rtol=1e-4, atol=1e-4)
        cache.check()
    codes = "".join(row["codes"] for row in cache.audit())
    assert codes.count("H") > 25 and "e" not in codes
    assert codes.count("n") == "".join(r["codes"] for r in exact.audit()).count("n")
    assert sum(row["host_bytes_loaded"] for row in cache.audit()) > 0
    assert cache.stats().host_bytes > 0
    cache.reset()
    cache.check()
    assert held_bytes(cache) == cache.stats().host_bytes == 0


@pytest.mark.parametrize("policy", ["lru", "fifo", "arc", "pgdsf"])
def test_two_tiers_hit_as_simulated(policy):
    chosen, trace, codes = random.Random(0), [], ""
    cache = make(layers=1, head_dim=8, query_heads=2, kv_heads=1, policy=policy, budget_blocks=40,
                 prefix="hash", offload="host")
    for at in range(300):
        root, turn, length = (chosen.randrange(n) for n in (30, 4, 12))
        ids = [t for d in range(length + 1) for t in [root, turn if d > 3 else 0, d, 7]]
        codes += store(cache, ids)
        trace.append((float(at), len(ids), 1, as_ids(cache.sequences.chain(ids).names())))
    cache.check()
    host = Host(capacity_blocks=10_000)
    result = simulate(from_requests(trace, 4), policy, 40, shape=cache.shape, host=host)
    assert sum(map(codes.count, "hHr")) == result.block_hits > 150
    assert cache.stats().evictions == result.evictions > 500


def test_a_full_host_loses_what_has_waited_longest(model):
    block = 2 * 2 * 2 * 32 * SIZE * 4  # bytes: K and V, layers, heads, dim, tokens, fp32
    store_ = HostStore(cap_gb=6 * block / 1e9, slab_tokens=SIZE)
    cache = paged(model, policy="lru", budget_blocks=5, offload=store_)
    for seed in range(6):
        serve(model, cache, words(4 * SIZE + 1, seed))
        cache.check()
    assert 0 < len(cache.groups[0].held.known.tier.keys) <= 6
    assert cache.stats().host_bytes <= 6 * block
    serve(model, cache, words(4 * SIZE + 1, 4))
    assert cache.audit()[-1]["hit_host"] == 4
    serve(model, cache, words(4 * SIZE + 1, 0))
    assert cache.audit()[-1]["hit_host"] == 0 and cache.audit()[-1]["evicted"] == 4


def test_a_request_that_does_not_fit_leaves_the_host_as_it_was(model):
    cache = paged(model, policy="lru", budget_blocks=6, offload="host")
    serve(model, cache, words(5 * SIZE))
    handle = cache.cache_prefix(words(5 * SIZE))
    cache.release_prefix(handle)
    serve(model, cache, words(6 * SIZE, 1))
    handle = cache.cache_prefix(words(6 * SIZE, 1))
    waiting = len(cache.groups[0].held.known.tier.keys)
    with pytest.raises(OutOfBlocks):
        cache.open(words(5 * SIZE))
    cache.check()
    assert len(cache.groups[0].held.known.tier.keys) == waiting == 5
    cache.release_prefix(handle)
    assert cache.length(cache.open(words(5 * SIZE))) == 4 * SIZE
    cache.check()


# ---- pins, room and copies


def test_a_pinned_prefix_stays_until_it_is_released(model):
    cache = paged(model, policy="lru", budget_blocks=8)
    ids = words(33)
    serve(model, cache, ids)
    handle = cache.cache_prefix(ids)
    assert handle.tokens == 32 and len(handle.ids) == 4 and handle.pinned
    for seed in range(5):
        serve(model, cache, words(30, seed + 5))
    with pytest.raises(OutOfBlocks):
        serve(model, cache, words(8 * SIZE, 99))
    cache.finish()
    assert cache.attach_prefix(ids[:17]).tokens == 16
    cache.release_prefix(handle)
    cache.release_prefix(handle)
    with pytest.raises(OutOfBlocks):  # two blocks are attached still
        serve(model, cache, words(8 * SIZE, 99))
    cache.finish()
    cache.drop_prefixes()
    serve(model, cache, words(8 * SIZE, 99))
    assert cache.attach_prefix(ids).tokens == 0
    cache.check()


def test_a_prefix_whose_tokens_nobody_told(model):
    """A driver below transformers names the sequence."""
    driver = Driver(make(prefix="hash", layers=1))
    seq = driver.open()
    driver.step([seq], [10])
    ids = words(10)
    assert driver.cache.cache_prefix(ids).tokens == 0
    assert driver.cache.cache_prefix(ids, pin=False, seq=seq).tokens == 8
    assert driver.cache.length(driver.cache.open(ids)) == 8
    with pytest.raises(BadInput, match="keeps nothing"):
        make().cache_prefix(ids)


def test_a_fork_copies_the_open_tail(model):
    ids, cache = words(20), paged(model)
    prefill(model, torch.tensor([ids]), cache)
    (seq,) = cache.rows
    child, ends = cache.fork(seq), (words(9, 1), words(9, 2))
    assert cache.stats().blocks == 4
    for row, end in zip((seq, child), ends):
        cache.rows, cache.seen = [row], len(ids)
        logits = prefill(model, torch.tensor([end]), cache).logits[0]
        torch.testing.assert_close(logits, cold(model, ids + end), rtol=1e-4, atol=1e-4)
    cache.check()
    for row in (seq, child):
        cache.close(row)
    cache.rows = []
    for end in ends:
        assert cache.length(cache.open(ids + end + [1])) == 24


def test_reserved_room_is_there_or_nothing_happens(model):
    cache = paged(model, policy="lru", budget_blocks=6)
    serve(model, cache, words(17))
    seq = cache.open(words(17), reserve=5 * SIZE)
    with pytest.raises(OutOfBlocks):
        cache.open(words(17), reserve=4 * SIZE + 1)
    cache.check()
    assert cache.length(cache.open(words(17))) == 16, "what is shared takes no room"
    assert cache.groups[0].held.reserved_count == 3
    cache.close(seq)
    cache.check()
    assert cache.groups[0].held.reserved_count == 0


def test_what_is_truncated_is_forgotten(model):
    ids, cache = words(30), paged(model)
    prefill(model, torch.tensor([ids]), cache)
    (seq,) = cache.rows
    cache.truncate(seq, 20)
    cache.seen = 20
    end = words(13, 4)
    logits = prefill(model, torch.tensor([end]), cache).logits[0]
    torch.testing.assert_close(logits, cold(model, ids[:20] + end), rtol=1e-4, atol=1e-4)
    cache.finish()
    cache.check()
    assert cache.length(cache.open(ids[:20] + end)) == 32
    assert cache.length(cache.open(ids)) == 24


def test_prompts_alone_are_kept_where_outputs_are_not(model):
    ids = torch.tensor([words(20)])
    cache = paged(model, prefix=HashSharing(outputs=False))
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=30)[0]
    cache.finish()
    cache.check()
    assert cache.stats().prefix_tokens == 16
    assert cache.length(cache.open(out.tolist())) == 16


# ---- lossy caches


def test_a_lossy_format_stays_within_its_own_noise(model):
    """Warm and cold differ by where chunks end, as two cold runs of other chunks do."""
    ids, cache = words(100), paged(model, format="int4")
    exact = cold(model, ids)
    noise = max(kl(exact, serve(model, paged(model, format="int4"), ids, n)) for n in (16, 50, 100))
    serve(model, cache, ids[:70])
    assert kl(exact, serve(model, cache, ids)) < 4 * noise
    assert cache.audit()[-1]["hit_tokens"] == 64


def leftovers(model, seed):
    """What request A leaves that lost six blocks half way; M computes them again; then B."""
    cache = paged(model, prefix=HashSharing(hold=False), policy="fifo", budget_blocks=100)
    ids = words(30 * SIZE, seed)
    prefill(model, torch.tensor([ids[: 12 * SIZE]]), cache)
    cache.groups[0].held.room.evict(6)
    prefill(model, torch.tensor([ids[12 * SIZE :]]), cache)
    cache.finish()
    serve(model, cache, ids[: 6 * SIZE + 1])
    b = ids[: 28 * SIZE] + words(5, seed + 50)
    logits = serve(model, cache, b)
    cache.check()
    return kl(cold(model, b), logits), cache.audit()[-1]


def test_only_blocks_without_a_hole_before_them_are_shared(model, monkeypatch):
    """What A computed behind a hole would spoil B; the rule leaves it out."""
    kept = [leftovers(model, seed) for seed in range(3)]
    assert max(damage for damage, _ in kept) < 1e-8
    assert [(row["hit"], row["behind_hole"]) for _, row in kept] == [(12, 16)] * 3

    def careless(self, claim, e):
        claim.clean = e.past + e.count

    monkeypatch.setattr(Shared, "_note_clean", careless)
    spoilt = [leftovers(model, seed) for seed in range(3)]
    assert [row["hit"] for _, row in spoilt] == [28] * 3
    assert min(damage for damage, _ in spoilt) > 1e-4


@pytest.mark.parametrize("axes", [
    {"policy": "attention_mass", "budget_blocks": 9},
    {"policy": "fifo", "budget_percent": 50.0},
    {"policy": "lru", "budget_blocks": 12, "window": SinkWindow(sinks=4, recent=24)},
    {"policy": "lru", "budget_blocks": 12, "groups": "per_layer"},
])  # fmt: skip
def test_what_a_lossy_cache_shares_is_exact(model, axes):
    """Whatever it evicts: known blocks hold what a full cache would."""
    cache = paged(model, prefix=HashSharing(hold=False), **axes)
    full = paged(model)
    for seed in range(12):
        ids = words(24, seed % 2) + words(40 + 3 * seed, seed % 3)
        serve(model, cache, ids)
        cache.check()
        seq = full.open()
        full.rows = [seq]
        prefill(model, torch.tensor([ids]), full)
        compare(cache, full, seq, ids)
        full.finish()
        full.drop_prefixes()
    assert cache.stats().evictions > 10
    cache.reset()
    assert held_bytes(cache) == 0


def compare(cache, full, seq, ids):
    """Every block that `cache` knows of `ids` against the full cache's."""
    chain = cache.sequences.chain(ids)
    place = full.groups[0]
    for number, group in enumerate(cache.groups):
        for index, block in enumerate(group.held.known.found(chain)):
            if block is not None:
                for local in range(group.pool.geometry.layers):
                    layer = number + local
                    got = group.pool.read(local, [block])
                    want = place.pool.read(layer, [place.tables[seq].ids[index]])
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_blocks_that_left_the_window_are_not_known(model):
    """hold=true with a window that frees: what was computed after it slid saw holes."""
    window = SinkWindow(sinks=SIZE, recent=2 * SIZE, middle=False)
    cache = paged(model, window=window)
    serve(model, cache, words(80), chunk=SIZE)
    cache.check()
    assert cache.length(cache.open(words(80))) == SIZE
    assert isinstance(cache.groups[0].held.sharing, Serving)


# ---- refusals and reasons


@pytest.mark.parametrize(("axes", "words_"), [
    ({"prefix": "magic"}, "known: hash, none"),
    ({"prefix": "hash", "budget_blocks": 4}, "choose policy=lru"),
    ({"prefix": HashSharing(hold=False)}, "with a budget"),
    ({"prefix": "hash", "policy": "lru", "budget_percent": 50.0}, "prefix.hold=false"),
    ({"prefix": "hash", "policy": "lru", "budget_blocks": 9, "window": SinkWindow()},
     "window.middle=false"),
])  # fmt: skip
def test_combinations_that_make_no_sense_are_refused(axes, words_):
    with pytest.raises(BadInput, match=words_):
        make(**axes)


def test_an_audit_says_why_blocks_missed():
    cache = make(layers=1, head_dim=8, query_heads=2, kv_heads=1, policy="fifo", budget_blocks=8,
                 prefix="hash")
    ids = words(20)
    assert store(cache, ids) == "nnnnn"
    assert store(cache, [1, *ids]) == "nnnnnt"
    assert cache.audit()[-1]["tail_not_full"] == 1
    assert store(cache, [2, *words(14, 1)]) == "nnnt"
    codes = store(cache, ids)
    assert set(codes) <= set("heg") and "e" in codes
    row = cache.audit()[-1]
    assert row["tokens"] == 20 and row["hit"] == codes.count("h")
    assert row["bytes_loaded"] == row["hit"] * cache.spec.format.block_bytes(cache.geometry)
    store(cache, ids)
    row = cache.audits[max(cache.audits)].row(flops_per_second=1e9)
    assert row["codes"] == "hhhhr" and row["ms_saved"] == 1e-6 * row["flops_saved"] > 0
    assert 0 < row["flops_saved_percent"] < 100


@pytest.mark.parametrize(("offload", "codes"), [("none", "eeeee"), ("host", "HHHHr")])
def test_an_audit_asks_every_layer_group(offload, codes):
    """The first group has room for both prompts, the second for one: it says what became of it."""
    cache = make(layers=2, head_dim=8, query_heads=2, kv_heads=1, policy="lru", budget_blocks=10,
                 budget=Shares([3, 1]), groups="per_layer", prefix="hash", offload=offload)
    ids = words(20)
    assert store(cache, ids) == "nnnnn"
    assert store(cache, words(20, 1)) == "nnnnn"
    assert [group.held.known.tier.keeps for group in cache.groups] == [offload == "host"] * 2
    assert store(cache, ids) == codes
    small = cache.groups[1].pool
    row = cache.audit()[-1]
    assert row["host_bytes_loaded"] == codes.count("H") * small.format.block_bytes(small.geometry)
    assert row["bytes_loaded"] == codes.count("H") * cache.spec.format.block_bytes(cache.geometry)
