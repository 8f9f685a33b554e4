"""hypothesis looks for a sequence of actions that breaks a book; see `house.py` for the laws."""

from __future__ import annotations

import pytest
from house import KINDS, House
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from long_run import POLICIES, run

which = st.integers(0, 99)
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=6)


class Machine(RuleBasedStateMachine):
    """Any policy, any member of axis prefix, any tier, any order of actions."""

    @initialize(policy=st.sampled_from(POLICIES), kind=st.sampled_from(sorted(KINDS)),
                capacity=st.integers(3, 20), groups=st.integers(1, 2), window=st.booleans())
    def build(self, policy, kind, capacity, groups, window):
        self.house = House(policy, kind, capacity, groups, window)

    @rule(prompt=tokens, again=st.integers(1, 3), reserve=st.sampled_from([0, 0, 9]))
    def open(self, prompt, again, reserve):
        self.house.open(prompt * again, reserve)

    @rule(rows=st.lists(which, min_size=1, max_size=3),
          new=st.lists(tokens, min_size=3, max_size=3),
          end=st.sampled_from(["commit", "commit", "commit", "abort", "fail"]))
    def write(self, rows, new, end):
        self.house.write(rows, new, end)

    @rule(which=which, token=st.integers(0, 1))
    def decode(self, which, token):
        self.house.write([which], [[token]])

    @rule(which=which, fails=st.booleans())
    def fork(self, which, fails):
        self.house.fork(which, fails)

    @rule(which=which, length=which)
    def truncate(self, which, length):
        self.house.truncate(which, length)

    @rule(which=which)
    def close(self, which):
        self.house.close(which)

    @rule(which=which, pin=st.booleans())
    def keep(self, which, pin):
        self.house.keep(which, pin)

    @rule(prompt=tokens)
    def attach(self, prompt):
        self.house.attach(prompt)

    @rule(which=which)
    def release(self, which):
        self.house.release(which)

    @rule(count=st.integers(0, 3))
    def evict(self, count):
        self.house.evict(count)

    @rule(spill=st.booleans())
    def drop(self, spill):
        self.house.drop(spill)

    @rule()
    def renew(self):
        self.house.renew()

    @rule(which=which)
    def use(self, which):
        self.house.use(which)

    @invariant()
    def books_agree(self):
        if hasattr(self, "house"):
            self.house.check()

    def teardown(self):
        if hasattr(self, "house"):
            self.house.settle()


TestMachine = Machine.TestCase
TestMachine.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_random_actions(kind):
    """The long run, cut short; every action must have happened, or the laws say nothing."""
    done = run("lru", kind, 700, seed=1)
    wanted = ["close", "truncate", "evict", "fork", "abort", "undo"]
    wanted += ["hit", "keep", "renew"] * (not kind.startswith("alone"))
    assert {name: done[name] for name in wanted if done[name] < 3} == {}
    assert done["host hit"] or kind not in ("exclusive", "write back", "write through")


@pytest.mark.parametrize("policy", POLICIES)
def test_any_policy(policy):
    run(policy, "exclusive", 250, seed=2)
