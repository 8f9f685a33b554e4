"""A replay gives to the block what it gave when it was recorded."""

import json
from pathlib import Path

import pytest
from replays import RANKED, cases, digest, traces

from kvlab.policy import asked, names

RECORDED = json.loads(Path(__file__).with_name("replays.json").read_text())
CASES = {name: (trace, given) for name, trace, given in cases()}


def test_what_was_recorded_is_what_is_replayed():
    assert RECORDED.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_recorded_replay(name):
    assert digest(*CASES[name]) == RECORDED[name]


@pytest.mark.parametrize("policy", [n for n in names() if asked(n).scored and n != RANKED])
def test_no_trace_has_scores(policy):
    given = {"policy": policy, "capacity_blocks": 24}
    assert digest(traces()["sessions"], given) == RECORDED[f"sessions {RANKED} 24"]
