"""Negative controls: of the same bytes, named after what they control, each run once."""

from __future__ import annotations

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval.controls import companions, controls
from kvlab.eval.runner import Runner
from kvlab.retrieval import Quest
from kvlab.window import SinkWindow


def variant(name, **axes):
    params = {"policy": axes.get("policy", "none")} | {"cache.budget_percent": 10}
    return Variant(name, params, CacheSpec(**axes))


def names(*variants):
    return [v.name for v in controls(list(variants), 128)]


def test_an_evicting_variant_gets_three():
    mass = variant("attention_mass int8 10%", policy="attention_mass", budget_percent=10,
                   format="int8", evict="block")  # fmt: skip
    random, shuffled, window = controls([mass], 128)
    assert random.name == "random int8 10% (control)" and random.spec.policy().name == "random"
    assert shuffled.spec.policy().member.name == "attention_mass"
    assert window.spec.policy().name == "fifo" and window.spec.window.sinks == 4
    for control in (random, shuffled, window):
        assert control.spec.budget_percent == 10 and control.spec.format.name == "int8"
        assert control.params["control"] and control.params["cache.budget_percent"] == 10


def test_tokens_are_compared_with_tokens():
    mass = variant("attention_mass 10%", policy="attention_mass", budget_percent=10)
    random, window = controls([mass], 128)
    assert random.spec.by_token and random.spec.groups == "per_head"
    assert window.spec.evict == "block" and window.spec.policy().name == "fifo"
    unlike = variant("snapkv adakv 10%", policy="snapkv", budget_percent=10, budget="adakv")
    random, window = controls([unlike], 128)
    assert random.spec.budget.by_head and window.spec.budget.name == "equal"
    assert window.name == "window 10% (control)"
    other = variant("tova adakv 10%", policy="tova", budget_percent=10, budget="adakv")
    assert names(unlike, other) == ["random adakv 10% (control)", "window 10% (control)"]


def test_a_control_has_no_budget_that_it_could_not_follow():
    """It looks at no attention, and waits for no context's end."""
    lazy = variant("snapkv simlayer 10%", policy="snapkv", budget_percent=10, budget="simlayer",
                   window=SinkWindow(4, 64))  # fmt: skip
    random, window = controls([lazy], 128)
    assert random.spec.budget.looks and window.spec.budget.name == "equal"
    across = variant("kvzip all_heads 10%", policy="kvzip", budget_percent=10, budget="all_heads")
    random, window = controls([across], 128)
    assert random.name == "random 10% (control)" and random.spec.budget.name == "equal"


def test_each_ledger_gets_a_shuffled_policy_of_its_own():
    mass = variant("attention_mass 10%", policy="attention_mass", budget_percent=10,
                   evict="block")  # fmt: skip
    shuffled = controls([mass], 128)[1].spec
    assert shuffled.policy() is not shuffled.policy()
    assert shuffled.policy().member is not shuffled.policy().member


def test_equal_controls_run_once_and_never_twice_with_a_variant():
    lru, mass, tova, random, fifo = (
        variant(f"{name} 10%", policy=name, budget_percent=10, window=SinkWindow(4, 64),
                evict="block")
        for name in ("lru", "attention_mass", "tova", "random", "fifo")
    )
    assert names(lru, mass, tova) == [
        "random 10% (control)", "window 10% (control)", "shuffled attention_mass 10% (control)",
        "shuffled tova 10% (control)",
    ]  # fmt: skip
    assert names(lru, random, fifo) == []


def test_a_bare_window_is_compared_with_random_eviction_of_its_size():
    window = variant("sink", window=SinkWindow(4, 1024, middle=False), block_size=64)
    [control] = controls([window], 128)
    assert control.spec.budget_blocks == 1 + 16 + 2 + 1 and control.spec.policy().name == "random"
    assert control.name == "random sink (control)"
    assert control.spec.window.protected(5000) == [(0, 4), (4999, 5000)]  # no model does without
    [control] = controls([variant("bare", window=SinkWindow(0, 1024, middle=False))], 128)
    assert control.spec.window.protected(5000) == [(4999, 5000)]


def test_what_loses_nothing_needs_no_control():
    assert names(variant("int4", format="int4"), variant("lru", policy="lru"),
                 variant("sink", window=SinkWindow(4, 64))) == []  # fmt: skip


def test_retrieval_is_compared_with_chance_and_a_window():
    quest = variant("quest", retrieval=Quest(budget_tokens=1024, sinks=4, recent=128))
    chance, window = controls([quest], 128)
    assert chance.name == "chance (control)" and chance.spec.retrieval.budget_tokens == 1024
    assert chance.spec.retrieval.name == "random"
    assert window.spec.window.recent == 1020 and not window.spec.window.middle
    assert not window.spec.retrieval.selects


def test_eviction_to_the_host_loses_nothing():
    assert names(variant("host", policy="lru", budget_percent=10, offload="host")) == []


def test_companions_are_found_by_what_they_are():
    window = SinkWindow(4, 64)
    mass, fifo, random = (
        variant(f"{name} 10%", policy=name, budget_percent=10, window=window, evict="block")
        for name in ("attention_mass", "fifo", "random")
    )
    everyone = [Runner(v.name, v.params, v.spec) for v in
                (mass, fifo, random, *controls([mass, fifo, random], 128))]  # fmt: skip
    found = [(r.name, kind, other.name) for r, kind, other in companions(everyone, 128)]
    assert found == [
        ("attention_mass 10%", "random", "random 10%"),
        ("attention_mass 10%", "shuffled", "shuffled attention_mass 10% (control)"),
        ("attention_mass 10%", "window", "fifo 10%"),
        ("fifo 10%", "random", "random 10%"),
    ]
