"""What is timed: tokens behind the first, which compiles and captures."""

from __future__ import annotations

import pytest
import torch

from kvlab.cache import CacheSpec
from kvlab.eval import clock, cost
from kvlab.eval.runner import Runner


@pytest.fixture
def steps(monkeypatch):
    """A decoder whose first step takes 100 s and each other 2 s; the tokens it was given."""
    given, now = [], [0.0]

    class Decoder:
        def __init__(self, model, cache, driver):
            assert driver == "eager"

        def step(self, tokens):
            now[0] += 2.0 if given else 100.0
            given.append(tokens.tolist())

    monkeypatch.setattr(cost, "Decoder", Decoder)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return given


class Loaded:
    model = None


def rate(count: int) -> tuple[float, int]:
    ids = torch.arange(3, 3 + count)
    return cost.decode_rate(Runner("int4", {}, CacheSpec(), loaded=Loaded), ids, "eager")


def test_the_first_token_is_fed_but_not_timed(steps):
    assert rate(5) == (0.5, 4)
    assert steps == [[3], [4], [5], [6], [7]]


def test_a_single_token_is_timed_for_want_of_another(steps):
    assert rate(1) == (0.01, 1)
    assert steps == [[3]]
