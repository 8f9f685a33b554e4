"""The scripts that a newcomer copies run, and show what they say."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny import make_tiny_model

from kvlab.sim import load_trace

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield import_module
    for name in ("compose", "own_policy", "own_trace"):
        sys.modules.pop(name, None)


def test_a_composed_cache_answers(example):
    ids = torch.randint(1, 128, (1, 200), generator=torch.Generator().manual_seed(0))
    found = example("compose").answers(make_tiny_model(), ids, 4)
    assert {len(tokens) for tokens, _ in found.values()} == {4}
    full, *others = (in_use for _, in_use in found.values())
    assert max(others) < full


def test_a_policy_of_ones_own_is_replayed_and_run(example):
    own = example("own_policy")
    percent = own.replayed(load_trace("synthetic"), 2000)
    assert percent["deepest"] != percent["lru"] and min(percent.values()) > 0
    ids = torch.randint(1, 128, (1, 400), generator=torch.Generator().manual_seed(0))
    kept = own.live(make_tiny_model(), ids, 12)
    assert kept[0] == 0 and 0 < len(kept) <= 12


def test_a_trace_of_ones_own_is_read_and_replayed(example, tmp_path):
    own = example("own_trace")
    found = own.told(own.write(tmp_path / "chats.jsonl"))
    ideal = max(found.values())
    assert found["ideal", next(room for name, room in found if name == "ideal")] == ideal
    assert 0 < found["lru", 60] <= found["belady", 60] <= ideal
