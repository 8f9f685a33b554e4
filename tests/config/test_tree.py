"""Where values come from and what is used, on an unresolved tree."""

from __future__ import annotations

import pytest

from kvlab.config.tree import is_used, lookup, origin, reachable

TREE = {
    "format": {"_target_": "F", "key": {"bits": 4}},
    "window": {"sinks": 4},
    "cache": {"format": "${format}", "size": 64, "parts": ["${window}", 3]},
    "spec": "${cache}",
    "data": {"path": "x"},
    "prompt": "text ${seed} more",
    "seed": 0,
    "job": {"seed": "${seed}", "text": "${prompt}", "size": "${spec.size}"},
}


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("spec.size", "cache.size"),
        ("spec.format.key.bits", "format.key.bits"),
        ("spec.parts.0.sinks", "window.sinks"),
        ("job.size", "cache.size"),
        ("job.seed", "seed"),
        ("cache.nothing", "cache.nothing"),
        ("spec", "cache"),
    ],
)
def test_origin_is_the_key_a_user_sets(path, key):
    assert origin(TREE, path) == key


def test_lookup_follows_nothing():
    assert lookup(TREE, "spec") == "${cache}" and lookup(TREE, "a.b") is None


def test_reachable_follows_interpolations_also_inside_text():
    used = reachable(TREE, ["job"])
    assert {"seed", "prompt", "cache.size"} <= used
    assert not is_used("format", used) and not is_used("data.path", used)
    used = reachable(TREE, ["spec"])
    assert is_used("window.sinks", used) and is_used("window", used) and is_used("format", used)
    assert not is_used("data", used)
