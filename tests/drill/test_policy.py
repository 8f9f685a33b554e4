"""A policy with its scorer from outside the package: everything that one of ours gets, it gets."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvlab import axes
from kvlab.__main__ import main
from kvlab.cache import CacheSpec, scores
from kvlab.core import BadInput, Variant
from kvlab.eval import compat
from kvlab.eval.controls import controls
from kvlab.eval.parity import chosen, is_read, is_served
from kvlab.model import PagedCache, prefill
from kvlab.policy import LRU, Shuffled
from kvlab.sim import simulate
from kvlab.sim.trace import from_requests

HERE = Path(__file__).parent
PATH = "value_size.ValueSize"
BLOCKS = {"budget_blocks": 12, "block_size": 4}


@pytest.fixture(autouse=True)
def member(monkeypatch):
    """The class; its module can be imported, and is unknown again after the test."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setattr(axes, "_NAMED", {})
    yield axes.find("policy", PATH)
    sys.modules.pop("value_size")


def ways(member) -> list:
    """All that a user may give."""
    return [PATH, "value_size", member, member(), lambda: member()]


def read(model, ids, cache):
    """Logits after a prompt, in chunks of 16, and the ids of what is still held."""
    out = prefill(model, ids, cache, chunk_tokens=16).logits
    cache.check()
    return out, [b for t in cache.groups[0].tables.values() for b in t.ids]


def test_the_module_is_short():
    assert len((HERE / "value_size.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("groups", ["all", "per_layer"])
def test_it_serves_a_live_cache_however_it_is_given(member, tiny_model, groups):
    model = tiny_model()
    ids = torch.randint(1, 128, (1, 90), generator=torch.Generator().manual_seed(1))
    found = []
    for given in ways(member):
        cache = PagedCache.for_model(model, policy=given, groups=groups, **BLOCKS)
        found.append(read(model, ids, cache))
        policies = [group.ledger.policy for group in cache.groups]
        assert len({id(p) for p in policies}) == len(policies) == (1 if groups == "all" else 2)
        assert all(type(p) is member and p is not given for p in policies)
        assert all(type(g.watch.scorer).__name__ == "Size" for g in cache.groups)
        assert cache.stats().evictions
    for logits, held in found:
        assert torch.equal(logits, found[0][0]) and held == found[0][1]


def test_its_scorer_decides(member, tiny_model):
    """What it keeps is what its own formula says, and not what recency would."""
    model = tiny_model()
    ids = torch.randint(1, 128, (1, 90), generator=torch.Generator().manual_seed(1))
    held = {name: read(model, ids, PagedCache.for_model(model, policy=name, **BLOCKS))[1]
            for name in (PATH, "lru", "key_norm")}  # fmt: skip
    assert held[PATH] != held["lru"] and held[PATH] != held["key_norm"]


def test_an_instance_is_copied_for_each_cache_and_keeps_its_settings(member, tiny_model):
    model, mine = tiny_model(), member(age=0.5)
    ids = torch.randint(1, 128, (1, 90), generator=torch.Generator().manual_seed(1))
    spec = CacheSpec(policy=mine, groups="per_layer", **BLOCKS)
    first, second = (read(model, ids, PagedCache.for_model(model, spec)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert spec.policy().age == 0.5 and not len(mine) and mine.capacity is None


def test_what_cannot_serve_several_ledgers_is_refused(member):
    used, one = LRU(), LRU()
    used.resize(4)
    with pytest.raises(BadInput, match="policy=lru: has served another ledger"):
        CacheSpec(policy=used)
    with pytest.raises(BadInput, match="gives every ledger the same object"):
        CacheSpec(policy=lambda: one)
    locked = member()
    locked.stream = open(__file__)  # noqa: SIM115 -- closed below
    with pytest.raises(BadInput, match="cannot be copied for each ledger"):
        CacheSpec(policy=locked)
    locked.stream.close()
    for wrong in (3, dict):
        with pytest.raises(BadInput, match="must be a policy's name, its class"):
            CacheSpec(policy=wrong)
    with pytest.raises(BadInput, match="policy=value_size.Other: value_size has no Other"):
        CacheSpec(policy="value_size.Other")


def test_the_simulator_takes_it(member):
    trace = from_requests([(float(i), 8, 1, [i % 3, 3 + i % 7]) for i in range(40)], 4)
    results = [simulate(trace, given, 5) for given in (PATH, "value_size", member())]
    assert len({r.evictions for r in results}) == 1 and results[0].evictions
    assert results[2].policy == "value_size"


def test_it_gets_its_controls_by_what_it_is(member):
    for given in ways(member):
        spec = CacheSpec(policy=given, budget_percent=10)
        found = controls([Variant("value_size 10%", {"policy": "value_size"}, spec)], 128)
        assert [c.name for c in found] == [
            "random 10% (control)", "shuffled value_size 10% (control)", "window 10% (control)",
        ]  # fmt: skip
        shuffled = found[1].spec.policy()
        assert type(shuffled) is Shuffled and type(shuffled.member) is member
        assert shuffled.observes is member.observes


def test_settings_of_its_own_are_controlled_apart(member):
    both = [Variant(f"value_size age={age} 10%", {}, CacheSpec(
        policy=lambda age=age: member(age), budget_percent=10)) for age in (0.0, 0.5)]
    shuffled = [c.spec.policy().member.age for c in controls(both, 128) if "shuffled" in c.name]
    assert shuffled == [0.0, 0.5]


def test_controls_need_no_controls():
    for name in ("random", "shuffled"):
        spec = CacheSpec(policy=name, budget_percent=10)
        assert not controls([Variant(name, {}, spec)], 128)


def test_parity_asks_what_it_is():
    assert chosen("text_policies", [PATH, "lru"], is_read) == [PATH, "lru"]
    with pytest.raises(BadInput, match="known here"):
        chosen("policies", [PATH], is_served)
    with pytest.raises(BadInput, match="known here"):
        chosen("text_policies", ["belady"], is_read)


def test_it_has_a_row_of_compatibility(capsys):
    assert compat.main([f"policy={PATH}"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"policy={PATH} needs a budget"
    for axis in ("format", "summary"):
        assert f"{axis}: all {len(axes.names(axis))}" in told
    assert compat.main(["policy=value_size.Other"]) == 2


def test_a_scorer_is_a_name_a_class_or_an_instance(member):
    size = member.observes
    one = size()
    assert type(scores.scorer_of(size)) is type(scores.scorer_of("value_size.Size")) is size
    assert type(scores.scorer_of(one)) is size and scores.scorer_of(one) is not one
    for wrong in (3, dict, lambda: size()):
        with pytest.raises(BadInput, match="must be a scorer's name"):
            scores.scorer_of(wrong)


def test_the_name_of_ours_cannot_be_taken():
    with pytest.raises(BadInput, match="policy=lru: is the name of kvlab's own"):
        type("Mine", (LRU,), {"name": "lru", "__module__": "mine"})
    unnamed = type("Mine", (LRU,), {"__module__": "mine"})
    assert unnamed.name == "Mine"


@pytest.mark.parametrize("line", [
    [f"policy._target_={PATH}"],
    ["--config-dir", str(HERE / "conf"), "policy=value_size"],
])  # fmt: skip
def test_the_command_line_runs_it_with_its_controls(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [
        "experiment=none", "job=evaluate", "cache.budget_percent=40", "cache.block_size=16",
        "eval.documents=1", "eval.tokens=200", "eval.decode_tokens=2", "eval.noise_floor=false",
        "prefill.chunk_tokens=64", "prefill.progress=false", "device=cpu", "track=jsonl",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    assert main([*line, *settings]) == 0
    rows = [json.loads(x) for x in (tmp_path / "run/measurements.jsonl").read_text().splitlines()]
    names = dict.fromkeys(row["variant"] for row in rows)
    mine = next(name for name in names if name.startswith("value_size"))
    assert mine == "value_size 40% cache.block_size=16"
    rest = mine.removeprefix("value_size ")
    assert {f"random {rest} (control)", f"shuffled {mine} (control)",
            f"window {rest} (control)"} < set(names)  # fmt: skip
    assert {r["params"]["policy"] for r in rows if r["variant"] == mine} == {"value_size"}
    measured = {r["name"] for r in rows if r["variant"] == mine}
    assert {"kl_minus_random_nats", "kl_minus_shuffled_nats", "kl_minus_window_nats"} < measured


def test_a_spec_that_is_replaced_asks_its_new_policy(member):
    spec = CacheSpec(policy=member, budget_blocks=8)
    assert spec.member.scored and not replace(spec, policy="lru").member.scored
