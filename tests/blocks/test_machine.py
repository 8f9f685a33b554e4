"""hypothesis looks for a sequence of actions that breaks a book; see `house.py` for the laws."""

from __future__ import annotations

import pytest
from house import House
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from long_run import POLICIES, run

which = st.integers(0, 99)
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=6)


class Machine(RuleBasedStateMachine):
    """Any policy, any order of actions."""

    @initialize(policy=st.sampled_from(POLICIES), capacity=st.integers(3, 20))
    def build(self, policy, capacity):
        self.house = House(policy, capacity)

    @rule(prompt=tokens, again=st.integers(1, 2), serving=st.booleans())
    def open(self, prompt, again, serving):
        self.house.open(prompt * again, serving)

    @rule(which=which, tokens=tokens)
    def write(self, which, tokens):
        self.house.write(which, tokens)

    @rule(which=which)
    def share(self, which):
        self.house.share(which)

    @rule(which=which)
    def close(self, which):
        self.house.close(which)

    @rule(which=which, blocks=st.integers(0, 2))
    def truncate(self, which, blocks):
        self.house.truncate(which, blocks)

    @rule(count=st.integers(0, 3))
    def evict(self, count):
        self.house.evict(count)

    @rule(which=which)
    def drop(self, which):
        self.house.drop(which)

    @rule(which=which, score=st.floats(0, 1))
    def use(self, which, score):
        self.house.use(which, score)

    @invariant()
    def books_agree(self):
        if hasattr(self, "house"):
            self.house.check()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=230,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("policy", POLICIES)
def test_random_actions(policy):
    """The long run, cut short; every action must have happened, or the laws say nothing."""
    done = run(policy, 700, seed=1)
    assert min(done[name] for name in ("hit", "share", "close", "truncate", "evict", "drop")) > 5
