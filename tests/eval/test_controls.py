"""Negative controls: of the same bytes, named after what they control, each run once."""

from __future__ import annotations

from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.eval.controls import controls
from kvlab.window import SinkWindow


def variant(name, **axes):
    params = {"policy": axes.get("policy", "none")} | {"cache.budget_percent": 10}
    return Variant(name, params, CacheSpec(**axes))


def names(*variants):
    return [v.name for v in controls(list(variants), 128)]


def test_an_evicting_variant_gets_three():
    mass = variant("attention_mass int8 10%", policy="attention_mass", budget_percent=10,
                   format="int8")  # fmt: skip
    random, shuffled, window = controls([mass], 128)
    assert random.name == "random int8 10% (control)" and random.spec.policy().name == "random"
    assert shuffled.spec.policy().member.name == "attention_mass"
    assert window.spec.policy().name == "fifo" and window.spec.window.sinks == 4
    for control in (random, shuffled, window):
        assert control.spec.budget_percent == 10 and control.spec.format.name == "int8"
        assert control.params["control"] and control.params["cache.budget_percent"] == 10


def test_each_ledger_gets_a_shuffled_policy_of_its_own():
    shuffled = controls([variant("lru 10%", policy="lru", budget_percent=10)], 128)[1].spec
    assert shuffled.policy() is not shuffled.policy()
    assert shuffled.policy().member is not shuffled.policy().member


def test_equal_controls_run_once_and_never_twice_with_a_variant():
    lru, lfu = (variant(f"{p} 10%", policy=p, budget_percent=10) for p in ("lru", "lfu"))
    random = variant("random 10%", policy="random", budget_percent=10)
    assert names(lru, lfu) == [
        "random 10% (control)", "shuffled lru 10% (control)", "window 10% (control)",
        "shuffled lfu 10% (control)",
    ]  # fmt: skip
    assert "random 10% (control)" not in names(lru, random)


def test_a_bare_window_is_compared_with_random_eviction_of_its_size():
    window = variant("sink", window=SinkWindow(4, 1024, middle=False), block_size=64)
    [control] = controls([window], 128)
    assert control.spec.budget_blocks == 1 + 16 + 2 + 1 and control.spec.policy().name == "random"
    assert control.name == "random sink (control)"


def test_what_loses_nothing_needs_no_control():
    assert names(variant("int4", format="int4"), variant("lru", policy="lru"),
                 variant("sink", window=SinkWindow(4, 64))) == []  # fmt: skip
