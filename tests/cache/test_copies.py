"""Deep copies of a filled cache: equal, independent, and at addresses of their own."""

from __future__ import annotations

import copy
import pickle
from types import BuiltinFunctionType, FunctionType, ModuleType

import pytest
import torch
from driver import SCALE, Driver, held_bytes, make
from members import live

from kvlab.cache import CacheSpec
from kvlab.core import KvlabError
from kvlab.offload import HostStore, OutOfHost
from kvlab.offload.memory import HostMemory

CAPPED = {"policy": "lru", "budget_blocks": 12}
AXES = [
    {"format": "int4", "head_dim": 32},
    {"groups": "per_layer", **CAPPED},
    {"policy": "attention_mass", "budget_blocks": 12, "evict": "block"},
    {"policy": "lru", "budget_percent": 50.0},
    {"window": "sink", "policy": "fifo", "budget_blocks": 20},
    {"prefix": "hash", "policy": "lru", "budget_blocks": 40},
    {"summary": "merged", "policy": "fifo", "budget_blocks": 14},
    {"retrieval": "quest", "offload": "host", **CAPPED},
    {"offload": "host", "policy": "fifo", "budget_blocks": 12},
]
ATOMS = (ModuleType, FunctionType, BuiltinFunctionType, type, str, bytes, int, float, torch.dtype,
         torch.device, type(None), HostMemory, CacheSpec)  # fmt: skip


def name_of(axes):
    return " ".join(f"{k}={v}" for k, v in axes.items()) or "plain"


@pytest.fixture(params=AXES, ids=name_of)
def driver(request):
    """Two sequences and a fork of one, some of whose blocks have left; no step is under way."""
    driver = Driver(make(**request.param))
    a, b = driver.open(), driver.open()
    driver.step([a, b], [13, 6])
    driver.step([a, b], [1, 1])
    driver.fork(a)
    driver.step(sorted(driver.past), [5, 5, 4])
    return driver


def twin_of(driver: Driver) -> Driver:
    twin = Driver(copy.deepcopy(driver.cache), seed=5)
    twin.past = {seq: list(layers) for seq, layers in driver.past.items()}
    return twin


def state(cache) -> dict:
    """All that shows: counts, bytes, tables, who may leave, and what blocks hold."""
    stats = cache.stats()._asdict()
    for late in ("peak_allocated_bytes", "workspace_bytes"):
        del stats[late]
    stats["allocated_bytes"] = held_bytes(cache)
    del stats["bits_per_element"], stats["effective_bits"], stats["logical_bytes"]
    groups = [
        ({seq: list(t.ids) for seq, t in g.tables.items()},
         {seq: list(t.ids) for seq, t in g.away.of.items()},
         [(m.id, m.state, m.pins, m.owner, m.content, m.last, m.score, m.doomed)
          for m in g.ledger.register.metas if m.state], g.ledger.now)
        for g in cache.groups
    ]  # fmt: skip
    return {"stats": stats, "groups": groups, "tokens": dict(cache.sequences.lengths),
            "chains": {seq: chain.ids().tolist() for seq, chain in cache.sequences.chains.items()}}


def contents(cache) -> list[torch.Tensor]:
    """Bytes of all committed slabs."""
    stores = [s for g in cache.groups for s in (g.pool.sealed, g.pool.open)]
    return [buffer.clone() for store in stores for buffer in store.slabs.values()]


def test_a_copy_is_equal_and_the_original_untouched(driver):
    before, held = state(driver.cache), contents(driver.cache)
    twin = twin_of(driver)
    twin.cache.check()
    assert state(twin.cache) == before
    assert twin.cache.stats().peak_allocated_bytes == twin.cache.allocated_bytes
    for _ in range(2):
        twin.step(sorted(twin.past), [1, 3, 2])
    twin.truncate(max(twin.past), twin.cache.length(max(twin.past)) - 1)
    twin.cache.check()
    for seq in sorted(twin.past):
        twin.close(seq)
    twin.cache.drop_prefixes()
    twin.cache.check()
    assert held_bytes(twin.cache) == 0
    driver.cache.check()
    assert state(driver.cache) == before
    assert all(torch.equal(x, y) for x, y in zip(held, contents(driver.cache), strict=True))


def test_original_and_copy_go_the_same_way(driver):
    """The same steps give the same bytes, evict the same blocks and leave the same accounts."""
    twin = twin_of(driver)
    for count in (1, 4, 5):
        outs = []
        for one in (driver, twin):
            one.random.manual_seed(count)
            outs.append(stepped(one, count))
        assert torch.equal(*outs)
        assert state(driver.cache) == state(twin.cache)
    twin.cache.check()


def stepped(driver: Driver, count: int) -> torch.Tensor:
    cache, seqs, g = driver.cache, sorted(driver.past), driver.cache.geometry
    cache.begin(seqs, [count] * len(seqs))
    outs = []
    for layer in range(g.layers):
        q = driver.draw(len(seqs), g.query_heads, count, g.head_dim)
        k, v = (driver.draw(len(seqs), g.kv_heads, count, g.head_dim) for _ in range(2))
        outs.append(cache.attend(layer, q, k, v, scale=SCALE))
    cache.commit()
    return torch.stack(outs)


def test_a_copy_shares_nothing_that_is_written(driver):
    mine, theirs = parts(driver.cache), parts(copy.deepcopy(driver.cache))
    shared = [mine[id] for id in mine.keys() & theirs.keys()]
    assert not shared, [type(x) for x in shared]


def parts(root) -> dict[int, object]:
    """By id (tensors by storage) all that hangs on a cache and could be written to."""
    constant = {id(root.geometry), id(root.facts), *map(id, vars(root.spec).values())}
    found, open_, seen = {}, [root], set()
    while open_:
        x = open_.pop()
        if id(x) in seen or id(x) in constant or isinstance(x, ATOMS):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found[x.untyped_storage().data_ptr()] = x
        elif isinstance(x, tuple):
            open_ += x
        elif isinstance(x, dict):
            found[id(x)] = x
            open_ += [*x.keys(), *x.values()]
        elif isinstance(x, (list, set, frozenset)):
            found[id(x)] = x
            open_ += x
        else:
            open_ += fields(x, found)
    for constant in ("planes", "_offsets", "_layers"):  # the layout of a store, fixed when made
        for group in root.groups:
            for store in (group.pool.sealed, group.pool.open, *extra_stores(group)):
                found.pop(id(getattr(store, constant)), None)
                for layer in store._layers.values():
                    found.pop(id(layer), None)
    return found


def extra_stores(group):
    return [x.store for x in (group.sources.digests, group.away.shelf, group.pool.apart)
            if hasattr(x, "store")]


def fields(x, found) -> list:
    slots = [s for c in type(x).__mro__ for s in getattr(c, "__slots__", ())]
    named = [getattr(x, s) for s in slots if hasattr(x, s) and not s.startswith("__")]
    own = list(vars(x).values()) if hasattr(x, "__dict__") else []
    if named or own:
        found[id(x)] = x
    bound = [x.__self__] if hasattr(x, "__self__") else []
    return named + own + bound


def test_kernels_read_the_copy_at_its_own_addresses():
    driver = Driver(make(layers=1, kernels="triton", format="int8", head_dim=32))
    seq = driver.open()
    driver.step([seq], [5])
    driver.step([seq], [1])
    twin = twin_of(driver)
    for slab in driver.cache.groups[0].pool.sealed.slabs.values():
        slab.fill_(0xFF)
    twin.step([seq], [1])
    twin.cache.check()


@pytest.mark.parametrize("policy", live())
def test_every_policy_goes_on_in_the_copy(policy):
    """The copy draws, counts and remembers for itself: both evict the same, one after the other."""
    driver = Driver(make(layers=1, policy=policy, budget_blocks=8))
    driver.open()
    for _ in range(6):
        stepped(driver, 9)
    twin = twin_of(driver)
    for count in (1, 9, 5, 9):
        outs = []
        for one in (driver, twin):
            one.random.manual_seed(count)
            outs.append(stepped(one, count))
        assert torch.equal(*outs)
        assert state(driver.cache) == state(twin.cache)


def test_shared_prefixes_of_a_copy():
    cache = make(prefix="hash", policy="lru", budget_blocks=1400, block_size=1, layers=1)
    driver, ids = Driver(cache), list(range(1200))  # a chain far longer than Python's stack
    seq = opened(driver, ids)
    driver.step([seq], [len(ids)])
    driver.close(seq)
    handle = cache.attach_prefix(ids[:40])
    other, its = copy.deepcopy((cache, handle))
    other.check()
    other.groups[0].held.known.index.check()
    assert other.length(other.open(ids)) == len(ids) - 1
    with pytest.raises(KvlabError, match="not pinned in this cache"):
        other.release_prefix(handle)
    other.release_prefix(its)
    assert handle.pinned and not its.pinned
    other.close(max(other.sequences.lengths))
    assert other.drop_prefixes() == len(ids)
    assert cache.prefix_tokens == len(ids)
    assert cache.length(cache.open(ids)) == len(ids) - 1


def opened(driver: Driver, ids) -> int:
    seq = driver.open()
    driver.cache.close(seq)
    new = driver.cache.open(ids)
    driver.past[new] = driver.past.pop(seq)
    return new


def test_copies_stay_under_the_limit_of_host_memory():
    store = HostStore(cap_gb=60e-6, slab_tokens=16)
    driver = Driver(make(policy="fifo", budget_blocks=3, offload=store))
    seq = driver.open()
    for _ in range(12):
        driver.step([seq], [4])
    before, held = state(driver.cache), store.memory.held_bytes
    copies = []
    with pytest.raises(OutOfHost, match="offload.cap_gb"):
        for _ in range(99):
            copies.append(copy.deepcopy(driver.cache))
    assert copies and state(driver.cache) == before
    driver.cache.check()
    del copies
    store.memory.trim()
    assert store.memory.held_bytes == held


def test_what_is_no_deep_copy_is_refused():
    driver = Driver(make())
    seq = driver.open()
    driver.step([seq], [5])
    for way in (copy.copy, pickle.dumps):
        with pytest.raises(KvlabError, match="copy.deepcopy"):
            way(driver.cache)
    driver.cache.begin([seq], [3])
    with pytest.raises(KvlabError, match="a step is under way"):
        copy.deepcopy(driver.cache)
    driver.cache.abort()
    copy.deepcopy(driver.cache).check()


def test_a_copy_made_without_grad_is_written_anywhere():
    driver = Driver(make(format="int8"))
    seq = driver.open()
    with torch.inference_mode():
        driver.step([seq], [6])
        twin = twin_of(driver)
    twin.step([seq], [7])
    again = twin_of(twin)
    with torch.inference_mode():
        again.step([seq], [2])


def test_a_copy_is_not_recorded():
    events = []
    driver = Driver(make(**CAPPED))
    driver.cache.groups[0].ledger.events = events.append
    twin = twin_of(driver)
    twin.step([twin.open()], [9])
    assert not events
    driver.step([driver.open()], [9])
    assert events
